"""Randomised SVDs and random projections of a product: against whole matrices, and against what chance should give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.core import core_of
from lib_hypermerge.algebra.lowrank import Factors, LowRank
from lib_hypermerge.algebra.projecting import ACHLIOPTAS, expected_error2, random_projection, randomised
from lib_hypermerge.errors import NumericalError

QUICK = settings(derandomize=True, deadline=None, max_examples=30)
sizes = st.integers(1, 14)
seeds = st.integers(0, 2**32 - 1)
KINDS = {"normal": (False, None), "very sparse": (True, None), "Achlioptas": (True, ACHLIOPTAS), "signs": (True, 1.0)}


def made(n: int, k: int, r: int, seed: int = 0, power: float = 0.5, scale: float = 0.7) -> LowRank:
    """Directions that fall off, mixed in the factors."""
    rng = np.random.default_rng(seed)
    falling = np.arange(1, r + 1) ** -power
    mix = np.linalg.qr(rng.standard_normal((r, r)))[0]
    up, down = rng.standard_normal((n, r)) * falling @ mix, mix.T @ rng.standard_normal((r, k))
    return LowRank(torch.from_numpy(up), torch.from_numpy(down), scale)


def whole(a: LowRank) -> np.ndarray:
    return a.scale * (a.up.double().numpy() @ a.down.double().numpy())


def delta(factors: Factors) -> np.ndarray:
    return factors.up.double().numpy() @ factors.down.double().numpy()


def is_in_order(factors: Factors, rtol: float = 1e-6) -> None:
    """Balanced, by its own singular values."""
    own = np.linalg.svd(delta(factors), compute_uv=False)[: factors.rank]
    np.testing.assert_allclose(factors.S, own, rtol=rtol, atol=rtol * own[0])
    for lengths in (factors.up.double().norm(dim=0), factors.down.double().norm(dim=1)):
        np.testing.assert_allclose(lengths, own**0.5, rtol=rtol, atol=rtol * own[0] ** 0.5)


# --- randomised SVD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(300, 200), (150, 400)])
@pytest.mark.parametrize("rank", [4, 16, 40])
@pytest.mark.parametrize("power", [0.3, 1.0])
def test_a_sketch_is_nearly_the_best(shape, rank, power):
    a = made(*shape, 96, power=power)
    A = whole(a)
    best = (np.linalg.svd(A, compute_uv=False)[rank:] ** 2).sum()
    found = randomised(a, rank, torch.float64)
    miss = ((A - delta(found)) ** 2).sum()
    assert found.rank == rank and best <= miss <= 1.005 * best
    assert (found.error2, found.energy) == (pytest.approx(miss), pytest.approx((A**2).sum()))
    is_in_order(found)
    weak = randomised(a, rank, torch.float64, oversample=0, steps=0)
    assert ((A - delta(weak)) ** 2).sum() > 1.02 * best


@QUICK
@given(sizes, sizes, st.integers(1, 20), st.integers(1, 20), seeds)
def test_a_sketch_as_wide_as_the_factors_is_exact(n, k, r, rank, seed):
    a = made(n, k, r, seed)
    A = whole(a)
    found = randomised(a, rank, torch.float64, seed)
    assert found.rank == min(rank, n, k, r)
    best = (np.linalg.svd(A, compute_uv=False)[found.rank :] ** 2).sum()
    assert found.error2 == pytest.approx(best, rel=1e-6, abs=1e-20 * (A**2).sum())
    assert ((A - delta(found)) ** 2).sum() == pytest.approx(found.error2, rel=1e-6, abs=1e-20 * (A**2).sum())


# --- random projections -----------------------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, st.integers(1, 20), st.integers(1, 20), seeds, st.sampled_from(list(KINDS.values())))
def test_a_projection_lies_in_the_factors_and_is_measured(n, k, r, rank, seed, kind):
    a = made(n, k, r, seed)
    A = whole(a)
    found = random_projection(a, rank, torch.float64, seed, *kind)
    assert 1 <= found.rank <= min(rank, n, k, r)
    D = delta(found)
    assert found.error2 == pytest.approx(((A - D) ** 2).sum(), rel=1e-6, abs=1e-20 * (A**2).sum())
    assert found.energy == pytest.approx((A**2).sum())
    # D = B·C·A's down, so it maps nothing that A does not, on either side
    up, down = a.up.numpy(), a.down.numpy()
    size = np.linalg.norm(D)
    assert np.linalg.norm(up @ (np.linalg.pinv(up) @ D) - D) <= 1e-8 * size
    assert np.linalg.norm(D @ np.linalg.pinv(down) @ down - D) <= 1e-8 * size
    core = np.linalg.pinv(up) @ D @ np.linalg.pinv(down)  # s·RᵀR if the factors have full rank
    if r <= min(n, k):
        assert np.linalg.norm(core - core.T) <= 1e-7 * np.linalg.norm(core)
        assert np.linalg.eigvalsh(core).min() >= -1e-7 * np.linalg.norm(core)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("rank", [4, 20, 60])
def test_its_mean_is_the_change_and_its_mean_error_is_foretold(kind, rank):
    """E[A'] = A and E‖A − A'‖²: over 400 seeds, within 4.5 standard errors of the mean, the same seeds in every run."""
    a, count = made(24, 18, 12, seed=3), 400
    A = whole(a)
    found = [random_projection(a, rank, torch.float64, seed, *kind) for seed in range(count)]
    deltas, errors = np.stack([delta(one) for one in found]), np.array([one.error2 for one in found])
    foretold = expected_error2(a, rank, *kind)
    assert abs(errors.mean() - foretold) < 4.5 * errors.std() / count**0.5
    assert errors.std() / count**0.5 < 0.1 * foretold  # or the line above would say little
    off = ((deltas.mean(0) - A) ** 2).sum()
    assert off < 2.5 * foretold / count  # 1 in the mean; few directions carry most, so it varies


def test_the_fourth_moment_matters():
    """Equal but for it, s = 1 and s = 100 differ by Σ ‖b_i‖²‖d_i‖²·99/r', seen where few columns carry all."""
    a = LowRank(torch.eye(6)[:, :2].double(), torch.eye(5)[:2].double())
    dense, sparse = (expected_error2(a, 3, True, s) for s in (1.0, 100.0))
    assert sparse - dense == pytest.approx(99 * 2 / 3)
    assert expected_error2(a, 3, True, 3.0) == expected_error2(a, 3) == pytest.approx((4 + 2) / 3)


@QUICK
@given(sizes, sizes, st.integers(1, 12), st.integers(1, 12), st.floats(1, 30), seeds)
def test_the_mean_error_by_counting_all_that_can_happen(n, k, r, rank, s, seed):
    """Of one row of R: x_i·x_j has the moments of its definition, entry by entry, and rows are independent."""
    a = made(n, k, r, seed)
    up, down = a.up.numpy(), a.down.numpy()
    total = 0.0
    second, fourth = 1.0, s  # E x², E x⁴ of ±√s with probability 1/s
    for i in range(r):
        for j in range(r):
            for p in range(r):
                for q in range(r):
                    pairs = sorted((i, j, p, q))
                    if pairs[0] != pairs[1] or pairs[2] != pairs[3]:
                        continue
                    moment = fourth if pairs[0] == pairs[3] else second**2
                    covariance = moment - (i == j) * (p == q)
                    total += covariance * (up[:, i] @ up[:, p]) * (down[j] @ down[q])
    assert expected_error2(a, rank, True, s) == pytest.approx(a.scale**2 * total / rank, rel=1e-9, abs=1e-9)


def test_far_worse_than_the_best():
    """42 → 4: three times as far off as the change is large, where the best leaves less than all of it."""
    a = made(320, 768, 42, power=0.0)
    best = core_of(a).factors(4, torch.float16)
    assert (expected_error2(a, 4) / best.energy) ** 0.5 == pytest.approx(3.3, rel=0.05)
    assert best.error2 < best.energy


# --- both -------------------------------------------------------------------------------------------------------------

BOTH = {"sketch": randomised, "projection": random_projection}


@pytest.mark.parametrize("way", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_formats(way, dtype):
    a = made(120, 90, 40)
    found = way(LowRank(a.up.half(), a.down.half(), -2.0), 8, dtype)
    assert found.up.dtype == found.down.dtype == dtype and found.up.shape == (120, 8) and found.down.shape == (8, 90)
    A = whole(LowRank(a.up.half(), a.down.half(), -2.0))
    assert found.error2 == pytest.approx(((A - delta(found)) ** 2).sum(), rel=1e-6)
    is_in_order(found, 0.02)
    with pytest.raises(NumericalError, match="too large"):
        way(LowRank(a.up * 1e6, a.down * 1e6), 8, torch.float16)
    with pytest.raises(NumericalError, match="NaN"):
        way(LowRank(a.up * float("nan"), a.down), 8, torch.float16)


@pytest.mark.parametrize("way", BOTH.values(), ids=BOTH)
def test_a_seed_says_all(way):
    a = made(50, 60, 30)
    first, again, other = (way(a, 4, torch.float16, seed) for seed in (3, 3, 4))
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    assert not torch.equal(first.up, other.up)


@pytest.mark.parametrize("way", BOTH.values(), ids=BOTH)
def test_a_change_of_nothing(way):
    found = way(LowRank(torch.zeros(8, 3), torch.ones(3, 7)), 2, torch.float16)
    assert (found.rank, found.error2, found.energy) == (1, 0, 0) and not found.up.any()
