"""Spectral shifts, weights in magnitude and direction, and changes made in a frequency domain."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from families_naive import dora as naive_dora
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra import dora, fourier, svdiff

QUICK = settings(derandomize=True, deadline=None, max_examples=30)
SHAPES = [(12, 8), (8, 12), (7, 4, 3, 3), (9,)]
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())


class TestSpectralShifts:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shifts_come_back_from_the_pair_they_made(self, shape):
        base = tensor(normal(0, *shape))
        S = svdiff.spectrum(base).S
        shifts = 0.1 * tensor(normal(1, *S.shape)) * S
        found, error2 = svdiff.extract(base, svdiff.change(base, shifts))
        torch.testing.assert_close(found, shifts)
        assert error2 <= 1e-14 * float(base.square().sum())

    @QUICK
    @given(st.sampled_from(SHAPES[:3]), seeds)
    def test_extracted_shifts_are_the_best(self, shape, seed):
        """No other shifts come nearer to a tuned weight, which need not be one that shifts can reach."""
        base, change = tensor(normal(seed, *shape)), tensor(normal(seed + 1, *shape))
        for dtype in (torch.float64, torch.float16):
            shifts, error2 = svdiff.extract(base, change, dtype)
            error = (svdiff.change(base, shifts) - change).norm()
            assert shifts.dtype == dtype
            assert error2 == pytest.approx(float(error) ** 2, rel=1e-9)
            for i in range(5):
                other = shifts.double() + 0.1 * tensor(normal(seed + 2 + i, *shifts.shape))
                assert error <= (svdiff.change(base, other) - change).norm() + (dtype == torch.float16) * 1e-3

    @QUICK
    @given(st.sampled_from(SHAPES[:3]), st.integers(1, 9), st.floats(-2, 2), seeds)
    def test_as_a_lora_of_the_best_rank(self, shape, rank, strength, seed):
        base = tensor(normal(seed, *shape))
        matrix = base.flatten(1).numpy()
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        shifts = normal(seed + 1, len(S)) * 2
        whole = (U * (np.maximum(S + strength * shifts, 0) - S)) @ Vh
        up, down, error2 = svdiff.to_low_rank(base, tensor(shifts), rank, strength)
        assert up.shape[1] == down.shape[0] == min(rank, len(S))
        best = (np.linalg.svd(whole, compute_uv=False)[rank:] ** 2).sum()
        assert ((whole - (up @ down).numpy()) ** 2).sum() == pytest.approx(best, abs=1e-20, rel=1e-9)
        assert error2 == pytest.approx(best, abs=1e-20, rel=1e-9)
        torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))

    @pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 3, 3, 3)])
    @pytest.mark.parametrize("lacking", [0.0, 1e-9, 1e-3])
    def test_a_decomposition_also_of_weights_that_lack_a_direction(self, shape, lacking):
        matrix = normal(0, *shape).reshape(shape[0], -1)
        U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
        S[-1] = lacking * S[0]
        weight = tensor(((U * S) @ Vh).reshape(shape))
        parts = svdiff.spectrum(weight)
        torch.testing.assert_close((parts.U * parts.S) @ parts.Vh, weight.flatten(1), atol=1e-13, rtol=1e-12)
        np.testing.assert_allclose(parts.S, S, atol=1e-14 * S[0], rtol=1e-9)
        eye = torch.eye(len(S), dtype=torch.float64)
        for orthonormal in (parts.U.mT @ parts.U, parts.Vh @ parts.Vh.mT):
            torch.testing.assert_close(orthonormal, eye, atol=1e-9, rtol=0)

    def test_float32_weights_stay_float32(self):
        base = tensor(normal(0, 6, 5)).float()
        assert svdiff.change(base, torch.ones(5, dtype=torch.float16)).dtype == torch.float32


class TestMagnitudes:
    @pytest.mark.parametrize("axis", [dora.OUTPUT, dora.INPUT])
    @pytest.mark.parametrize("shape", SHAPES[:3])
    def test_the_definition(self, shape, axis):
        V, m = normal(0, *shape), np.abs(normal(1, shape[axis])) + 0.1
        np.testing.assert_allclose(dora.recompose(tensor(V), tensor(m), axis), naive_dora(V, m, axis), rtol=1e-12)
        np.testing.assert_allclose(dora.norms(tensor(naive_dora(V, m, axis)), axis).flatten(), m, rtol=1e-12)

    @QUICK
    @given(st.sampled_from(SHAPES[:3]), st.sampled_from((0, 1)), seeds)
    def test_the_best_magnitudes(self, shape, axis, seed):
        V, tuned = tensor(normal(seed, *shape)), tensor(normal(seed + 1, *shape))
        m = dora.magnitudes(V, tuned, axis)
        error = (tuned - dora.recompose(V, m, axis)).norm()
        for i in range(5):
            other = m + 0.1 * tensor(normal(seed + 2 + i, *m.shape))
            assert error <= (tuned - dora.recompose(V, other, axis)).norm() + 1e-12

    @QUICK
    @given(st.sampled_from(((12, 8), (6, 4, 3, 3))), st.sampled_from((0, 1)), st.integers(1, 3), seeds)
    def test_a_fit_is_never_worse_than_the_change_without_magnitudes(self, shape, axis, rank, seed):
        base, tuned = tensor(normal(seed, *shape)), tensor(normal(seed, *shape) + 0.3 * normal(seed + 1, *shape))

        def truncate(change: torch.Tensor) -> torch.Tensor:
            U, S, Vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
            return ((U[:, :rank] * S[:rank]) @ Vh[:rank]).reshape(change.shape)

        fit = dora.fit(base, tuned, truncate, axis)
        assert fit is not None
        change, m = fit.V - base, fit.magnitudes
        assert torch.linalg.matrix_rank(change.flatten(1), atol=1e-9) <= rank
        error = (tuned - dora.recompose(base + change, m, axis)).norm()
        plain = truncate(tuned - base)
        once = dora.recompose(base + plain, dora.magnitudes(base + plain, tuned, axis), axis)
        assert error <= (tuned - once).norm() + 1e-9 <= (tuned - base - plain).norm() + 2e-9
        assert fit.error2 == pytest.approx(float(error) ** 2, rel=1e-9)
        assert dora.missed(fit.V, m, tuned, axis) == pytest.approx(fit.error2, rel=1e-9)
        assert dora.fit(base, tuned, truncate, axis, target=0.9 * fit.error2) is None
        plain2, first2 = float((tuned - base - plain).norm()) ** 2, float((tuned - once).norm()) ** 2
        modest = plain2 - 2 * (plain2 - first2) if plain2 > fit.error2 else plain2
        reached = dora.fit(base, tuned, truncate, axis, target=modest)
        assert (reached is not None) == (fit.error2 <= modest)

    def test_a_weight_that_was_only_rescaled_is_found_again(self):
        base = tensor(normal(0, 10, 6))
        m = tensor(np.abs(normal(1, 10)) + 0.5)
        up, down = tensor(normal(2, 10, 1)), tensor(normal(3, 1, 6))
        tuned = dora.recompose(base + 0.3 * up @ down, m, dora.OUTPUT)

        def truncate(change: torch.Tensor) -> torch.Tensor:
            U, S, Vh = torch.linalg.svd(change, full_matrices=False)
            return (U[:, :1] * S[:1]) @ Vh[:1]

        plain = (tuned - base - truncate(tuned - base)).norm()
        fit = dora.fit(base, tuned, truncate, dora.OUTPUT, steps=60)
        assert fit is not None
        assert (tuned - dora.recompose(fit.V, fit.magnitudes, dora.OUTPUT)).norm() < 0.2 * plain


class TestFrozenFoura:
    """Against scipy's transforms, applied to inputs one by one as the layer would."""

    @QUICK
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.booleans(), seeds)
    def test_cosine_form(self, n, c, r, gated, seed):
        up, down, x = normal(seed, n, r), normal(seed + 1, r, c), normal(seed + 2, c)
        gate = np.random.default_rng(seed + 3).random(r) if gated else np.ones(r)
        inside = up @ (gate * (down @ scipy.fft.dct(x, norm="ortho")))
        low = fourier.to_low_rank(tensor(up), tensor(down), tensor(gate) if gated else None, scale=0.5)
        assert low.rank == r
        made = low.scale * (low.up @ (low.down @ tensor(x)))
        np.testing.assert_allclose(made, 0.5 * scipy.fft.idct(inside, norm="ortho"), atol=1e-12)

    @QUICK
    @given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.booleans(), seeds)
    def test_fourier_form(self, n, c, r, is_complex, seed):
        up, down, x, gate = normal(seed, n, r), normal(seed + 1, r, c), normal(seed + 2, c), normal(seed + 3, r)
        if is_complex:
            up, down = up + 1j * normal(seed + 4, n, r), down + 1j * normal(seed + 5, r, c)
        inside = up @ (gate * (down @ scipy.fft.fft(x, norm="ortho")))
        low = fourier.to_low_rank(tensor(up), tensor(down), tensor(gate), "dft")
        assert low.rank == 2 * r and low.up.dtype == torch.float64
        np.testing.assert_allclose(
            low.up @ (low.down @ tensor(x)), scipy.fft.ifft(inside, norm="ortho").real, atol=1e-12
        )

    def test_sixteen_bit_factors(self):
        up, down = tensor(normal(0, 320, 4)).half(), tensor(normal(1, 4, 768)).half()
        for transform, rank in (("dct", 4), ("dft", 8)):
            low = fourier.to_low_rank(up, down, transform=transform)
            assert (low.rank, low.up.dtype) == (rank, torch.float64)

    @pytest.mark.parametrize("size", [1, 2, 7, 320])
    def test_transforms_keep_lengths(self, size):
        for matrix in (fourier.cosine_matrix(size), fourier.fourier_matrix(size)):
            eye = torch.eye(size, dtype=matrix.dtype)
            torch.testing.assert_close(matrix @ matrix.mH, eye, atol=1e-12, rtol=0)

    def test_another_transform(self):
        with pytest.raises(ValueError, match="wavelet"):
            fourier.to_low_rank(torch.ones(2, 1), torch.ones(1, 2), transform="wavelet")
