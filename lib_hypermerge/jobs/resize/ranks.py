"""Which rank a module gets: as asked for, by its own spectrum, or by a size over all modules at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...algebra import rank as rank_rules
from ...errors import SpecError
from .spec import FIXED, ResizeSpec


@dataclass(frozen=True)
class Spectrum:
    """Of a module. S: its singular values, (m,) float64, descending.  rank: how many are above rounding.

    cost: bytes of each further direction.  is_conv: a 3×3 convolution.  own: the rank as stored.
    """

    S: torch.Tensor
    rank: int
    cost: int
    is_conv: bool
    own: int


def asked(spec: ResizeSpec, rung: int, is_conv: bool) -> int:
    """The rank of the rule fixed for a module of any size."""
    wanted = spec.conv_rank if is_conv and spec.conv_rank is not None else rung
    return max(min(wanted, spec.max_rank or wanted), spec.min_rank)


def bounds(spec: ResizeSpec, found: Spectrum) -> rank_rules.Bounds:
    """The least and the largest rank, neither above what there is."""
    most = max(1, found.rank)
    limits = [most, spec.max_rank or most]
    if spec.rank_rule != FIXED and found.is_conv and spec.conv_rank is not None:
        limits.append(spec.conv_rank)
    return rank_rules.Bounds(min(spec.min_rank, *limits), min(limits))


def by_spectrum(spec: ResizeSpec, rung: int, found: Spectrum) -> int:
    """The rank under every rule but size; 1 at least."""
    limits = bounds(spec, found)
    if spec.rank_rule == FIXED:
        return limits.clamp(asked(spec, rung, found.is_conv))
    target, energy = spec.rank_target or 1.0, float(found.S.square().sum())
    if energy == 0:
        return 1
    rank = {
        "ratio": lambda: rank_rules.by_ratio(found.S, target, complete=True),
        "energy": lambda: rank_rules.by_energy(found.S, energy, target, complete=True),
        "cumulative": lambda: rank_rules.by_cumulative(found.S, target),
    }[spec.rank_rule]()
    return limits.clamp(rank or limits.most)


def by_size(spec: ResizeSpec, spectra: Sequence[Spectrum], overhead: int) -> list[int]:
    """Ranks of all modules for a file of the target's size. overhead: bytes besides factors. SpecError if too small."""
    budget = math.floor((spec.rank_target or 0) * 2**20) - overhead
    limits = [bounds(spec, found) for found in spectra]
    ranks = rank_rules.allocate(
        [found.S.square() for found in spectra], [found.cost for found in spectra], limits, budget
    )
    if ranks is None:
        least = overhead + sum(found.cost * limit.least for found, limit in zip(spectra, limits, strict=True))
        raise SpecError(
            f"{spec.rank_target:g} MiB are too small.",
            f"The least rank in each of the {len(spectra)} modules takes {least / 2**20:.2f} MiB.",
            "Ask for more.",
        )
    return ranks
