"""Kronecker and entrywise products nearest to a matrix, against loops and least squares over numpy doubles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.functional import factorization

from lib_hypermerge.algebra import hadamard, kronecker
from lib_hypermerge.algebra.kronecker import Sizes
from lib_hypermerge.algebra.lowrank import Matrix
from lib_hypermerge.errors import NumericalError

QUICK = settings(derandomize=True, deadline=None, max_examples=25)
FP32, FP16 = torch.float32, torch.float16
# relative error that rounding adds: of the sums in float32, of the numbers in the output's format
ROUNDING = {FP32: 1e-4, FP16: 2e-3}
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def matrix_of(array: np.ndarray) -> Matrix:
    A = torch.from_numpy(array).float()
    return Matrix(A, float(A.double().square().sum()))


def off(A: np.ndarray, made: np.ndarray) -> float:
    """Relative error."""
    return float(np.linalg.norm(A - made) / np.linalg.norm(A))


def tail(A: np.ndarray, rank: int) -> float:
    """Relative error of the best approximation of a rank."""
    S = np.linalg.svd(A, compute_uv=False)
    return float(np.sqrt((S[rank:] ** 2).sum() / (S**2).sum()))


# --- Kronecker --------------------------------------------------------------------------------------------


def block_rows(A: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Every block of A as a row, one after another."""
    rows = []
    for i in range(sizes.u):
        for j in range(sizes.v):
            block = A[i * sizes.p : (i + 1) * sizes.p, j * sizes.w : (j + 1) * sizes.w]
            rows.append(block.flatten())
    return np.array(rows)


def product(found: kronecker.Kronecker) -> np.ndarray:
    if found.w2 is not None:
        return np.kron(found.w1.double().numpy(), found.w2.double().numpy())
    assert found.up is not None and found.down is not None
    return np.kron(found.w1.double().numpy(), (found.up.double() @ found.down.double()).numpy())


sizes_of_w1_and_w2 = st.builds(Sizes, *(st.integers(1, 5) for _ in range(4)))


