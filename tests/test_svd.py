"""Truncated decompositions and stored factors against a full float64 decomposition."""

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra import svd
from lib_hypermerge.algebra.lowrank import decompose, factorise
from lib_hypermerge.errors import NumericalError

METHODS = ("exact", "randomised")
LOWS = (None, torch.bfloat16)
# error that rounding a factor to a format adds, as a share of the norm
PRECISION = {torch.float32: 2e-7, torch.float16: 6e-4, torch.bfloat16: 5e-3}


def extracted(A: torch.Tensor, rank: int, method="auto", dtype=torch.float32, low=None, seed=0):
    matrix = oracles.prepared(A, low)
    return factorise(matrix, decompose(matrix, rank, method, seed), rank, dtype)


# --- any shape, any spectrum --------------------------------------------------------------------------------


def spectrum(kind: str, m: int) -> np.ndarray:
    i = np.arange(1, m + 1, dtype=np.float64)
    return {
        "flat": np.ones(m),
        "slow": i**-0.3,
        "power": i**-0.7,
        "steep": i**-2.0,
        "exponential": 10 ** (-4 * i / m),
        "duplicated": np.ceil(i / 4) ** -1.0,
        "spikes": np.where(i <= 5, 10.0, 0.1),
        "low rank": np.where(i <= 1 + m // 4, 1.0, 0.0),
        "clusters": np.where(i <= 3, 1.0, np.where(i <= 6, 1e-3, np.where(i <= 9, 1e-6, 0.0))),
        "ill-conditioned": np.where(i <= 8, 10.0 ** -(i * 6 / 8), 0.0),
        "rank one": np.where(i <= 1, 1.0, 0.0),
    }[kind]


KINDS = ("flat", "slow", "power", "steep", "exponential", "duplicated", "spikes", "low rank", "clusters",
         "ill-conditioned", "rank one")  # fmt: skip
sizes = st.one_of(st.integers(1, 6), st.integers(7, 90))
matrices = st.builds(
    lambda n, k, kind, seed: oracles.matrix_of(n, k, spectrum(kind, min(n, k)), seed),
    sizes, sizes, st.sampled_from(KINDS), st.integers(0, 2**16),
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(A=matrices, rank=st.integers(1, 100), method=st.sampled_from(METHODS), low=st.sampled_from(LOWS),
       scale=st.sampled_from((1.0, 1e-3, 1e-20, 1e10)), cut=st.sampled_from(("none", "rows", "columns")))  # fmt: skip
def test_any_matrix(A, rank, method, low, scale, cut):
    A = A * scale
    if cut == "rows":
        A[::3] = 0
    elif cut == "columns":
        A[:, ::2] = 0
    n, k = A.shape
    factors = extracted(A, rank, method, low=low)
    assert factors.up.shape == (n, factors.rank) and factors.down.shape == (factors.rank, k)
    assert 1 <= factors.rank <= min(rank, n, k)
    assert torch.equal(factors.S, factors.S.sort(descending=True).values)
    if oracles.energy(A) == 0:
        assert oracles.error(A, factors) == factors.error2 == 0
        return
    S = oracles.singular_values(A)
    assert factors.rank <= max(1, (5e-7 * S[0] < S).sum())
    # a small matrix is nearly filled by the Krylov space; a bfloat16 copy costs a little
    tolerance = 1e-5 if method == "exact" else 0.01
    assert oracles.excess(A, factors, rank, precision=1.2e-6) < tolerance
    measured = oracles.error(A, factors)
    norm = oracles.energy(A) ** 0.5
    assert factors.error2**0.5 == pytest.approx(measured, rel=1e-3, abs=1e-9 * norm)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (2, 300), (300, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_thin_matrices(shape, method):
    A = oracles.matrix_of(*shape, np.ones(min(shape)))
    factors = extracted(A, 32, method)
    assert factors.rank == min(shape)
    assert oracles.error(A, factors) < 1e-6 * oracles.energy(A) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_gives_zero_factors(method):
    factors = extracted(torch.zeros(64, 256), 8, method, torch.float16)
    assert factors.rank == 1 and not factors.up.any() and not factors.down.any() and factors.error2 == 0


# --- the promised distance from the optimum -----------------------------------------------------------------

SHAPES = ((320, 1280), (768, 768), (1280, 2560))


def realistic(shape: tuple[int, int]) -> list[torch.Tensor]:
    """The shapes of change that fine-tuning leaves: decaying spectra, over a floor of noise or without."""
    m = min(shape)
    i = np.arange(1, m + 1, dtype=np.float64)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    spectra = [i**-0.7, i[:48] ** -0.7]
    if m < 1000:
        spectra += [i[:200] ** -0.7]
        spectra += [i**-0.5, 1 / i, np.exp(-i / 60)]
    out = []
    for seed, S in enumerate(spectra):
        A = oracles.matrix_of(*shape, S, seed)
        out.append(A if len(S) == m else A + 0.1 * A.norm() * noise / noise.norm())
    return out


@pytest.fixture(scope="module")
def fixed_set():
    """(matrix, its squared singular values) of realistic changes of three shapes."""
    return [(A, oracles.squared_singular_values(A)) for shape in SHAPES for A in realistic(shape)]


def excesses(fixed_set, rank: int, method: str, low: torch.dtype | None) -> np.ndarray:
    out = []
    for A, squares in fixed_set:
        best = np.sqrt(squares[rank:].sum())
        out.append(oracles.error(A, extracted(A, rank, method, low=low)) / best - 1)
    return np.array(out)


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize(("rank", "median", "worst"), [(32, 0.0015, 0.005), (128, 0.005, 0.015)])
def test_randomised_is_near_the_optimum(fixed_set, rank, median, worst, low):
    found = excesses(fixed_set, rank, "randomised", low)
    assert np.median(found) <= median and found.max() <= worst
    assert found.min() > -1e-6  # nothing beats the optimum; else the oracle is wrong


def test_exact_is_the_optimum(fixed_set):
    found = excesses(fixed_set[::4], 32, "exact", None)
    assert abs(found).max() < 1e-5


@pytest.mark.parametrize(("rank", "size"), [(32, (32, 2)), (32, (16, 4)), (128, (64, 3))])
def test_a_weaker_setting_misses_the_bound(fixed_set, monkeypatch, rank, size):
    monkeypatch.setattr(svd, "krylov_size", lambda r: size)
    found = excesses(fixed_set[:12], rank, "randomised", None)
    assert np.median(found) > (0.0015 if rank == 32 else 0.005)


# --- changes of exactly known rank --------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("shape", [(320, 1280), (1280, 320), (96, 96)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_a_change_of_known_rank_comes_back(shape, rank, low, method):
    A = oracles.matrix_of(*shape, np.linspace(1, 0.2, rank))
    factors = extracted(A, 32, method, low=low)
    assert factors.rank == rank
    assert oracles.error(A, factors) < 1e-6 * oracles.energy(A) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_to_the_precision_of_the_format(dtype, method):
    A = oracles.matrix_of(320, 1280, np.linspace(1, 0.2, 16))
    factors = extracted(A, 16, method, dtype)
    assert factors.up.dtype == factors.down.dtype == dtype
    assert oracles.error(A, factors) < PRECISION[dtype] * oracles.energy(A) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_small_directions_of_an_ill_conditioned_change(method):
    S = np.logspace(0, -5.5, 12)
    A = oracles.matrix_of(320, 1280, S)
    factors = extracted(A, 32, method)
    assert factors.rank == 12
    assert factors.S.numpy() == pytest.approx(S, rel=0.05)


@pytest.mark.parametrize("true_rank", [17, 20, 40, 60])
@pytest.mark.parametrize("low", LOWS)
def test_a_krylov_space_larger_than_the_rank(true_rank, low):
    A = oracles.matrix_of(320, 1280, np.linspace(1, 0.9, true_rank))
    A[50:] = 0  # leaves fewer rows than the space has directions
    A[:, 900:] = 0
    assert oracles.excess(A, extracted(A, 16, "randomised", low=low), 16) < 1e-3


# --- what is reported, order, sign, repeatability -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("method", METHODS)
def test_the_reported_error_is_that_of_the_stored_numbers(tail, dtype, method):
    A = oracles.matrix_of(320, 1280, [1.0] * 8 + [tail] * 40)
    factors = extracted(A, 8, method, dtype, low=torch.bfloat16)
    assert factors.error2 == pytest.approx(oracles.error(A, factors) ** 2, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(320, 1280), (1280, 320)])
def test_every_smaller_rank_is_near_its_own_optimum(shape, method):
    A = oracles.matrix_of(*shape, np.arange(1, 101) ** -0.7)
    factors = extracted(A, 32, method, torch.float16)
    for rank in (1, 2, 5, 8, 16, 31):
        assert oracles.error(A, factors, rank) < 1.005 * oracles.optimal_error(A, rank)
    norms = factors.up.double().norm(dim=0) * factors.down.double().norm(dim=1)
    assert norms.numpy() == pytest.approx(factors.S.numpy(), rel=0.01)
    assert factors.up.double().norm(dim=0).numpy() == pytest.approx(factors.S.sqrt().numpy(), rel=0.01)  # balanced


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(320, 1280), (1280, 320)])
@pytest.mark.parametrize("known_rank", [8, 100])
def test_the_largest_entry_of_each_up_column_is_positive(shape, method, known_rank):
    up = extracted(oracles.matrix_of(*shape, np.linspace(1, 0.1, known_rank)), 8, method, torch.float16).up.float()
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bits(method):
    A = oracles.matrix_of(320, 1280, np.arange(1, 101) ** -0.7)
    first, again = (extracted(A, 32, method, torch.float16, torch.bfloat16, seed=3) for _ in range(2))
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    other = extracted(A, 32, "randomised", torch.float16, torch.bfloat16, seed=4)
    assert not torch.equal(first.up, other.up)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low", LOWS)
