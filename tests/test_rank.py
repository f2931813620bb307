"""Rank rules against their definitions, the allocation over layers against trying everything."""

import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.rank import Bounds, allocate, by_cumulative, by_energy, by_ratio

quick = settings(max_examples=200, deadline=None, derandomize=True)
spectra = st.lists(st.floats(1e-3, 10), min_size=1, max_size=12).map(lambda v: sorted(v, reverse=True))


def tensor(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- per layer ----------------------------------------------------------------------------------------------


@quick
@given(S=spectra, target=st.floats(0.01, 0.99))
def test_ratio(S, target):
    assert by_ratio(tensor(S), target, True) == sum(s >= target * S[0] for s in S)


@quick
@given(S=spectra, target=st.floats(1.01, 100))
def test_ratio_above_one_divides(S, target):
    share = 1 / target
    assert by_ratio(tensor(S), target, True) == sum(s >= share * S[0] for s in S)


@quick
@given(S=spectra, target=st.floats(0.01, 1))
def test_energy_is_the_fewest_that_reach_the_share(S, target):
    total = math.fsum(s * s for s in S)
    rank = by_energy(tensor(S), total, target, True)
    assert 1 <= rank <= len(S)
    assert math.fsum(s * s for s in S[:rank]) >= target * total * (1 - 1e-9)
    assert math.fsum(s * s for s in S[: rank - 1]) < target * total


@quick
@given(S=spectra, target=st.floats(0.01, 1))
def test_cumulative_is_the_fewest_that_reach_the_share(S, target):
    total = math.fsum(S)
    rank = by_cumulative(tensor(S), target)
    assert 1 <= rank <= len(S)
    assert math.fsum(S[:rank]) >= target * total * (1 - 1e-9)
    assert math.fsum(S[: rank - 1]) < target * total


def test_a_known_spectrum():
    S = tensor([4.0, 2.0, 1.0, 1.0])  # squares 16, 4, 1, 1: together 22
    assert by_ratio(S, 0.5, True) == 2
    assert by_ratio(S, 4, True) == 4
    assert by_energy(S, 22.0, 16 / 22, True) == 1
    assert by_energy(S, 22.0, 17 / 22, True) == 2
    assert by_cumulative(S, 0.5) == 1
    assert by_cumulative(S, 0.76) == 3


def test_an_incomplete_spectrum_says_that_more_is_needed():
    S = tensor([4.0, 3.0])
    assert by_ratio(S, 0.5, False) is None and by_ratio(S, 0.5, True) == 2
    assert by_ratio(S, 0.9, False) == 1
    assert by_energy(S, 100.0, 0.5, False) is None and by_energy(S, 100.0, 0.5, True) == 2
    assert by_energy(S, 100.0, 0.2, False) == 2


def test_bounds_clamp():
    assert [Bounds(2, 5).clamp(rank) for rank in (0, 2, 3, 9)] == [2, 2, 3, 5]


# --- over all layers ----------------------------------------------------------------------------------------


@st.composite
def problems(draw, equal_costs: bool = False):
    count = draw(st.integers(1, 4))
    cost = draw(st.integers(1, 9))
    squares, costs, bounds = [], [], []
    for _ in range(count):
        values = draw(st.lists(st.floats(0, 10), min_size=1, max_size=4))
        squares.append(sorted(values, reverse=True))
        costs.append(cost if equal_costs else draw(st.integers(1, 9)))
        least = draw(st.integers(0, len(values)))
        bounds.append((least, draw(st.integers(least, len(values)))))
    return squares, costs, bounds, draw(st.integers(0, 100))


def allotted(squares, costs, bounds, budget) -> list[int] | None:
    return allocate([tensor(s) for s in squares], costs, [Bounds(*b) for b in bounds], budget)


def kept(squares, ranks) -> float:
    return sum(sum(s[:r]) for s, r in zip(squares, ranks, strict=True))


def size(ranks, costs) -> int:
    return sum(r * c for r, c in zip(ranks, costs, strict=True))


@quick
@given(problems())
def test_allocation_keeps_to_budget_and_bounds(problem):
    squares, costs, bounds, budget = problem
    ranks = allotted(*problem)
    if ranks is None:
        assert size([least for least, _ in bounds], costs) > budget
        return
    assert size(ranks, costs) <= budget
    assert all(least <= r <= most for r, (least, most) in zip(ranks, bounds, strict=True))
    # nothing that still fits is left over
    spare = budget - size(ranks, costs)
    assert all(r == most or c > spare for r, c, (_, most) in zip(ranks, costs, bounds, strict=True))


@quick
@given(problems(equal_costs=True))
def test_allocation_is_the_optimum_where_all_layers_cost_the_same(problem):
    ranks = allotted(*problem)
    best = oracles.best_allocation(*problem)
    assert (ranks is None) == (best < 0)
    if ranks is not None:
        assert kept(problem[0], ranks) == pytest.approx(best, abs=1e-9)


@quick
@given(problems())
def test_allocation_loses_at_most_the_direction_that_did_not_fit(problem):
    """Taking by energy per byte is the knapsack's relaxation: its gap is below the largest single gain."""
    squares, costs, bounds, _ = problem
    ranks = allotted(*problem)
    assume(ranks is not None)
    open_gains = [g for s, (least, most) in zip(squares, bounds, strict=True) for g in s[least:most]]
    best = oracles.best_allocation(*problem)
    assert best - max(open_gains, default=0) - 1e-9 <= kept(squares, ranks) <= best + 1e-9


@quick
@given(problems(equal_costs=True), st.integers(0, 60))
def test_a_larger_budget_never_lowers_a_rank(problem, more):
    squares, costs, bounds, budget = problem
    before, after = allotted(*problem), allotted(squares, costs, bounds, budget + more)
    if before is not None:
        assert after is not None
        assert all(a >= b for a, b in zip(after, before, strict=True))


@quick
@given(problems(), st.integers(0, 60))
def test_a_larger_budget_never_keeps_less_than_the_gap(problem, more):
    squares, costs, bounds, budget = problem
    before, after = allotted(*problem), allotted(squares, costs, bounds, budget + more)
    assume(before is not None)
    largest = max((g for s, (least, most) in zip(squares, bounds, strict=True) for g in s[least:most]), default=0)
    assert kept(squares, after) >= kept(squares, before) - largest - 1e-9


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("uniform", [4, 16, 40])
def test_better_than_a_uniform_rank_of_the_same_size(seed, uniform):
    rng = np.random.default_rng(seed)
    shapes = [(320, 320), (1280, 320), (1280, 1280), (640, 5760), (1280, 11520), (320, 2880)]
    squares = [(rng.uniform(0.5, 3) * np.arange(1, 65) ** -rng.uniform(0.3, 1.5)) ** 2 for _ in shapes]
    costs = [2 * (n + k) for n, k in shapes]
    budget = uniform * sum(costs)
    ranks = allotted([s.tolist() for s in squares], costs, [(0, 64)] * len(shapes), budget)
    assert ranks is not None and size(ranks, costs) <= budget
    assert budget - size(ranks, costs) < max(costs)
    same = kept(squares, [uniform] * len(shapes))
    assert kept(squares, ranks) > same


def test_too_small_a_budget():
    assert allotted([[1.0], [1.0]], [5, 5], [(1, 1), (1, 1)], 9) is None
    assert allotted([[1.0], [1.0]], [5, 5], [(1, 1), (1, 1)], 10) == [1, 1]
