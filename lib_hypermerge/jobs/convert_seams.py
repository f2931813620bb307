"""Layers that one dialect fuses and the other keeps apart: q, k and v cut out of one LoRA, or joined to one.

A cut is exact: all parts have the same down, and rows of up. Joined again they are the very LoRA; other LoRAs side by
side become one whose rank is the sum of theirs.
"""

from __future__ import annotations

import torch

from ..adapters.adapter import BIAS
from ..adapters.dora import SCALE as MAGNITUDES
from ..adapters.full import DIFF
from ..adapters.lora import DOWN, UP
from ..adapters.swapped import swap
from ..algebra import folding
from .convert_restore import ALPHA, Tensors
from .convert_units import Out, Source, Unit

EXACTLY, BY_RANK = "exactly", "by adding ranks"


def scale_of(tensors: Tensors) -> float:
    """alpha / r of a module's tensors."""
    if "scale" in tensors:
        return float(tensors["scale"].item())
    return 1.0 if ALPHA not in tensors else float(tensors[ALPHA].item()) / len(tensors[DOWN])


def arrange(unit: Unit, made: list[Tensors]) -> tuple[list[tuple[Out, Tensors]], str]:
    """The output's modules from the sources' tensors, and how they were joined, if they were."""
    out, joined = [], ""
    for wanted in unit.written:
        pairs = zip(unit.sources, made, strict=True)
        own = [(s, t) for s, t in pairs if s.start < wanted.stop and wanted.start < s.stop]
        source, tensors = own[0]
        if len(own) == 1 and (source.start, source.stop) == (wanted.start, wanted.stop):
            turned = source.swapped != wanted.swapped
        elif len(own) == 1 and source.start <= wanted.start and wanted.stop <= source.stop:
            tensors, turned = _cut(source, tensors, wanted), wanted.swapped
        else:
            tensors, how = _join(own, wanted)
            joined, turned = BY_RANK if BY_RANK in (joined, how) else how, wanted.swapped
        out.append((wanted, {k: swap(v) if _has_rows(k) else v for k, v in tensors.items()} if turned else tensors))
    return out, joined


def _has_rows(part: str) -> bool:
    return part in (UP, DIFF, BIAS, MAGNITUDES)


def _cut(source: Source, tensors: Tensors, wanted: Out) -> Tensors:
    span = source.stop - source.start
    out = {}
    for part, tensor in tensors.items():
        if _has_rows(part):
            rows = len(tensor)
            first, last = ((edge - source.start) * rows // span for edge in (wanted.start, wanted.stop))
            tensor = tensor[first:last].clone()
        out[part] = tensor
    return out


def _join(own: list[tuple[Source, Tensors]], wanted: Out) -> tuple[Tensors, str]:
    """One module of several side by side; rows that none of them has stay as they are."""
    sized = next(t[name] for _, t in own for name in (UP, DIFF, BIAS) if name in t)
    source = next(s for s, t in own if any(sized is tensor for tensor in t.values()))
    rows, span = len(sized), source.stop - source.start

    def edges(s: Source) -> slice:
        return slice((s.start - wanted.start) * rows // span, (s.stop - wanted.start) * rows // span)

    whole = (wanted.stop - wanted.start) * rows // span
    out: Tensors = {}
    for part in (DIFF, BIAS, MAGNITUDES):
        found = [(s, t[part]) for s, t in own if part in t]
        if found:
            out[part] = _stack(found, whole, edges)
    factors = [(s, t) for s, t in own if UP in t]
    if not factors:
        return out, EXACTLY
    first = factors[0][1]
    same = all(
        folding.same_bits(t[DOWN], first[DOWN]) and scale_of(t) == scale_of(first) and t[UP].dtype == first[UP].dtype
        for _, t in factors
    )
    if same:
        kept = {part: tensor for part, tensor in first.items() if not _has_rows(part)}
        return out | kept | {UP: _stack([(s, t[UP]) for s, t in factors], whole, edges)}, EXACTLY
    return out | _side_by_side(factors, whole, edges), BY_RANK


def _stack(found: list[tuple[Source, torch.Tensor]], whole: int, edges) -> torch.Tensor:
    tensor = found[0][1].new_zeros(whole, *found[0][1].shape[1:])
    for source, part in found:
        tensor[edges(source)] = part
    return tensor


def _side_by_side(factors: list[tuple[Source, Tensors]], whole: int, edges) -> Tensors:
    """Blocks of up, one below and beside the other; downs one above the other. One scale, or all folded into up."""
    scales = [scale_of(t) for _, t in factors]
    rank = sum(len(t[DOWN]) for _, t in factors)
    common = scales[0] if len(set(scales)) == 1 else 1.0
    ups = [t[UP] for _, t in factors]
    if common != scales[0] or len(set(scales)) > 1:
        dtype = max((up.dtype for up in ups), key=lambda d: d.itemsize)
        if not all(folding.is_invertible(up, s, up.dtype) for up, s in zip(ups, scales, strict=True)):
            dtype = torch.float32
        ups = [folding.fold(up, s, dtype) for up, s in zip(ups, scales, strict=True)]
    down = torch.cat([t[DOWN] for _, t in factors])
    up = ups[0].new_zeros(whole, rank, *ups[0].shape[2:])
    column = 0
    for (source, tensors), block in zip(factors, ups, strict=True):
        width = len(tensors[DOWN])
        up[edges(source), column : column + width] = block
        column += width
    return {UP: up, DOWN: down.to(up.dtype), ALPHA: torch.tensor(common * rank, dtype=torch.float32)}
