"""Merging changes given as factors: each method against its definition on whole matrices."""

from __future__ import annotations

from collections.abc import Callable

import merging_naive as naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.factored import LowRank, norm
from lib_hypermerge.algebra.merging.aligned import aligned
from lib_hypermerge.algebra.merging.isotropic import iso_c, iso_cts
from lib_hypermerge.algebra.merging.knots import common_basis, knots
from lib_hypermerge.algebra.merging.overlap import cosine, subspace_overlap
from lib_hypermerge.algebra.merging.projection import shared, without
from lib_hypermerge.algebra.merging.singular import basis, factors_of, polar, singular
from lib_hypermerge.algebra.merging.tsv import tsv

QUICK = settings(derandomize=True, deadline=None, max_examples=40)
sizes = st.integers(2, 14)
seeds = st.integers(0, 2**32 - 1)
weights = st.floats(0.1, 2).flatmap(lambda w: st.sampled_from((w, -w)))
shapes = st.lists(st.tuples(weights, st.integers(1, 4)), min_size=1, max_size=4)  # weight and rank of each term
energies = st.sampled_from((None, 0.5, 0.9))


def made(n: int, k: int, r: int, seed: int, scale: float = 0.7) -> LowRank:
    rng = np.random.default_rng(seed)
    up, down = (torch.from_numpy(rng.standard_normal(size)) for size in ((n, r), (r, k)))
    return LowRank(up, down, scale)


def some(n: int, k: int, shape: list[tuple[float, int]], seed: int) -> list[tuple[float, LowRank]]:
    return [(weight, made(n, k, r, seed + i, 0.5 + i)) for i, (weight, r) in enumerate(shape)]


def whole(a: LowRank) -> np.ndarray:
    return a.scale * a.up.double().numpy() @ a.down.double().numpy()


def wholes(terms: list[tuple[float, LowRank]]) -> list[tuple[float, np.ndarray]]:
    return [(weight, whole(change)) for weight, change in terms]


def respelled(a: LowRank, seed: int = 0) -> LowRank:
    """The same change, split in other factors."""
    rng = np.random.default_rng(seed)
    mix = torch.from_numpy(rng.standard_normal((a.rank, a.rank)) + 3 * np.eye(a.rank))
    return LowRank(-2 * a.up @ mix, torch.linalg.solve(mix, a.down), -0.5 * a.scale)


def orthogonal(n: int, k: int, ranks: tuple[int, ...], seed: int = 0) -> list[LowRank]:
    """Changes whose columns and whose rows are all orthogonal to those of the others."""
    rng = np.random.default_rng(seed)
    U, V = (torch.from_numpy(np.linalg.qr(rng.standard_normal((size, sum(ranks))))[0]) for size in (n, k))
    S = torch.from_numpy(rng.uniform(1, 2, sum(ranks)))
    parts = zip((U * S).split(list(ranks), 1), V.mT.split(list(ranks)), strict=True)
    return [LowRank(up, down) for up, down in parts]


def same(found: LowRank, expected: np.ndarray) -> None:
    assert found.up.dtype == found.down.dtype == torch.float64
    np.testing.assert_allclose(whole(found), expected, atol=1e-8 * (1 + np.linalg.norm(expected)))


@QUICK
@given(sizes, sizes, shapes, seeds, st.sampled_from((0.2, 0.5, 1.0)))
def test_knots(n, k, shape, seed, density):
    terms = some(n, k, shape, seed)
    found = knots(terms, density)
    same(found, naive.knots(wholes(terms), density))
    assert found.rank <= min(n, sum(r for _, r in shape))


@QUICK
@given(sizes, sizes, shapes, seeds)
def test_knots_with_a_plain_sum_is_the_weighted_sum(n, k, shape, seed):
    """Which is why its merge is TIES: the common basis by itself changes nothing."""
    terms = some(n, k, shape, seed)
    U, parts = common_basis([change for _, change in terms])
    np.testing.assert_allclose(U.mT @ U, np.eye(U.shape[1]), atol=1e-12)
    for part, (_, change) in zip(parts, terms, strict=True):
        np.testing.assert_allclose(U @ part, whole(change), atol=1e-10)
    total = sum(weight * part for (weight, _), part in zip(terms, parts, strict=True))
    np.testing.assert_allclose(U @ total, naive.summed(wholes(terms)), atol=1e-10)


@QUICK
@given(sizes, sizes, shapes, seeds, energies)
def test_tsv(n, k, shape, seed, energy):
    terms = some(n, k, shape, seed)
    found = tsv(terms, energy)
    same(found, naive.tsv(wholes(terms), energy))
    assert found.rank <= sum(r for _, r in shape)


