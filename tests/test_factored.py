"""Matrices given as products: everything said of them is what the whole matrix, formed in float64, says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra import factored
from lib_hypermerge.algebra.factored import LowRank
from lib_hypermerge.errors import NumericalError

QUICK = settings(derandomize=True, deadline=None, max_examples=40)
sizes = st.integers(1, 14)
seeds = st.integers(0, 2**32 - 1)


def made(n: int, k: int, r: int, seed: int, scale: float = 0.7, dtype: torch.dtype = torch.float64) -> LowRank:
    rng = np.random.default_rng(seed)
    up, down = (torch.from_numpy(rng.standard_normal(size)).to(dtype) for size in ((n, r), (r, k)))
    return LowRank(up, down, scale)


def whole(a: LowRank) -> np.ndarray:
    return a.scale * a.up.double().numpy() @ a.down.double().numpy()


@QUICK
@given(sizes, sizes, st.integers(1, 20), seeds, st.sampled_from((torch.float64, torch.float32, torch.float16)))
def test_norms_products_and_singular_values(n, k, r, seed, dtype):
    a, b = made(n, k, r, seed, -0.7, dtype), made(n, k, 3, seed + 1, 2.0)
    A, B = whole(a), whole(b)
    size = np.linalg.norm(A)
    assert factored.norm(a) == pytest.approx(size, rel=1e-10)
    assert factored.inner(a, b) == pytest.approx((A * B).sum(), abs=1e-12 * r * np.linalg.norm(B) * (1 + size))
    S = factored.singular_values(a).numpy()
    assert S.shape == (min(n, k, r),) and (S[:-1] >= S[1:]).all()
    np.testing.assert_allclose(S, np.linalg.svd(A, compute_uv=False)[: len(S)], atol=1e-12 * (1 + size))


@QUICK
@given(sizes, sizes, st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 5)), min_size=1, max_size=4), seeds)
def test_a_weighted_sum_is_exact(n, k, terms, seed):
    lows = [(weight, made(n, k, r, seed + i, 0.3 + i)) for i, (weight, r) in enumerate(terms)]
    total = factored.weighted_sum(lows)
    assert total.rank == sum(r for _, r in terms) and total.scale == 1
    np.testing.assert_allclose(whole(total), sum(weight * whole(low) for weight, low in lows), atol=1e-11)


@QUICK
@given(sizes, sizes, st.integers(1, 20), st.integers(1, 20), seeds)
def test_compression_to_a_rank_is_the_best(n, k, r, rank, seed):
    a = made(n, k, r, seed)
    A = whole(a)
    made_of = factored.compress(a, torch.float64, rank)
    assert made_of.rank == min(rank, n, k, r)
    best = (np.linalg.svd(A, compute_uv=False)[made_of.rank :] ** 2).sum()
    miss = ((A - made_of.up.numpy() @ made_of.down.numpy()) ** 2).sum()
    assert miss == pytest.approx(best, rel=1e-9, abs=1e-24 * (A**2).sum())
    assert made_of.error2 == pytest.approx(miss, rel=1e-9, abs=1e-24 * (A**2).sum())
    assert made_of.energy == pytest.approx((A**2).sum())
    np.testing.assert_allclose(made_of.up.norm(dim=0), made_of.down.norm(dim=1), rtol=1e-9)  # balanced
    largest = made_of.up.gather(0, made_of.up.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


@QUICK
@given(sizes, sizes, st.integers(1, 12), st.floats(0.01, 1), seeds)
def test_compression_to_a_share_of_the_energy(n, k, r, energy, seed):
    a = made(n, k, r, seed)
    squares = np.linalg.svd(whole(a), compute_uv=False)[: min(n, k, r)] ** 2
    needed = next(i for i in range(1, len(squares) + 1) if squares[:i].sum() >= energy * squares.sum() * (1 - 1e-9))
    assert factored.compress(a, torch.float64, energy=energy).rank == needed
    assert factored.compress(a, torch.float64, rank=2, energy=energy).rank == min(needed, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 5])
def test_rounding_costs_next_to_nothing_and_is_measured(dtype, rank):
    a = made(60, 90, 12, 0)
    A = whole(a)
    made_of = factored.compress(a, dtype, rank)
    assert (made_of.up.dtype, made_of.down.dtype, made_of.S.dtype) == (dtype, dtype, torch.float64)
    miss = ((A - made_of.up.double().numpy() @ made_of.down.double().numpy()) ** 2).sum()
    assert made_of.error2 == pytest.approx(miss, rel=1e-6)
    best = (np.linalg.svd(A, compute_uv=False)[made_of.rank :] ** 2).sum()
    naive = made_of.rank and sum(
        ((A - (u.to(dtype).double() @ d.to(dtype).double()).numpy()) ** 2).sum() for u, d in [_split(A, made_of.rank)]
    )
    assert best - 1e-20 <= miss <= naive


def _split(A: np.ndarray, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = np.linalg.svd(A, full_matrices=False)
    half = np.sqrt(S[:r])
    return torch.from_numpy(U[:, :r] * half), torch.from_numpy(half[:, None] * Vh[:r])


def test_directions_that_are_not_there_are_left_out():
    a = made(30, 40, 4, 0)
    assert factored.compress(factored.weighted_sum([(1.0, a), (0.5, a)])).rank == 4
    again = LowRank(a.up.repeat(1, 3), a.down.repeat(3, 1))
    assert factored.compress(again, rank=100).rank == 4
    nothing = factored.compress(factored.weighted_sum([(1.0, a), (-1.0, a)]), torch.float16)
    assert nothing.rank == 1 and nothing.error2 <= 1e-20
    zero = factored.compress(LowRank(torch.zeros(3, 2), torch.ones(2, 5)), energy=0.5)
    assert zero.rank == 1 and not zero.up.any() and zero.error2 == 0


def test_directions_too_small_for_the_number_format_are_left_out_and_counted_as_error():
    up, down = torch.eye(4)[:, :2].double(), torch.eye(5)[:2].double()
    made_of = factored.compress(LowRank(up * torch.tensor([1.0, 1e-20]), down), torch.float16)
    assert made_of.rank == 1
    assert made_of.error2 == pytest.approx(1e-40, rel=1e-6)


def test_numbers_too_large_for_the_number_format():
    with pytest.raises(NumericalError, match="too large for float16"):
        factored.compress(LowRank(torch.full((3, 1), 1e6), torch.full((1, 3), 1e6)), torch.float16)


def test_inputs_stay_as_they_are():
    a = made(6, 7, 3, 0)
    up, down = a.up.clone(), a.down.clone()
    factored.compress(a, torch.float16, 2)
    factored.weighted_sum([(2.0, a)]).up.zero_()
    assert torch.equal(a.up, up) and torch.equal(a.down, down)
