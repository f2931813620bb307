"""Merging whole matrices: each method against its definition, entry by entry, and the choice of the largest entries."""

from __future__ import annotations

import math

import merging_naive as naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.merging import magnitudes
from lib_hypermerge.algebra.merging.breadcrumbs import breadcrumbs
from lib_hypermerge.algebra.merging.dropping import dare, della
from lib_hypermerge.algebra.merging.ties import ties

QUICK = settings(derandomize=True, deadline=None, max_examples=50)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from((0.05, 0.3, 0.5, 0.9, 1.0))
weights = st.lists(st.sampled_from((-2.0, -0.5, 0.25, 1.0, 1.5)), min_size=1, max_size=4)


def some(n: int, k: int, count: int, seed: int, whole_numbers: bool = False) -> list[torch.Tensor]:
    """Random matrices; of whole numbers, many entries are equally large and many sums are zero."""
    rng = np.random.default_rng(seed)
    if whole_numbers:
        return [torch.from_numpy(rng.integers(-2, 3, (n, k)).astype(np.float32)) for _ in range(count)]
    return [torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32)) for _ in range(count)]


def terms_of(given_weights: list[float], deltas: list[torch.Tensor]) -> naive.Terms:
    return [(weight, delta.double().numpy()) for weight, delta in zip(given_weights, deltas, strict=True)]


