"""Subspaces of weights and what is projected on them: against whole matrices and full SVDs in float64 of numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.factored import LowRank
from lib_hypermerge.algebra.transfer.methods import cross, lora_x, prolora
from lib_hypermerge.algebra.transfer.order import in_order, spread
from lib_hypermerge.algebra.transfer.subspace import Directions, directions, similarity

QUICK = settings(derandomize=True, deadline=None, max_examples=30)
sizes = st.integers(2, 16)
seeds = st.integers(0, 2**32 - 1)
shares = st.sampled_from((0.05, 0.5, 0.8, 0.95, 1.0))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def orthonormal(n: int, r: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(random(n, r, seed=seed))[0]


def tensor(A: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(A))


def leading(W: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the leading directions on both sides, by a full SVD."""
    U, S, Vh = np.linalg.svd(W, full_matrices=False)
    held = np.cumsum(S**2) / np.sum(S**2)
    r = 1 + int(np.searchsorted(held, share * (1 - 1e-12)))
    return U[:, : min(r, len(S))], Vh[: min(r, len(S))].T


def spanned(W: np.ndarray, share: float) -> Directions:
    """The library's, only those of the share."""
    found = directions(tensor(W), share)
    return found.first(found.count(share))


def low(n: int, k: int, r: int = 3, seed: int = 5) -> LowRank:
    return LowRank(tensor(random(n, r, seed=seed)), tensor(random(r, k, seed=seed + 1)), 0.7)


def whole(change: LowRank) -> np.ndarray:
    return change.scale * change.up.double().numpy() @ change.down.double().numpy()


