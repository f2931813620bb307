"""What else the same bytes would buy: every figure by singular values and sorting in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hyper_cores import costs_of, problem_of, random_cores, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.hyper import alternatives as ways
from lib_hypermerge.algebra.hyper.container import shared_cores
from lib_hypermerge.algebra.hyper.problem import Problem, Settings
from lib_hypermerge.algebra.hyper.solve import solve
from lib_hypermerge.errors import Cancelled

QUICK = settings(derandomize=True, deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
HOW = Settings(starts=1, iterations=2)


def spectra(problem: Problem) -> list[np.ndarray]:
    """Squared singular values (M, s) of each layer."""
    return [np.square(np.linalg.svd(C, compute_uv=False)) for C in values_of(problem)]


def two_groups(M: int, p: int, q: int, seed: int, outside: float = 0.2) -> Problem:
    groups = [random_cores(3, M, p, q, seed, 2), random_cores(2, M, q, p, seed + 1)]
    return problem_of(groups, [[20, 30, 40], [25, 18]], outside)


def test_numbers_of_loras_stop_at_what_a_layer_has():
    problem = problem_of([random_cores(3, 2, 8, 8, 0)], [[4, 10, 30]])  # layers of at most 2, 5 and 8 directions
    assert ways.numbers_of(problem, (6, 3)) == 4 * (2 + 2) + 10 * (5 + 3) + 30 * (6 + 3)


@QUICK
@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 9), st.integers(0, 1500), seeds)
def test_own_loras_of_one_rank_and_a_part_of_the_next(M, p, q, numbers, seed):
    problem = two_groups(M, p, q, seed)
    rank = numbers / (M * sum(costs_of(problem)))
    low, part = math.floor(rank), rank - math.floor(rank)
    kept = sum(s[:, :low].sum() + part * s[:, low : low + 1].sum() for s in spectra(problem))
    found = ways.own_loras(problem, numbers, HOW)
    assert found == pytest.approx((problem.energy - kept) / problem.total, abs=1e-5)


@QUICK
@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 9), st.integers(0, 1500), seeds)
def test_own_loras_whose_ranks_follow_what_they_gain(M, p, q, numbers, seed):
    problem = two_groups(M, p, q, seed)
    every = [(value / cost, value, cost) for s, cost in zip(spectra(problem), costs_of(problem), strict=True)
             for value in s.flatten()]  # fmt: skip
    kept, left = 0.0, numbers
    for _, value, cost in sorted(every, reverse=True):
        if cost > left:
            break
        kept, left = kept + value, left - cost
    found = ways.own_loras(problem, numbers, HOW, allocate=True)
    largest = max(value for _, value, _ in every)
    assert found == pytest.approx((problem.energy - kept) / problem.total, abs=1e-5 + 1e-6 * largest)
    assert found >= (problem.energy - sum(s.sum() for s in spectra(problem))) / problem.total - 1e-5


def test_wide_cores_are_measured_to_parts_in_a_thousand():
    problem = problem_of([random_cores(2, 6, 130, 140, 1, 20, 3.0)], [[600, 900]])
    numbers = 6 * 5 * 1500
    kept = sum(s[:, :5].sum() for s in spectra(problem))
    exact = (problem.energy - kept) / problem.total
    assert exact - 1e-6 <= ways.own_loras(problem, numbers, HOW) <= exact * 1.002


def test_all_ways_of_the_same_size():
    problem = two_groups(6, 12, 14, 3)
    ranks = (4, 2)
    found = {way.kind: way for way in ways.alternatives([problem], ranks, HOW)}
    size = ways.numbers_of(problem, ranks)
    assert list(found) == ["average", "own", "greedy", "container"]
    assert found["average"].share == pytest.approx(problem.energy / problem.total) and found["average"].numbers == 0
    assert found["own"].numbers == found["greedy"].numbers == size >= found["container"].numbers
    assert found["own"].share == ways.own_loras(problem, size, HOW)
    assert found["greedy"].share == pytest.approx(solve(problem, ranks, "greedy", HOW).loss[-1])
    assert found["container"].share == shared_cores(problem, size, HOW).share


def test_what_is_known_is_not_computed_again(monkeypatch):
    problem = two_groups(4, 6, 6, 4)
    known = shared_cores(problem, 300, HOW)
    for name in ("solve", "shared_cores"):
        monkeypatch.delattr(ways, name)
    found = {way.kind: way for way in ways.alternatives([problem], (2, 1), HOW, greedy=0.5, container=known)}
    assert found["greedy"].share == 0.5 and found["container"].share == known.share


def test_problems_apart_are_counted_together():
    """Text encoders and UNet: shares are of both totals, and what has no multipliers is of both at once."""
    parts = [two_groups(5, 8, 8, 5), two_groups(5, 8, 8, 6, outside=0.0)]
    whole = ways.joined(parts)
    assert len(whole.groups) == 4
    assert whole.total == pytest.approx(parts[0].total + parts[1].total)
    assert torch.equal(whole.gram, parts[0].gram + parts[1].gram)
    ranks = (3, 1)
    found = {way.kind: way for way in ways.alternatives(parts, ranks, HOW)}
    losses = [solve(part, ranks, "greedy", HOW).loss[-1] * part.total for part in parts]
    assert found["greedy"].share == pytest.approx(sum(losses) / whole.total)
    size = sum(ways.numbers_of(part, ranks) for part in parts)
    assert found["own"].share == ways.own_loras(whole, size, HOW)
    assert found["own"].numbers == size


def test_nothing_to_share():
    problem = problem_of([np.zeros((2, 3, 6, 6), dtype=np.float32)], [[20, 20]])
    assert [way.share for way in ways.alternatives([problem], (2,), HOW, greedy=0.0)] == [0, 0, 0, 0]


def test_which_is_better_and_by_how_much():
    assert ways.better(0.4, 0.3) == ("container", pytest.approx(0.25))
    assert ways.better(0.2, 0.25) == ("loras", pytest.approx(0.2))
    assert ways.better(0.0, 0.0) == ("loras", 0)


def test_it_can_be_stopped():
    def stop(share: float) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        ways.own_loras(two_groups(2, 5, 5, 0), 100, Settings(check=stop))