class TestKronecker:
    @QUICK
    @given(sizes_of_w1_and_w2, seeds, st.sampled_from((FP32, FP16)))
    def test_a_whole_one_is_the_best(self, sizes, seed, dtype):
        """Its error is what R, the blocks as rows, has beside its first singular value."""
        A = normal(seed, sizes.u * sizes.p, sizes.v * sizes.w)
        found = kronecker.fit(matrix_of(A), [sizes], dtype)
        assert found is not None and found.w2 is not None and found.numbers == sizes.numbers
        assert found.w1.dtype == found.w2.dtype == dtype
        best = tail(block_rows(A, sizes), 1)
        assert off(A, product(found)) <= best + ROUNDING[dtype]
        assert found.error2 == pytest.approx(off(A, product(found)) ** 2 * (A**2).sum(), rel=1e-3, abs=1e-9)

    @QUICK
    @given(sizes_of_w1_and_w2, st.integers(1, 3), seeds)
    def test_one_of_low_rank_gains_by_turns(self, sizes, rank, seed):
        """Never worse than the best of all cut to the rank, and for its w1 no w2 of that rank is better."""
        A = normal(seed, sizes.u * sizes.p, sizes.v * sizes.w)
        sizes = Sizes(sizes.u, sizes.v, sizes.p, sizes.w, min(rank, sizes.p, sizes.w))
        found = kronecker.fit(matrix_of(A), [sizes], FP32)
        assert found is not None and found.up is not None and found.down is not None
        assert found.up.shape[1] == len(found.down) <= sizes.rank
        U, S, Vh = np.linalg.svd(block_rows(A, sizes), full_matrices=False)
        L, T, Rh = np.linalg.svd((S[0] * Vh[0]).reshape(sizes.p, sizes.w), full_matrices=False)
        cut = (L[:, : sizes.rank] * T[: sizes.rank]) @ Rh[: sizes.rank]
        first = off(A, np.kron(U[:, 0].reshape(sizes.u, sizes.v), cut))
        error = off(A, product(found))
        assert error <= first + ROUNDING[FP32]
        assert found.error2 == pytest.approx(error**2 * (A**2).sum(), rel=1e-3, abs=1e-9)
        w1 = found.w1.double().numpy().flatten()
        whole = (w1 @ block_rows(A, sizes) / (w1**2).sum()).reshape(sizes.p, sizes.w)
        kept = (w1**2).sum() * (np.linalg.svd(whole, compute_uv=False)[: sizes.rank] ** 2).sum()
        assert error**2 * (A**2).sum() == pytest.approx((A**2).sum() - kept, rel=1e-3, abs=1e-6)

    def test_the_sizes_that_made_a_change_are_found_among_others(self):
        w1, w2 = normal(0, 4, 4), normal(1, 12, 2) @ normal(2, 2, 8 * 9)
        A = np.kron(w1, w2)
        choices = kronecker.choices(48, 32, 9, 4 * (48 + 32 * 9))
        assert len(choices) > 2
        found = kronecker.fit(matrix_of(A), choices, FP16)
        assert found is not None and tuple(found.w1.shape) == (4, 4)
        assert off(A, product(found)) < ROUNDING[FP16]
        assert tail(A, 4) > 0.3  # what a LoRA of these bytes would miss

    @pytest.mark.parametrize("size", [1e-15, 1e15])
    def test_extreme_sizes(self, size):
        A = size * np.kron(normal(0, 2, 2), normal(1, 3, 5))
        found = kronecker.fit(matrix_of(A), [Sizes(2, 2, 3, 5)], FP32)
        assert found is not None and off(A, product(found)) < 1e-3
        with pytest.raises(NumericalError, match="too large"):
            kronecker.fit(matrix_of(1e15 * normal(0, 6, 10)), [Sizes(2, 2, 3, 5)], FP16)

    def test_a_target_out_of_reach_ends_it(self):
        matrix, choices = matrix_of(normal(0, 48, 32)), kronecker.choices(48, 32, 1, 200)
        found = kronecker.fit(matrix, choices, FP32)
        assert found is not None
        assert kronecker.fit(matrix, choices, FP32, target=0.99 * found.error2) is None
        again = kronecker.fit(matrix, choices, FP32, target=1.01 * found.error2)
        assert again is not None and torch.equal(again.w1, found.w1)

    def test_nothing_to_fit_or_to_choose(self):
        assert kronecker.fit(matrix_of(np.zeros((4, 4))), [Sizes(2, 2, 2, 2)], FP16) is None
        assert kronecker.fit(matrix_of(np.ones((4, 4))), [], FP16) is None

    def test_sides_are_split_as_lycoris_splits_them(self):
        for size in range(1, 600):
            for factor in (2, 3, 4, 8, 16, -1):
                assert kronecker.factorisation(size, factor) == tuple(factorization(size, factor)), (size, factor)

    @QUICK
    @given(st.integers(1, 400), st.integers(1, 400), st.sampled_from((1, 9)), st.integers(1, 10**5))
    def test_choices_fit_the_weight_and_the_budget(self, n, c, kernel, numbers):
        for sizes in kronecker.choices(n, c, kernel, numbers):
            assert (sizes.u * sizes.p, sizes.v * sizes.w) == (n, c * kernel)
            assert sizes.numbers <= numbers and sizes.u * sizes.v > 1
            if sizes.rank is not None:  # as many as LyCORIS keeps apart
                assert 1 <= sizes.rank < max(sizes.p, sizes.w // kernel) / 2
                assert Sizes(sizes.u, sizes.v, sizes.p, sizes.w).numbers > numbers


# --- entrywise --------------------------------------------------------------------------------------------


def entrywise(found: hadamard.Hadamard) -> np.ndarray:
    up1, down1, up2, down2 = (f.double().numpy() for f in (found.up1, found.down1, found.up2, found.down2))
    return (up1 @ down1) * (up2 @ down2)


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array).float() for array in arrays]


