"""A scale folded into numbers and taken out again: which bits come back, against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.folding import fold, is_invertible, same_bits, unfold

SIXTEEN = (torch.float16, torch.bfloat16)
scales = st.fractions(min_value=Fraction(1, 320), max_value=8, max_denominator=320).filter(bool)


def every_number(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit format."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(dtype)
    return numbers[numbers.isfinite()]


@settings(derandomize=True, deadline=None, max_examples=15)
@given(st.sampled_from(SIXTEEN), scales)
def test_every_16_bit_number_comes_back_from_float32(dtype, scale):
    """But for bfloat16's smallest, which share float32's range: scaled down they fall out of it."""
    X = every_number(dtype)
    if dtype == torch.bfloat16:
        X = X[(X.float().abs() > 1e-30) & (X.float().abs() < 1e37)]
    assert is_invertible(X, float(scale), torch.float32)
    assert same_bits(unfold(fold(X, float(scale), torch.float32), float(scale), dtype), X)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(st.sampled_from(SIXTEEN), st.integers(-9, 3))
def test_powers_of_two_fold_where_nothing_falls_out_of_the_format(dtype, power):
    X, scale = every_number(dtype), 2.0**power
    ordinary = X[(X.float().abs() > 1e-1) & (X.float().abs() < 1e3)]
    assert is_invertible(ordinary, scale, dtype)
    if power < 0:
        assert not is_invertible(X, scale, dtype)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(scales, st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_a_fold_is_the_product_rounded_once(scale, numbers):
    X = torch.tensor(numbers, dtype=torch.float16)
    factor = Fraction(float(scale))
    for x, y in zip(X.tolist(), fold(X, float(scale), torch.float32).tolist(), strict=True):
        exact = Fraction(x) * factor
        neighbours = [y, *(torch.nextafter(torch.tensor(y), torch.tensor(s)).item() for s in (torch.inf, -torch.inf))]
        assert min(abs(Fraction(n) - exact) for n in neighbours) == abs(Fraction(y) - exact)


def test_float32_cannot_hold_every_scaled_float32():
    X = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert is_invertible(X, 0.25, torch.float32)
    assert not is_invertible(X, 2 / 3, torch.float32)


@pytest.mark.parametrize("scale", [0.0, -2.0])
def test_odd_scales(scale):
    X = torch.tensor([1.0, -0.0, 3.0])
    assert is_invertible(X, scale, torch.float32) == (scale != 0)
    assert is_invertible(torch.zeros(3), 0.0, torch.float32)


def test_bits_are_compared_not_values():
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