@QUICK
@given(sizes, sizes, shapes, seeds, energies, st.sampled_from(((iso_c, naive.iso_c), (iso_cts, naive.iso_cts))))
def test_isotropic(n, k, shape, seed, energy, pair):
    terms = some(n, k, shape, seed)
    found = pair[0](terms, energy)
    same(found, pair[1](wholes(terms), energy))
    S = singular(found).S
    if pair[0] is iso_c:
        np.testing.assert_allclose(S, np.full(len(S), float(S.mean())), rtol=1e-9)


@QUICK
@given(sizes, sizes, shapes, seeds)
def test_aligned(n, k, shape, seed):
    terms = some(n, k, shape, seed)
    found = aligned(terms)
    expected = naive.aligned(wholes(terms))
    close = 1e-6 * (1 + np.linalg.norm(expected))
    np.testing.assert_allclose(whole(found), expected, atol=close)
    assert found.rank == max(min(n, k, r) for _, r in shape)
    spelled = [(weight, respelled(change, i)) for i, (weight, change) in enumerate(terms)]
    np.testing.assert_allclose(whole(aligned(spelled)), expected, atol=close)


@QUICK
@given(sizes, sizes, st.integers(1, 5), seeds, st.lists(st.floats(0.1, 2), min_size=1, max_size=4))
def test_equal_changes_aligned_give_themselves(n, k, r, seed, given_weights):
    a = made(n, k, r, seed)
    found = aligned([(weight, respelled(a, i)) for i, weight in enumerate(given_weights)])
    np.testing.assert_allclose(whole(found), max(given_weights) * whole(a), atol=1e-7 * (1 + norm(a)))


def test_aligned_pairs_unlike_changes_in_order_of_size():
    """Nothing says which direction of one belongs to which of the other: still the answer is always the same."""
    a, b = orthogonal(12, 10, (3, 3))
    found = aligned([(1.0, a), (1.0, b)])
    (U, S, V), (X, T, Y) = ((part.U, part.S, part.V) for part in (singular(a), singular(b)))
    expected = ((U * S.sqrt() + X * T.sqrt()) / 2) @ ((V * S.sqrt() + Y * T.sqrt()) / 2).mT
    np.testing.assert_allclose(whole(found), expected, atol=1e-8)
    np.testing.assert_allclose(whole(aligned([(1.0, respelled(a)), (1.0, respelled(b))])), expected, atol=1e-7)


@QUICK
@given(sizes, sizes, shapes.filter(lambda shape: len(shape) > 1), seeds, energies)
def test_projections(n, k, shape, seed, energy):
    terms = some(n, k, shape, seed)
    weight, a = terms[0]
    others = [change for _, change in terms[1:]]
    for project, oracle in ((without, naive.without), (shared, naive.shared)):
        found = project(a, others, energy)
        expected = oracle(wholes(terms), energy) / weight
        np.testing.assert_allclose(whole(found), expected, atol=1e-9 * (1 + norm(a)))
        assert found.rank <= a.rank
        again = project(found, others, energy)
        np.testing.assert_allclose(whole(again), whole(found), atol=1e-9 * (1 + norm(a)))


@QUICK
@given(sizes, sizes, st.integers(1, 4), seeds)
def test_nothing_is_left_of_a_change_without_itself(n, k, r, seed):
    a = made(n, k, r, seed)
    assert norm(without(a, [respelled(a)])) == 0
    np.testing.assert_allclose(whole(shared(a, [respelled(a)])), whole(a), atol=1e-10 * (1 + norm(a)))
    assert norm(shared(a, [])) == 0
    np.testing.assert_array_equal(whole(without(a, [])), whole(a))


def test_orthogonal_changes_do_not_disturb_each_other():
    parts = orthogonal(30, 24, (3, 4, 5))
    terms = list(zip((1.0, -0.5, 2.0), parts, strict=True))
    expected = naive.summed(wholes(terms))
    same(knots(terms, 1.0), expected)
    same(tsv(terms), expected)
    for part, others in ((parts[0], parts[1:]), (parts[2], parts[:2])):
        same(without(part, others), whole(part))
        assert norm(shared(part, others)) == 0
        assert all(cosine(part, other) == pytest.approx(0, abs=1e-12) for other in others)
        assert all(subspace_overlap(part, other) == pytest.approx(0, abs=1e-12) for other in others)


