"""The one entry to all methods of merging, and what holds for every one of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import merging_naive as naive
import numpy as np
import pytest
import torch
from test_merging_factored import made, orthogonal, respelled, some, whole, wholes

from lib_hypermerge.algebra.factored import LowRank
from lib_hypermerge.algebra.merging.merge import merge
from lib_hypermerge.algebra.merging.methods import DENSE, DENSITY, ENERGY, FACTORED, MEAN, METHODS, PART, SEED, SUM
from lib_hypermerge.errors import NumericalError, SpecError

Terms = list[tuple[float, LowRank]]
N, K = 24, 30
DENSITY_USED, ENERGY_USED, SEED_USED = 0.4, 0.8, 11


def run(method: str, terms, **other) -> LowRank | torch.Tensor:
    return merge(method, terms, **{"density": DENSITY_USED, "seed": SEED_USED, "energy": ENERGY_USED} | other)


def dense(result: LowRank | torch.Tensor) -> np.ndarray:
    return whole(result) if isinstance(result, LowRank) else result.double().numpy()


def close(found: LowRank | torch.Tensor, expected: np.ndarray, precision: float = 1e-5) -> None:
    np.testing.assert_allclose(dense(found), expected, atol=precision * (1e-30 + np.linalg.norm(expected)))


@pytest.fixture
def terms() -> Terms:
    return some(N, K, [(1.0, 4), (-0.5, 3), (0.75, 5)], 1)


every = pytest.mark.parametrize("method", METHODS)


@every
def test_every_method_gives_what_its_definition_says(method, terms):
    expected = {
        "linear": lambda t: naive.summed(t),
        "ties": lambda t: naive.ties(t, DENSITY_USED),
        "dare": lambda t: naive.dare(t, DENSITY_USED, SEED_USED),
        "dare-ties": lambda t: naive.dare_ties(t, DENSITY_USED, SEED_USED),
        "della": lambda t: naive.della(t, DENSITY_USED, SEED_USED),
        "breadcrumbs": lambda t: naive.breadcrumbs(t, DENSITY_USED),
        "knots": lambda t: naive.knots(t, DENSITY_USED),
        "tsv": lambda t: naive.tsv(t, ENERGY_USED),
        "iso-c": lambda t: naive.iso_c(t, ENERGY_USED),
        "iso-cts": lambda t: naive.iso_cts(t, ENERGY_USED),
        "aligned": lambda t: naive.aligned(t),
        "without": lambda t: naive.without(t, ENERGY_USED),
        "shared": lambda t: naive.shared(t, ENERGY_USED),
    }
    close(run(method, terms), expected[method](wholes(terms)))


@every
def test_the_table_tells_kind_and_rank(method, terms):
    row, result = METHODS[method], run(method, terms)
    assert row.id == method and row.title and row.advice.endswith(".") and row.kind in (FACTORED, DENSE)
    assert isinstance(result, LowRank) == (row.kind == FACTORED)
    if isinstance(result, LowRank):
        assert result.up.dtype == result.down.dtype == torch.float64
        assert result.rank <= {"sum": 12, "largest": 5, "first": 4}[row.rank]
    else:
        assert result.dtype == torch.float32 and row.rank == "full"


@every
def test_the_table_tells_what_is_heeded(method, terms):
    row, once = METHODS[method], dense(run(method, terms))
    changed = {DENSITY: {"density": 0.6}, SEED: {"seed": 12}, ENERGY: {"energy": 0.3}}
    for name, other in changed.items():
        assert np.array_equal(dense(run(method, terms, **other)), once) == (name not in row.uses), name


@every
def test_the_table_tells_whether_order_counts(method, terms):
    turned = run(method, terms[::-1])
    same = np.allclose(dense(turned), dense(run(method, terms)), atol=1e-4)
    assert same == METHODS[method].symmetric


@every
@pytest.mark.parametrize("factor", [-1.0, 0.5, 3.0])
def test_weights_times_a_factor_give_the_result_times_it(method, factor, terms):
    scaled = [(factor * weight, change) for weight, change in terms]
    if METHODS[method].first_is_special:
        scaled[1:] = terms[1:]
    close(run(method, scaled), factor * dense(run(method, terms)))


@every
def test_a_term_of_no_weight_is_as_if_it_were_not_there(method, terms):
    more = [terms[0], (0.0, made(N, K, 6, 99)), *terms[1:]]
    np.testing.assert_array_equal(dense(run(method, more)), dense(run(method, terms)))


@every
def test_weights_of_none_give_nothing(method, terms):
    for given in (terms, [(1.0, torch.ones(N, K))]):
        result = run(method, [(0.0, change) for _, change in given])
        assert dense(result).shape == (N, K) and not dense(result).any()
        assert not isinstance(result, LowRank) or result.rank == 1


@every
def test_changes_that_are_zero_give_nothing(method):
    zero = LowRank(torch.zeros(N, 2, dtype=torch.float16), torch.ones(2, K, dtype=torch.float16))
    for other in (zero, torch.zeros(N, K)):
        result = run(method, [(1.0, zero), (1.0, other)])
        assert dense(result).shape == (N, K) and not dense(result).any()
        assert not isinstance(result, LowRank) or result.rank >= 1


@every
def test_one_change_alone(method):
    a = made(N, K, 4, 2)
    result = run(method, [(-1.5, a)], density=1.0, energy=None)
    if method == "shared":
        assert not dense(result).any()
    elif method in ("iso-c", "iso-cts"):
        close(result, naive.iso_c([(-1.5, whole(a))], None))
    else:
        close(result, -1.5 * whole(a))


@every
def test_equal_changes(method):
    """Their mean is the change itself, their sum is twice as strong."""
    a = made(N, K, 4, 2)
    result = run(method, [(1.0, a), (1.0, respelled(a))], density=1.0, energy=None)
    row = METHODS[method]
    if method == "without":
        assert not dense(result).any()
    elif row.strength == MEAN or method == "shared":
        close(result, whole(a), 1e-6)
    elif method in ("iso-c", "iso-cts"):
        close(result, 2 * naive.iso_c([(1.0, whole(a))], None))
    else:
        assert row.strength == SUM
        close(result, 2 * whole(a))


@every
def test_whole_matrices_do_as_well_as_factors(method, terms):
    """In place of one change, or of all; and they are left as they were."""
    wide = {"density": 1.0, "energy": None}  # nothing is decided by a hair
    expected = dense(run(method, terms, **wide))
    full = [(weight, (change.up.float() * change.scale) @ change.down.float()) for weight, change in terms]
    copies = [matrix.clone() for _, matrix in full]
    for mixed in (full, [terms[0], *full[1:]], [full[0], *terms[1:]]):
        close(run(method, mixed, **wide), expected, 1e-4)
    assert all(torch.equal(matrix, copy) for (_, matrix), copy in zip(full, copies, strict=True))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_are_taken_as_stored(method, dtype, terms):
    stored = [(w, LowRank(a.up.to(dtype), a.down.to(dtype), a.scale)) for w, a in terms]
    widened = [(w, LowRank(a.up.double(), a.down.double(), a.scale)) for w, a in stored]
    close(run(method, stored, density=1.0), dense(run(method, widened, density=1.0)))


def test_the_weighted_sum_is_exact(terms):
    assert [row.id for row in METHODS.values() if row.is_exact] == ["linear"]
    close(run("linear", terms), naive.summed(wholes(terms)), 1e-13)


@every
def test_unlike_changes(method):
    """At most as strong as all together; a part of the first at most as strong as that."""
    parts = orthogonal(60, 50, (4, 4, 4, 4))
    terms = [(1.0, part) for part in parts]
    one, together = np.linalg.norm(whole(parts[0])), np.linalg.norm(naive.summed(wholes(terms)))
    found = np.linalg.norm(dense(run(method, terms, density=1.0, energy=None)))
    assert found <= (one if METHODS[method].strength == PART else together) * (1 + 1e-6)


@pytest.mark.parametrize("other", [{"density": 0.0}, {"density": 1.5}, {"energy": 0.0}, {"energy": 2.0}])
def test_shares_out_of_bounds_are_refused(other, terms):
    with pytest.raises(SpecError):
        run("ties", terms, **other)


def test_an_unknown_method_is_refused(terms):
    with pytest.raises(SpecError, match="slerp"):
        run("slerp", terms)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(method, value, terms):
    a = made(N, K, 2, 0)
    a.up[0, 0] = value
    full = torch.zeros(N, K)
    full[1, 1] = value
    for bad in ((1.0, a), (1.0, full), (value, made(N, K, 2, 0))):
        with pytest.raises(NumericalError):
            run(method, [*terms, bad])


def test_the_table_is_read_without_torch():
    code = "import sys; from lib_hypermerge.algebra.merging import merge, methods; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
