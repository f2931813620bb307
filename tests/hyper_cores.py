"""Small problems on cores for the container and its alternatives, and their numbers in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lib_hypermerge.algebra.hyper.problem import Cores, Problem


def problem_of(
    groups: Sequence[np.ndarray],
    costs: Sequence[Sequence[int]],
    outside: float = 0.0,
    rows: Sequence[Sequence[int]] = (),
) -> Problem:
    """groups: (L, M, p, q) each.  costs: n + k of each layer, rows: n.  outside: each model's energy beyond them."""
    made, M = [], groups[0].shape[1]
    gram = np.eye(M) * outside
    for g, (values, cost) in enumerate(zip(groups, costs, strict=True)):
        flat = np.moveaxis(values, 1, 0).reshape(M, -1).astype(np.float64)
        gram += flat @ flat.T
        most = torch.tensor([min(c // 2, *values.shape[2:]) for c in cost])
        made.append(
            Cores(
                torch.from_numpy(values.astype(np.float32)),
                torch.tensor(cost),
                most,
                torch.tensor(rows[g]) if rows else None,
            )
        )
    return Problem(made, torch.from_numpy(gram), float(np.trace(gram)))


def random_cores(L: int, M: int, p: int, q: int, seed: int, shared: int = 0, own: float = 1.0) -> np.ndarray:
    """Decaying in both modes; shared: of rank so many in bases that all models share, with `own` noise besides."""
    rng = np.random.default_rng(seed)
    out = own * rng.standard_normal((L, M, p, q)) / np.sqrt(p * q)
    if shared:
        U, V = rng.standard_normal((L, 1, p, shared)), rng.standard_normal((L, 1, shared, q))
        out += U @ rng.standard_normal((L, M, shared, shared)) @ V / np.sqrt(p * q)
    scale = np.arange(1, p + 1)[:, None] ** -0.5 * np.arange(1, q + 1) ** -0.5
    return (out * scale).astype(np.float32)


def values_of(problem: Problem) -> list[np.ndarray]:
    """All layers' (M, p, q) in float64."""
    return [layer.numpy().astype(np.float64) for group in problem.groups for layer in group.values]


def costs_of(problem: Problem) -> list[int]:
    return [int(cost) for group in problem.groups for cost in group.costs]