def test_the_number_of_threads_does_not_matter(method, low):
    A = oracles.matrix_of(320, 1280, np.arange(1, 101) ** -0.7)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(extracted(A, 32, method, low=low))
    finally:
        torch.set_num_threads(before)
    # sums may be split differently, which moves last digits only; bf16, which has three, moves more of them
    precision = 1e-4 if low is None else 3e-4
    for other in results[1:]:
        assert other.error2 == pytest.approx(results[0].error2, rel=1e-5)
        assert other.S.numpy() == pytest.approx(results[0].S.numpy(), rel=precision)
        assert oracles.delta(other, 8) == pytest.approx(oracles.delta(results[0], 8), abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_too_large_for_the_format(method):
    A = oracles.matrix_of(320, 1280, np.ones(40)) * 1e13
    with pytest.raises(NumericalError, match="too large for float16"):
        extracted(A, 8, method, torch.float16)
    assert oracles.excess(A, extracted(A, 8, method, torch.bfloat16), 8) < 1e-3


def test_too_small_for_the_format_is_no_crash_and_is_told():
    A = oracles.matrix_of(320, 1280, np.ones(8)) * 1e-20
    factors = extracted(A, 8, dtype=torch.float16)
    assert not factors.up.any() or not factors.down.any()
    assert factors.error2 == pytest.approx(oracles.energy(A), rel=1e-6)


# --- choosing a method --------------------------------------------------------------------------------------


def test_costs_choose_a_method():
    assert svd.choose_method(1280, 11520, 32, False) == "randomised"
    assert svd.choose_method(1280, 11520, 1280, False) == "exact"
    assert svd.choose_method(4, 320, 4, False) == "exact"
    for low in (False, True):
        costs = [svd.cost(1280, 11520, r, low) for r in (1, 16, 64, 256, 1280)]
        assert costs == sorted(costs)
    assert svd.cost(1280, 11520, 32, True) < svd.cost(1280, 11520, 32, False)


def test_gaussians_depend_on_the_seed_alone():
    long, short = svd.gaussian(8, 1000, 5), svd.gaussian(8, 300, 5)
    assert torch.equal(long[:, :300], short)
    assert not torch.equal(svd.gaussian(8, 300, 6), short)
    assert abs(float(long.mean())) < 0.05 and abs(float(long.std()) - 1) < 0.05


def test_gaussians_do_not_depend_on_what_was_made_before():
    widths = (16, 100, 7, 33, 64, 600)
    found = {}
    for order in (widths, widths[::-1]):
        svd._normals.cache_clear()  # noqa: SLF001
        for width in order:
            rows = svd.gaussian(width, 200, 9)
            assert rows.shape == (width, 200)
            assert torch.equal(found.setdefault(width, rows), rows)
    assert all(torch.equal(rows, found[600][:width]) for width, rows in found.items())
    similar = found[600] @ found[600].mT / 200 - torch.eye(600)
    assert similar.abs().max() < 0.6  # no row comes twice


def test_layers_of_many_widths_share_their_gaussians():
    svd._normals.cache_clear()  # noqa: SLF001
    for width in list(range(16, 129)) * 2:
        svd.gaussian(width, 1000, 0)
    assert svd._normals.cache_info().misses == 8  # noqa: SLF001
