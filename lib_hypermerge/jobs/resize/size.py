"""The rank rule "size": what a file holds besides factors, to the byte, and the ranks that fill the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...adapters.lora import DOWN, UP
from ...errors import SpecError
from ...files.metadata import with_hashes
from ...files.writer import header_bytes
from ...layouts.module import CONV
from ..convert_metadata import lora_texts
from ..convert_plan import AdapterPlan
from ..convert_spec import KOHYA
from ..convert_units import CARRY, REFIT
from ..convert_write import embedding_name
from .plan import own_rank
from .ranks import Spectrum, asked, by_size
from .spec import ResizeSpec
from .work import Choose

_SLACK = 64  # bytes of header


def allot(spec: ResizeSpec, plan: AdapterPlan, found: Sequence[tuple[str, Spectrum]]) -> tuple[Choose, int, bool]:
    """(the ranks by module, bytes to reserve for the header, whether the ranks end before the size is reached).

    Raises SpecError if the size is too small.
    """
    if plan.spec.to != KOHYA:
        raise SpecError(
            "A size can be kept to only in kohya's dialect: the others fill modules up, or are folders.",
            hint="Choose kohya's dialect, or another rank rule.",
        )
    largest = {name: max(1, len(one.S)) for name, one in found}
    overhead = 8 + header(plan, largest) + _carried(plan)
    ranks = dict(zip([name for name, _ in found], by_size(spec, [one for _, one in found], overhead), strict=True))
    reserve = header(plan, ranks)
    budget = math.floor((spec.rank_target or 0) * 2**20)
    taken = 8 + reserve + _carried(plan) + sum(ranks[name] * one.cost for name, one in found)
    return (lambda name, _: [ranks[name]]), reserve, taken < 0.98 * budget


def most_ranks(spec: ResizeSpec, plan: AdapterPlan, rung: int) -> dict[str, int]:
    """The largest rank that each module of a result can have, by its name."""
    found = {}
    for unit in plan.units:
        if unit.how != CARRY:
            wanted = asked(spec, rung, unit.module.kind == CONV) if rung else 10**4
            own = sum(map(own_rank, unit.sources))
            found |= dict.fromkeys((out.name for out in unit.written), wanted if spec.fill else min(wanted, own))
    return found


def _carried(plan: AdapterPlan) -> int:
    """Bytes of everything but factors: alphas, magnitudes, biases, norms, bundled embeddings."""
    total = sum(info.nbytes for _, info in plan.embeddings.values())
    total += sum(info.numel * plan.itemsize(info.dtype) for entry in plan.verbatim for info in entry.parts.values())
    for unit in plan.units:
        for source in unit.sources:
            for part, info in source.entry.parts.items():
                beside = unit.how == CARRY or part in ("diff_b", "lora_up.bias") or "scale" in part or "vector" in part
                total += info.numel * max(plan.itemsize(info.dtype), info.nbytes // max(1, info.numel)) if beside else 0
        total += 4 * len(unit.written) if unit.how != CARRY else 0
    return total


def header(plan: AdapterPlan, ranks: dict[str, int]) -> int:
    """The header's size if the modules have these ranks, or an upper bound close to it."""
    offset = 10 ** len(str(plan.bytes_at(None)))
    entries: dict[str, dict] = {}
    conv: dict[str, int] = {}

    def entry(name: str, shape: Sequence[int]) -> None:
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset]}

    for unit in plan.units:
        if unit.how == CARRY:
            for source in unit.sources:
                for part, info in source.entry.parts.items():
                    entry(f"{unit.written[0].name}.{part}", info.shape)
                entry(f"{unit.written[0].name}.alpha", ())
            continue
        for out in unit.written:
            rank, shape = ranks[out.name], unit.sources[0].shape
            if unit.module.kind == CONV:
                conv[out.name] = rank
            entry(f"{out.name}.{DOWN}", (rank, *shape[1:]))
            entry(f"{out.name}.{UP}", (10**6, rank, 1, 1))
            entry(f"{out.name}.alpha", ())
            if unit.how == REFIT:
                entry(f"{out.name}.dora_scale", (10**6, 10**6, 1, 1))
            for source in unit.sources:
                if "scale" in source.entry.parts:
                    entry(f"{out.name}.scale", ())
                if {"diff_b", "lora_up.bias"} & source.entry.parts.keys():
                    entry(f"{out.name}.diff_b", (10**6,))
    for one in plan.verbatim:
        for part, info in one.parts.items():
            entry(f"{one.key}.{part}", info.shape)
    for name, (_, info) in plan.embeddings.items():
        entry(embedding_name(name), (1, *info.shape))
    linear = {name: rank for name, rank in ranks.items() if name not in conv}
    texts = with_hashes(lora_texts(plan, linear, conv), "0" * 64, "0" * 8)
    return len(header_bytes(entries, texts)) + _SLACK
