"""Factors kept side by side: nothing is lost but by rounding, and the error is the one that a dense product has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.factored import LowRank, weighted_sum
from lib_hypermerge.algebra.side_by_side import rounded
from lib_hypermerge.errors import NumericalError
from lib_hypermerge.jobs.combine.changes import joined, whole

DTYPES = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def dense(a: LowRank) -> np.ndarray:
    return a.scale * (a.up.double().numpy() @ a.down.double().numpy())


@st.composite
def sums(draw) -> LowRank:
    """Of one to four products of any size and strength, with factors as files hold them."""
    n, k = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    terms = []
    for i in range(draw(st.integers(1, 4))):
        r = draw(st.integers(1, 6))
        up, down = normal(draw(st.integers(0, 999)), n, r), normal(1000 + i, r, k)
        sizes = 10.0 ** draw(st.integers(-4, 2)), 10.0 ** draw(st.integers(-4, 2))
        stored = [(X * size).to(draw(st.sampled_from(list(DTYPES)))) for X, size in zip((up, down), sizes, strict=True)]
        weight, scale = draw(st.sampled_from([0.0, -3.0, -0.3, 1e-3, 1.7])), draw(st.sampled_from([1.0, 2 / 3, 7.0]))
        terms.append((weight, LowRank(*stored, scale)))
    return weighted_sum(terms)


@given(sums(), st.sampled_from(list(DTYPES)))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_error_is_measured_as_rounded(a, dtype):
    made = rounded(a, dtype)
    goal, stored = dense(a), made.up.double().numpy() @ made.down.double().numpy()
    assert made.up.dtype == made.down.dtype == dtype and made.rank == a.rank
    size = np.linalg.norm(a.up.numpy(), axis=0) @ np.linalg.norm(a.down.numpy(), axis=1)  # of all columns
    assert made.energy == pytest.approx(np.linalg.norm(goal) ** 2, rel=1e-9, abs=1e-13 * size**2)
    true = np.linalg.norm(goal - stored) ** 2
    assert made.error2 == pytest.approx(true, rel=1e-3, abs=1e-7 * DTYPES[dtype] ** 2 * size**2)
    if dtype != torch.float16:  # whose least numbers have fewer digits
        assert true <= (2.1 * DTYPES[dtype] * size) ** 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scale_is_part_of_the_numbers(dtype):
    a = LowRank(normal(1, 6, 3), normal(2, 3, 7), 0.3)
    made = rounded(a, dtype)
    goal, stored = dense(a), made.up.double().numpy() @ made.down.double().numpy()
    assert np.linalg.norm(goal - stored) <= 2 * DTYPES[dtype] * np.linalg.norm(goal)
    assert made.error2 == pytest.approx(np.linalg.norm(goal - stored) ** 2, rel=1e-3)
    assert made.energy == pytest.approx(np.linalg.norm(goal) ** 2)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 99), st.integers(-6, 6), st.sampled_from([torch.float16, torch.bfloat16]))
def test_powers_of_two_round_nothing(seed, power, dtype):
    up, down = (1 + normal(seed, 6, 3).abs()).to(dtype), (1 + normal(seed + 1, 3, 7).abs()).to(dtype)
    made = rounded(weighted_sum([(-(2.0**power), LowRank(up, down, 0.5))]), dtype)
    assert made.error2 == 0
    goal = -(2.0 ** (power - 1)) * up.double() @ down.double()
    torch.testing.assert_close(made.up.double() @ made.down.double(), goal)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 99), st.floats(1e-7, 1e7))
def test_what_one_factor_alone_could_not_hold(seed, size):
    """fp16 ends at 65504 and begins at 6e-8: columns and rows meet in the middle."""
    a = LowRank(normal(seed, 8, 2) * size, normal(seed + 1, 2, 9) / size)
    made = rounded(a, torch.float16)
    error = np.linalg.norm(dense(a) - made.up.double().numpy() @ made.down.double().numpy())
    assert error < 4e-3 * np.linalg.norm(dense(a))


def test_what_both_together_cannot_hold():
    with pytest.raises(NumericalError):
        rounded(LowRank(torch.full((2, 1), 1e6).double(), torch.full((1, 2), 1e6).double()), torch.float16)


def test_nothing_at_all():
    made = rounded(LowRank(torch.zeros(3, 2).double(), normal(0, 2, 4)), torch.float16)
    assert made.error2 == made.energy == 0 and not made.up.any()


# --- rows of a layer --------------------------------------------------------------------------------------------------


@st.composite
def rows(draw):
    """(pieces, n, k): changes of some rows each, which do not overlap; factors or matrices, downs shared or not."""
    k, start, pieces = draw(st.integers(1, 8)), 0, []
    downs = [normal(i, r, k).half() for i, r in enumerate((1, 2, 2))]
    for i in range(draw(st.integers(1, 5))):
        start += draw(st.integers(0, 2))
        height = draw(st.integers(1, 4))
        if draw(st.integers(0, 4)) == 0:
            change = normal(i, height, k).float()
        else:
            down = draw(st.sampled_from(downs))
            change = LowRank(normal(50 + i, height, len(down)).half(), down, draw(st.sampled_from([1.0, -0.5, 3.0])))
        pieces.append((slice(start, start + height), change))
        start += height
    return pieces, start + draw(st.integers(0, 2)), k


@settings(deadline=None, derandomize=True)
@given(rows())
def test_rows_are_put_together(given_rows):
    pieces, n, k = given_rows
    goal = np.zeros((n, k))
    for place, change in pieces:
        goal[place] = dense(change) if isinstance(change, LowRank) else change.double().numpy()
    made = joined(pieces, n, k)
    found = dense(made) if isinstance(made, LowRank) else made.double().numpy()
    np.testing.assert_allclose(found, goal, atol=1e-5)
    np.testing.assert_allclose(whole(made).double().numpy(), goal, atol=1e-4)
    lows = [change for _, change in pieces if isinstance(change, LowRank)]
    assert isinstance(made, LowRank) == (len(lows) == len(pieces))
    if isinstance(made, LowRank):
        assert made.rank == sum({id(low.down): low.rank for low in lows}.values())  # one down counts once