class TestHadamard:
    @QUICK
    @given(st.integers(4, 24), st.integers(4, 24), st.integers(1, 3), seeds, st.sampled_from((FP32, FP16)))
    def test_never_worse_than_a_lora_of_its_rank(self, n, k, rank, seed, dtype):
        A = normal(seed, n, k)
        found = hadamard.fit(matrix_of(A), rank, dtype)
        assert found is not None
        assert (found.up1.shape, found.down2.shape) == ((n, rank), (rank, k))
        assert {f.dtype for f in (found.up1, found.down1, found.up2, found.down2)} == {dtype}
        error = off(A, entrywise(found))
        assert error <= tail(A, rank) + ROUNDING[dtype]
        assert found.error2 == pytest.approx(error**2 * (A**2).sum(), rel=1e-3, abs=1e-9)

    @QUICK
    @given(st.integers(5, 12), st.integers(8, 12), st.integers(1, 3), seeds)
    def test_a_step_solves_least_squares_row_by_row(self, n, k, rank, seed):
        A = normal(seed, n, k)
        A *= np.sqrt(A.size / (A**2).sum())  # the scale that a step expects
        up, down, up2, down2 = (normal(seed + i, *s) for i, s in enumerate(((n, rank), (rank, k)) * 2, 1))
        M = up2 @ down2
        best = np.array([np.linalg.lstsq((down * M[i]).T, A[i], rcond=None)[0] for i in range(n)])
        a, b, c, d, e = tensors(A, up, down, up2, down2)
        found, loss = hadamard._solved(a, b, c, (d, e))  # noqa: SLF001
        np.testing.assert_allclose(found, best, atol=1e-2 * np.abs(best).max())
        error2 = (((best @ down) * M - A) ** 2).sum()
        assert loss == pytest.approx(error2, rel=1e-3, abs=1e-4 * A.size)
        across, its_loss = hadamard._solved(a.mT.contiguous().mT, b, c, (d, e))  # noqa: SLF001 - stored by columns
        torch.testing.assert_close(across, found, atol=1e-4, rtol=1e-3)
        assert its_loss == pytest.approx(loss, rel=1e-4)

    @QUICK
    @given(st.integers(6, 40), st.integers(6, 40), st.integers(1, 4), seeds)
    def test_no_sweep_raises_the_error(self, n, k, rank, seed):
        A = normal(seed, n, k)
        matrix = matrix_of(A * np.sqrt(A.size / (A**2).sum()))
        for start in hadamard._starts(matrix, rank, 0, "auto"):  # noqa: SLF001
            fit = hadamard._Fit(matrix.A, *start)  # noqa: SLF001
            losses = [fit.run(1) for _ in range(8)]
            for before, after in zip(losses, losses[1:], strict=False):
                assert after <= before + 1e-5 * A.size
            (up1, down1), (up2, down2) = fit.pairs
            error2 = float((matrix.A - (up1 @ down1) * (up2 @ down2)).square().sum())
            assert losses[-1] == pytest.approx(error2, rel=1e-3, abs=1e-5 * A.size)

    @pytest.mark.parametrize(("n", "k", "rank"), [(96, 64, 2), (64, 160, 4), (320, 200, 6)])
    def test_a_change_of_that_structure_is_closer_than_as_a_lora_of_the_bytes(self, n, k, rank):
        A = (normal(0, n, rank) @ normal(1, rank, k)) * (normal(2, n, rank) @ normal(3, rank, k))
        found = hadamard.fit(matrix_of(1e-3 * A), rank, FP16)
        assert found is not None
        error, lora = off(1e-3 * A, entrywise(found)), tail(A, 2 * rank)
        assert error < lora if rank > 2 else error < 1e-2  # rank 2 squared is a LoRA's 4

    def test_equal_seeds_give_equal_numbers(self):
        matrix = matrix_of(normal(0, 20, 30))
        once, again = (hadamard.fit(matrix, 3, FP16, seed=7) for _ in range(2))
        assert once is not None and again is not None
        assert torch.equal(once.up2, again.up2) and torch.equal(once.down1, again.down1)

    def test_a_target_out_of_reach_ends_it(self):
        matrix = matrix_of(normal(0, 40, 30))
        found = hadamard.fit(matrix, 3, FP16)
        assert found is not None
        assert hadamard.fit(matrix, 3, FP16, target=0.5 * found.error2) is None
        assert hadamard.fit(matrix, 3, FP16, target=1.5 * found.error2) is not None

    @pytest.mark.parametrize("size", [1e-15, 1e15])
    def test_extreme_sizes(self, size):
        A = size * (normal(0, 8, 1) @ normal(1, 1, 9)) * (normal(2, 8, 1) @ normal(3, 1, 9))
        found = hadamard.fit(matrix_of(A), 1, FP32)
        assert found is not None and off(A, entrywise(found)) < 1e-3
        with pytest.raises(NumericalError, match="too large"):
            hadamard.fit(matrix_of(1e25 * A / size), 1, FP16)

    def test_more_rank_than_there_is(self):
        A = normal(0, 3, 8)
        found = hadamard.fit(matrix_of(A), 5, FP32)
        assert found is not None and found.up1.shape == (3, 5) and off(A, entrywise(found)) < 1e-3
        assert hadamard.fit(matrix_of(np.zeros((3, 4))), 2, FP32) is None