# --- directions -----------------------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, seeds, shares)
def test_directions_are_those_of_the_svd(n, k, seed, share):
    W = random(n, k, seed=seed)
    found = directions(tensor(W), share)
    np.testing.assert_allclose(found.S.numpy(), np.linalg.svd(W, compute_uv=False), atol=1e-7)
    count = found.count(share)
    for mine, theirs in zip((found.U[:, :count], found.V[:, :count]), leading(W, share), strict=True):
        basis = mine.numpy()
        assert basis.shape == theirs.shape
        np.testing.assert_allclose(basis.T @ basis, np.eye(count), atol=1e-6)
        np.testing.assert_allclose(basis @ basis.T, theirs @ theirs.T, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_float32_weights_of_low_rank_have_as_many_directions(shape):
    W = (random(shape[0], 4, seed=1) @ random(4, shape[1], seed=2)).astype(np.float32)
    found = directions(tensor(W), 1.0)
    assert found.U.shape == (shape[0], 4) and found.V.shape == (shape[1], 4)
    np.testing.assert_allclose((found.U * found.S[:4].float()) @ found.V.T, W, atol=1e-4)


def test_a_weight_of_zeros_has_no_directions():
    found = directions(torch.zeros(3, 5), 0.9)
    assert found.U.shape == (3, 0) and found.V.shape == (5, 0) and found.count(0.9) == 0
    assert similarity(found, directions(torch.ones(3, 5), 0.9)) is None


# --- similarity -----------------------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, seeds)
def test_a_weight_is_as_similar_to_itself_as_can_be(n, k, seed):
    found = directions(tensor(random(n, k, seed=seed)), 0.9)
    value = similarity(found, found)
    assert value is None or value == pytest.approx(1, abs=1e-6)


@QUICK
@given(st.integers(6, 16), st.integers(6, 16), seeds, seeds)
def test_similarity_is_the_formula_on_whole_bases(n, k, a, b):
    Ws, Wt = random(n, k, seed=a), random(n, k, seed=b)
    bases = [leading(W, 0.5) for W in (Ws, Wt)]
    r = min(bases[0][0].shape[1], bases[1][0].shape[1])
    expected = []
    for left, right, size in zip(*bases, (n, k), strict=True):
        phi = np.linalg.norm(left[:, :r].T @ right[:, :r]) ** 2 / r
        expected.append((phi - r / size) / (1 - r / size))
    one, other = (directions(tensor(W), 0.9) for W in (Ws, Wt))
    assert similarity(one, other) == pytest.approx(np.mean(expected), abs=1e-6)
    assert similarity(other, one) == pytest.approx(similarity(one, other), abs=1e-9)


def test_unrelated_weights_are_about_0_and_turned_ones_what_the_angle_says():
    values = [similarity(*(directions(tensor(random(24, 40, seed=2 * i + j)), 0.5) for j in (0, 1))) for i in range(30)]
    assert abs(np.mean([value for value in values if value is not None])) < 0.02
    n, r, θ = 20, 4, 0.4
    frame = orthonormal(n, 2 * r, seed=1)
    A, B = frame[:, :r], frame[:, r:]
    V, S = orthonormal(30, r, seed=2), np.array([2.0, 1.9, 1.8, 1.7])
    source, target = A * S @ V.T, (math.cos(θ) * A + math.sin(θ) * B) * S @ V.T
    one, other = directions(tensor(source), 1.0), directions(tensor(target), 1.0)
    used = one.count(0.5)
    left = (math.cos(θ) ** 2 - used / n) / (1 - used / n)
    assert similarity(one, other) == pytest.approx((left + 1) / 2, abs=1e-9)


def test_sides_of_unequal_size_say_nothing():
    W = random(8, 12)
    one, wider, other = (directions(tensor(A), 0.5) for A in (W, np.hstack([W, 0 * W]), random(9, 13)))
    assert similarity(one, wider) == pytest.approx(1, abs=1e-9)  # by the left side alone
    assert similarity(one, other) is None


# --- methods, of equal size -----------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, seeds, shares)
def test_lora_x_is_the_nearest_within_the_targets_directions(n, k, seed, share):
    W, change = random(n, k, seed=seed), low(n, k)
    U, V = leading(W, share)
    X, made = whole(change), whole(lora_x(change, spanned(W, share)))
    np.testing.assert_allclose(made, U @ U.T @ X @ V @ V.T, atol=1e-5)
    other = U @ random(U.shape[1], V.shape[1], seed=seed) @ V.T  # any other change within them
    assert np.linalg.norm(X - made) <= np.linalg.norm(X - other) + 1e-9
    # so for a true change within them, projecting is never worse than copying
    assert np.linalg.norm(made - other) <= np.linalg.norm(X - other) + 1e-6


@QUICK
@given(sizes, sizes, seeds, shares)
def test_prolora_is_the_formula_on_whole_projections(n, k, seed, share):
    Ws, Wt, change = random(n, k, seed=seed), random(n, k, seed=seed + 1), low(n, k)
    sides = []
    for source, target, size in zip(leading(Ws, share), leading(Wt, share), (n, k), strict=True):
        Ps, Pt, all_of_it = source @ source.T, target @ target.T, np.eye(size)
        sides.append(Pt @ Ps + (all_of_it - Pt) @ (all_of_it - Ps))
    made = prolora(change, spanned(Ws, share), spanned(Wt, share))
    assert made.rank == change.rank
    np.testing.assert_allclose(whole(made), sides[0] @ whole(change) @ sides[1].T, atol=1e-5)


@QUICK
@given(sizes, sizes, seeds, shares)
def test_prolora_between_models_of_the_same_directions_is_copying(n, k, seed, share):
    W, change = random(n, k, seed=seed), low(n, k)
    found = spanned(W, share)
    turned = Directions(-found.U, -found.V, found.S)  # signs are arbitrary
    np.testing.assert_allclose(whole(prolora(change, found, turned)), whole(change), atol=1e-6)


@QUICK
@given(st.floats(0.01, 1.5), st.floats(0.01, 1.5), seeds)
def test_prolora_turns_with_the_target_and_beats_copying(left, right, seed):
    """A target whose leading directions are the source's, turned by known angles: the true change turns with them.
    ProLoRA gives it but for a factor, the cosines; copying is off by the chords."""
    n, k, r = 14, 18, 4
    sides, frames = [], []
    for size, θ, own in ((n, left, seed), (k, right, seed + 1)):
        frame = orthonormal(size, 2 * r, seed=own)
        A, B = frame[:, :r], frame[:, r:]
        c, s = math.cos(θ), math.sin(θ)
        rotation = np.eye(size) + (c - 1) * (A @ A.T + B @ B.T) + s * (B @ A.T - A @ B.T)
        sides.append(rotation)
        frames.append((frame, A))
    S = np.array([3.0, 2.5, 2.0, 1.5])
    Ws = frames[0][1] * S @ frames[1][1].T
    Wt = sides[0] @ Ws @ sides[1].T
    core = random(2 * r, 2 * r, seed=seed)
    X = frames[0][0] @ core @ frames[1][0].T
    change = LowRank(tensor(X), torch.eye(k, dtype=torch.float64))
    truth = sides[0] @ X @ sides[1].T
    made = whole(prolora(change, spanned(Ws, 1.0), spanned(Wt, 1.0)))
    np.testing.assert_allclose(made, math.cos(left) * math.cos(right) * truth, atol=1e-6)
    if max(left, right) < 1:
        assert np.linalg.norm(made - truth) < np.linalg.norm(X - truth)


def test_float32_directions_are_as_good_as_float32_is():
    Ws, Wt, change = (random(40, 60, seed=i) for i in (1, 2, 3))
    factors = LowRank(torch.eye(40), tensor(change).float(), 0.5)
    sources = [directions(tensor(W).float(), 0.9) for W in (Ws, Wt)]
    found = [d.first(d.count(0.9)) for d in sources]
    exact = [spanned(W, 0.9) for W in (Ws, Wt)]
    precise = LowRank(torch.eye(40).double(), tensor(change), 0.5)
    for mine, theirs in (
        (lora_x(factors, found[1]), lora_x(precise, exact[1])),
        (prolora(factors, *found), prolora(precise, *exact)),
    ):
        assert np.linalg.norm(whole(mine) - whole(theirs)) < 1e-4 * np.linalg.norm(whole(theirs))


# --- cross, of unequal size -----------------------------------------------------------------------------------


@QUICK
@given(sizes, sizes, seeds, shares)
def test_cross_of_equal_sizes_is_lora_x(n, k, seed, share):
    source, target = (spanned(random(n, k, seed=seed + i), share) for i in (0, 1))
    if source.U.shape[1] < target.U.shape[1]:
        target = target.first(source.U.shape[1])
    np.testing.assert_allclose(whole(cross(low(n, k), source, target)), whole(lora_x(low(n, k), target)), atol=1e-9)


@pytest.mark.parametrize("spectrum", ["falling", "flat"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cross_follows_a_side_that_grew_by_a_known_map(side, spectrum):
    """The other side settles signs, and which of equal singular values is which."""
    n, k, wider = 8, 11, 17
    U, V = orthonormal(n, n, seed=1), orthonormal(k, n, seed=2)
    S = np.linspace(3, 1, n) if spectrum == "falling" else np.ones(n)
    Ws = U * S @ V.T
    if side == "right":
        T = orthonormal(wider, k, seed=3)
        Wt, expected = Ws @ T.T, lambda X: X @ V @ V.T @ T.T
    else:
        T = orthonormal(wider, n, seed=3)
        Wt, expected = T @ Ws, lambda X: T @ X @ V @ V.T
    change = low(n, k)
    made = cross(change, spanned(Ws, 1.0), spanned(Wt, 1.0))
    np.testing.assert_allclose(whole(made), expected(whole(change)), atol=1e-6)


def test_cross_follows_a_model_that_was_widened_by_rows_and_columns_of_zeros():
    """Where both sides differ only the rule of signs is left: it holds where the vectors keep their entries."""
    n, k = 7, 9
    Ws = random(n, k, seed=4) + 0.3
    rows, columns = [0, 2, 3, 5, 8, 9, 11], [1, 2, 3, 5, 6, 8, 10, 12, 13]
    Wt, expected, change = np.zeros((12, 14)), np.zeros((12, 14)), low(n, k)
    V = leading(Ws, 1.0)[1]
    Wt[np.ix_(rows, columns)] = Ws
    expected[np.ix_(rows, columns)] = whole(change) @ V @ V.T
    np.testing.assert_allclose(whole(cross(change, spanned(Ws, 1.0), spanned(Wt, 1.0))), expected, atol=1e-6)


@QUICK
@given(sizes, sizes, sizes, sizes, seeds, shares)
def test_cross_never_lengthens(n, k, n2, k2, seed, share):
    change = low(n, k)
    made = cross(change, spanned(random(n, k, seed=seed), share), spanned(random(n2, k2, seed=seed + 1), share))
    assert made.up.shape[0] == n2 and made.down.shape[1] == k2
    assert np.linalg.norm(whole(made)) <= np.linalg.norm(whole(change)) * (1 + 1e-6)


# --- which block is which -------------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 5), st.integers(1, 6), seeds)
def test_blocks_are_paired_in_order_as_well_as_can_be(targets, sources, seed):
    table = random(targets, sources, seed=seed)
    found = in_order(table.tolist())
    pairs = [(t, s) for t, s in enumerate(found) if s is not None]
    assert len(pairs) == min(targets, sources)
    assert all(a < b for (_, a), (_, b) in itertools.pairwise(pairs))
    fewer = min(targets, sources)
    best = max(
        sum(table[t, s] for t, s in zip(ts, ss, strict=True))
        for ts in itertools.combinations(range(targets), fewer)
        for ss in itertools.combinations(range(sources), fewer)
    )
    assert sum(table[t, s] for t, s in pairs) == pytest.approx(best)


def test_of_equal_pairings_the_first_blocks_are_taken():
    assert in_order([[1.0] * 4, [1.0] * 4]) == [0, 1]
    assert in_order([]) == []


@pytest.mark.parametrize(("targets", "sources"), [(a, b) for a in range(1, 9) for b in range(1, 9)])
def test_blocks_that_cannot_be_compared_are_spread(targets, sources):
    found = [s for s in spread(targets, sources) if s is not None]
    assert len(found) == min(targets, sources) and all(a < b for a, b in itertools.pairwise(found))
    if 1 < targets <= sources:
        assert (found[0], found[-1]) == (0, sources - 1)
