"""How large the header of an extraction's file can get: it is reserved before the tensors behind it are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..adapters import loha, lokr, lora
from ..adapters.dora import SCALE
from ..adapters.svdiff import DELTA
from ..algebra import kronecker
from ..algebra.hadamard import Hadamard
from ..algebra.kronecker import Kronecker, Sizes
from ..files.metadata import with_hashes
from ..files.writer import header_bytes
from . import extract_rests
from .extract_plan import ExtractPlan, shifts_name
from .extract_rests import Rests
from .extract_spec import DORA, LOHA, LOKR, SVDIFF
from .pairing import Pair

_SLACK = 512  # bytes for the measured figures in the recipe, and the family's arguments

Entries = dict[str, dict]


def reserve(
    plan: ExtractPlan, family: str, rests: Rests, chosen: Mapping[str, int] | None, metadata: dict[str, str]
) -> int:
    """An upper bound in bytes, close enough for the size rule.

    chosen: rank by layer where that is known; layers that are not in it are not written, but for fused ones.
    """
    entries: Entries = {}
    for pair in plan.layers:
        if chosen is not None and pair.key not in chosen and not pair.tuned.fused:
            continue
        most = plan.fixed_rank(pair) if plan.spec.rank_rule == "fixed" else plan.largest_rank(pair)
        rank = chosen.get(pair.key, 1) if chosen is not None else most
        possible = [_entries(plan, tensors) for tensors in _forms(plan, family, pair, rank)]
        entries |= max(possible, key=lambda form: len(header_bytes(form, {})))
    entries |= {name: _entry(plan, shape) for name, shape in extract_rests.tensor_names(rests)}
    return len(header_bytes(entries, with_hashes(metadata, "0" * 64, "0" * 8))) + _SLACK


def _forms(plan: ExtractPlan, family: str, pair: Pair, rank: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors by which a layer may be written, without numbers."""
    assert pair.tuned.weight is not None and pair.tuned.name is not None
    (n, k), shape, name = pair.tuned.matrix_shape, pair.tuned.weight.shape, pair.tuned.name
    if family == SVDIFF:
        yield [(f"{shifts_name(plan, pair.tuned)}.{DELTA}", _empty(min(n, k)))]
        return
    plain = list(lora.tensors(name, _empty(n, rank), _empty(rank, k), shape))
    yield plain
    if family == DORA:
        yield [*plain, (f"{name}.{SCALE}", _empty(1, *shape[1:2], *(1 for _ in shape[2:])))]
    elif family == LOHA:
        pairs = (_empty(n, rank), _empty(rank, k)) * 2
        yield list(loha.tensors(name, Hadamard(*pairs, error2=0.0)))
    elif family == LOKR:
        for sizes in kronecker.choices(n, shape[1], k // shape[1], rank * (n + k)):
            yield list(lokr.tensors(name, _product(sizes), shape))


def _product(sizes: Sizes) -> Kronecker:
    first = _empty(sizes.u, sizes.v)
    if sizes.rank is None:
        return Kronecker(first, _empty(sizes.p, sizes.w), None, None, 0.0)
    return Kronecker(first, None, _empty(sizes.p, sizes.rank), _empty(sizes.rank, sizes.w), 0.0)


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _entries(plan: ExtractPlan, tensors: list[tuple[str, torch.Tensor]]) -> Entries:
    return {name: _entry(plan, tuple(tensor.shape)) for name, tensor in tensors}


def _entry(plan: ExtractPlan, shape: tuple[int, ...]) -> dict:
    offset = 10 ** len(str(plan.most_bytes * 2))
    return {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset]}