def same(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.float32 and found.is_contiguous()
    np.testing.assert_allclose(found, expected, atol=2e-6 * (1 + abs(expected).max()))


@QUICK
@given(sizes, sizes, weights, seeds, densities, st.booleans())
def test_ties(n, k, given_weights, seed, density, whole_numbers):
    deltas = some(n, k, len(given_weights), seed, whole_numbers)
    same(ties(deltas, given_weights, density), naive.ties(terms_of(given_weights, deltas), density))


@QUICK
@given(sizes, sizes, weights, seeds, densities, st.booleans())
def test_breadcrumbs(n, k, given_weights, seed, density, whole_numbers):
    deltas = some(n * 5, k * 5, len(given_weights), seed, whole_numbers)
    same(breadcrumbs(deltas, given_weights, density), naive.breadcrumbs(terms_of(given_weights, deltas), density))


@QUICK
@given(sizes, sizes, weights, seeds, densities, st.integers(0, 2**40))
def test_dropping(n, k, given_weights, seed, density, dice):
    """The dice too are the oracle's own: the Mersenne twister falls the same on every machine."""
    deltas = some(n, k, len(given_weights), seed)
    terms = terms_of(given_weights, deltas)
    same(dare(deltas, given_weights, density, dice), naive.dare(terms, density, dice))
    same(dare(deltas, given_weights, density, dice, elect=True), naive.dare_ties(terms, density, dice))
    same(della(deltas, given_weights, density, dice), naive.della(terms, density, dice))


@QUICK
@given(sizes, sizes, weights, seeds, st.sampled_from((0.25, 0.5)), st.integers(0, 2**40))
def test_nobody_is_elected_where_the_sum_is_zero(n, k, given_weights, seed, density, dice):
    deltas = some(n, k, len(given_weights), seed, whole_numbers=True)  # with such shares their sums are precise
    terms = terms_of(given_weights, deltas)
    same(dare(deltas, given_weights, density, dice, elect=True), naive.dare_ties(terms, density, dice))


METHODS = {
    "ties": lambda deltas, given_weights: ties(deltas, given_weights, 0.4),
    "breadcrumbs": lambda deltas, given_weights: breadcrumbs(deltas, given_weights, 0.4),
    "dare": lambda deltas, given_weights: dare(deltas, given_weights, 0.4, 7),
    "dare-ties": lambda deltas, given_weights: dare(deltas, given_weights, 0.4, 7, elect=True),
    "della": lambda deltas, given_weights: della(deltas, given_weights, 0.4, 7),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("whole_numbers", [False, True])
def test_slabs_and_strides_are_of_no_account(method, whole_numbers, monkeypatch):
    deltas = some(31, 17, 3, 5, whole_numbers)
    before = [delta.clone() for delta in deltas]
    once = method(deltas, [1.0, -0.5, 2.0])
    for chunk in (1, 17, 40, 100):
        monkeypatch.setattr(magnitudes, "_CHUNK", chunk)
        assert torch.equal(method(deltas, [1.0, -0.5, 2.0]), once)
    turned = [delta.mT.contiguous().mT for delta in deltas]
    assert torch.equal(method(turned, [1.0, -0.5, 2.0]), once)
    assert all(torch.equal(delta, copy) for delta, copy in zip(deltas, before, strict=True))


def test_threads_are_of_no_account():
    deltas = some(100, 700, 3, 1)  # more than torch gives to one thread
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([method(deltas, [1.0, -0.5, 2.0]) for method in METHODS.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@QUICK
@given(st.integers(1, 400), seeds, st.floats(0.001, 1), st.booleans())
def test_exactly_as_many_as_asked_are_kept(size, seed, density, whole_numbers):
    (A,) = some(size, 3, 1, seed, whole_numbers)
    count = magnitudes.count_of(density, A.numel())
    assert 1 <= count <= A.numel() and (count == 1 or math.isclose(count, density * A.numel(), abs_tol=0.5))
    kept = magnitudes.Largest(A, count)
    found = torch.cat([kept.rows(*slab) for slab in magnitudes.slabs(*A.shape)])
    np.testing.assert_array_equal(found, naive.trimmed(A.numpy(), count))
    assert (found != 0).sum() == min(count, int((A != 0).sum()))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["plain", "plateaus", "deceptive", "steps"])
def test_the_kth_largest_of_many(share, kind, monkeypatch):
    """Against sorting, on sizes that are sampled; deceptive: whatever the sample sees is zero."""
    monkeypatch.setattr(magnitudes, "_SAMPLE", 100)
    flat = torch.randn(20011, generator=torch.Generator().manual_seed(1))
    if kind == "plateaus":
        flat = flat.mul(3).round()
    if kind == "deceptive":
        flat[:: (20011 // 100) | 1] = 0
    if kind == "steps":
        flat = torch.arange(20011).float() % 201 - 100
    count = max(1, round(share * len(flat)))
    ordered = flat.abs().sort(descending=True).values
    bound, above, equal = magnitudes.kth_largest(flat, count)
    assert bound == ordered[count - 1]
    assert above == (ordered > bound).sum() and equal == (ordered == bound).sum()


def test_what_is_dropped_is_made_up_for():
    """On average over seeds DARE is the weighted sum, and DELLA of one delta that delta."""
    deltas = some(6, 8, 2, 0)
    exact = deltas[0] - 0.5 * deltas[1]
    mean = sum(dare(deltas, [1.0, -0.5], 0.5, seed) for seed in range(2000)) / 2000
    assert float((mean - exact).norm() / exact.norm()) < 0.05
    mean = sum(della(deltas[:1], [1.0], 0.5, seed) for seed in range(2000)) / 2000
    assert float((mean - deltas[0]).norm() / deltas[0].norm()) < 0.05
    assert float((dare(deltas, [1.0, -0.5], 0.5, 0) - exact).norm() / exact.norm()) > 0.5  # one by itself is far off


def test_della_drops_small_entries_more_often_than_large_ones():
    row = torch.arange(1.0, 101.0)[None] * torch.tensor([1.0, -1.0]).repeat(50)
    kept = sum((della([row], [1.0], 0.5, seed) != 0).double() for seed in range(1000)) / 1000
    np.testing.assert_allclose(kept[0], np.linspace(0.4, 0.6, 100), atol=0.07)
    assert kept[0, -30:].mean() - kept[0, :30].mean() == pytest.approx(0.14, abs=0.02)


def test_terms_of_one_seed_are_dropped_independently():
    ones = torch.ones(200, 200)
    masks = [dare([ones] * 2, pair, 0.5, 3) != 0 for pair in ([1.0, 0.0], [0.0, 1.0])]
    assert float((masks[0] == masks[1]).double().mean()) == pytest.approx(0.5, abs=0.02)
    other = dare([ones], [1.0], 0.5, 4) != 0
    assert float((masks[0] == other).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_light_term_hardly_changes_a_heavy_one():
    a, b = some(20, 20, 2, 9)
    found = ties([a, b], [1.0, 1e-4], 1.0)
    np.testing.assert_allclose(found, a, atol=1e-3)


def test_only_one_sign_is_left():
    deltas = some(40, 40, 5, 2)
    sign = torch.stack(deltas).sum(0).sign()
    found = ties(deltas, [1.0] * 5, 1.0)
    assert (found.sign() == sign).all()
    assert float(found.norm()) < float(torch.stack(deltas).sum(0).norm())  # a mean: weaker than the sum