def test_tsv_turns_directions_out_of_the_way_that_overlap():
    """The singular values of the result are those of all changes, as if they had been orthogonal."""
    terms = [(1.0, made(30, 24, 3, 1)), (1.0, made(30, 24, 4, 1))]
    found = np.sort(singular(tsv(terms)).S.numpy())
    np.testing.assert_allclose(found, np.sort(np.concatenate([singular(a).S.numpy() for _, a in terms])), rtol=1e-9)


def test_equal_changes_stay_one_direction_in_tsv():
    """Their columns depend on each other; made-up directions in place of what they lack would be noise."""
    a = made(20, 16, 3, 5)
    same(tsv([(1.0, a), (3.0, respelled(a))]), 2 * whole(a))


@QUICK
@given(sizes, sizes, st.integers(1, 5), st.integers(1, 5), seeds, energies)
def test_overlap(n, k, r, q, seed, energy):
    a, b = made(n, k, r, seed), made(n, k, q, seed + 1)
    A, B = whole(a), whole(b)
    expected = (A * B).sum() / np.linalg.norm(A) / np.linalg.norm(B)
    assert cosine(a, b) == pytest.approx(expected, abs=1e-12)
    (U, S, V), (X, T, Y) = naive.svd(A, energy), naive.svd(B, energy)
    mean = (np.linalg.norm(U.T @ X) ** 2 + np.linalg.norm(V.T @ Y) ** 2) / 2 / min(len(S), len(T))
    found = subspace_overlap(a, b, energy)
    assert 0 <= found <= 1 and found == pytest.approx(mean, abs=1e-10)
    assert found == pytest.approx(subspace_overlap(b, a, energy))
    assert subspace_overlap(a, respelled(a), energy) == pytest.approx(1)
    assert cosine(a, respelled(a)) == pytest.approx(1)


def test_a_zero_change_has_nothing_in_common_with_any():
    a, zero = made(6, 5, 2, 0), LowRank(torch.zeros(6, 2), torch.ones(2, 5))
    assert cosine(a, zero) == subspace_overlap(a, zero) == subspace_overlap(zero, zero) == 0


@QUICK
@given(sizes, sizes, st.integers(1, 14), seeds, st.sampled_from((1e-30, 1.0, 1e15)))
def test_singular_directions(n, k, r, seed, size):
    a = made(n, k, r, seed, size)
    found = singular(LowRank(torch.cat((a.up, a.up), 1), torch.cat((a.down, a.down)), a.scale / 2))  # half is noise
    assert len(found.S) == min(n, k, r)
    for X in (found.U, found.V):
        np.testing.assert_allclose(X.mT @ X, np.eye(len(found.S)), atol=1e-11)
    np.testing.assert_allclose((found.U * found.S) @ found.V.mT, whole(a), atol=1e-11 * norm(a))
    assert (found.U.gather(0, found.U.abs().argmax(0, keepdim=True)) > 0).all()


@QUICK
@given(sizes, sizes, st.integers(1, 14), seeds)
def test_a_whole_matrix_as_factors(n, k, r, seed):
    matrix = torch.from_numpy(whole(made(n, k, r, seed))).float()
    found = factors_of(matrix)
    assert found.rank == min(n, k, r)
    np.testing.assert_allclose(whole(found), matrix, atol=1e-6 * float(matrix.norm()))
    assert factors_of(torch.zeros(n, k)).rank == 0


@pytest.mark.parametrize("columns", [2, 5, 9])
def test_polar_factors_and_bases(columns):
    rng = np.random.default_rng(columns)
    X = rng.standard_normal((6, columns))
    X[:, -1] = X[:, 0]  # depends on another
    found = polar(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, naive.polar(X), atol=1e-9)
    rank = np.linalg.matrix_rank(X)
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False)[:rank], 1)
    U = basis([torch.from_numpy(X[:, :1]), torch.from_numpy(X[:, 1:])]).numpy()
    assert U.shape == (6, rank)
    np.testing.assert_allclose(U @ U.T @ X, X, atol=1e-9)


METHODS: list[Callable[[list[tuple[float, LowRank]]], LowRank]] = [lambda terms: knots(terms, 1.0), tsv, iso_c, iso_cts]
METHODS += [aligned, lambda terms: without(terms[0][1], [terms[1][1]])]


@pytest.mark.parametrize("method", METHODS)
def test_no_matrix_of_full_size_is_made(method, monkeypatch):
    """What is multiplied stays thin: n and k never meet in one product."""
    n, k = 61, 53
    terms = some(n, k, [(1.0, 4), (0.5, 4)], 0)
    seen = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((a.shape[0], b.shape[-1])) or plain(a, b))
    method(terms)
    assert seen and not {(n, k), (k, n), (n, n), (k, k)} & set(seen)
