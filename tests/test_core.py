"""The core of a product: as good as the SVD of the whole matrix, whatever its factors look like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lib_hypermerge.algebra import core, slabs
from lib_hypermerge.algebra.core import core_of, distance2
from lib_hypermerge.algebra.lowrank import LowRank, signs_of
from lib_hypermerge.errors import NumericalError

QUICK = settings(derandomize=True, deadline=None, max_examples=40)
ABOVE = 1e-5  # that an error may be above the optimum, as a share of it
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=["chosen", "gram", "qr"])
def way(request, monkeypatch):
    """How R is found: as sizes have it, by Gram matrices of the smallest factors too, or never by them."""
    smallest = {"chosen": core._SMALL, "gram": 0, "qr": 1 << 60}  # noqa: SLF001
    monkeypatch.setattr(core, "_SMALL", smallest[request.param])
    return request.param


def whole(a: LowRank) -> np.ndarray:
    return a.scale * (a.up.double().numpy() @ a.down.double().numpy())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def plain(n: int = 300, k: int = 220, r: int = 48, seed: int = 0) -> LowRank:
    """Directions that fall off slowly and mix in the factors, as in a trained LoRA."""
    falling = torch.arange(1, r + 1, dtype=torch.float64) ** -0.4
    mix = torch.linalg.qr(normal(r, r, seed=seed + 2)).Q
    return LowRank(normal(n, r, seed=seed) * falling @ mix, mix.mT * falling @ normal(r, k, seed=seed + 1), 0.7)


def conditioned(m: int, r: int, condition: float, seed: int) -> torch.Tensor:
    """(m, r) with singular values from 1 to 1/condition."""
    U, V = (torch.linalg.qr(normal(size, r, seed=seed + i)).Q for i, size in enumerate((m, r)))
    return U * torch.logspace(0, -np.log10(condition), r, dtype=torch.float64) @ V.mT


def opposed(condition: float, power: float = 0.4) -> LowRank:
    """What up makes small, down makes large: directions that fall off slowly, of factors of this condition."""
    (U, V), sizes = (torch.linalg.qr(normal(m, 48, seed=m)).Q for m in (300, 220)), torch.arange(1, 49).double()
    mix, strength = torch.linalg.qr(normal(48, 48)).Q, torch.logspace(0, -np.log10(condition), 48, dtype=torch.float64)
    return LowRank(U * strength @ mix, mix.mT / strength * sizes**-power @ V.mT)


def changed(a: LowRank, up=lambda X: X, down=lambda X: X, dtype: torch.dtype = torch.float64, scale=None) -> LowRank:
    return LowRank(up(a.up.clone()).to(dtype), down(a.down.clone()).to(dtype), a.scale if scale is None else scale)


def zeroed(X: torch.Tensor) -> torch.Tensor:
    X[:, ::5] = 0
    return X


def doubled(X: torch.Tensor) -> torch.Tensor:
    X[:, 1::2] = X[:, ::2]
    return X


def spread(sign: float):
    return lambda X: X * torch.logspace(-6 * sign, 6 * sign, 48, dtype=torch.float64)


PRODUCTS = {
    "plain": plain(),
    "float32": changed(plain(), dtype=torch.float32),
    "float16": changed(plain(), dtype=torch.float16),
    "bfloat16": changed(plain(), dtype=torch.bfloat16),
    "two formats": LowRank(plain().up.half(), plain().down, 0.7),
    "negative scale": changed(plain(), scale=-3.0),
    "tiny scale": changed(plain(), scale=1e-30),
    "rank-deficient up": changed(plain(), up=lambda X: X @ normal(48, 40, seed=7) @ normal(40, 48, seed=8)),
    "rank-deficient both": changed(
        plain(), lambda X: X @ normal(48, 40, seed=7) @ normal(40, 48, seed=8),
        lambda X: normal(48, 44, seed=9) @ normal(44, 48, seed=10) @ X,
    ),
    "up of condition 1e8": LowRank(conditioned(300, 48, 1e8, 0), plain().down),
    "down of condition 1e8": LowRank(plain().up, conditioned(220, 48, 1e8, 0).mT),
    "both of condition 1e4": LowRank(conditioned(300, 48, 1e4, 0), conditioned(220, 48, 1e4, 5).mT),
    "conditions of 1e6, opposed": opposed(1e6),
    "condition 1e8 in float32": LowRank(conditioned(300, 48, 1e8, 0).float(), plain().down.float()),
    "columns over 1e±6, rows against": changed(plain(), spread(1), lambda X: spread(-1)(X.mT).mT),
    "columns over 1e±6": changed(plain(), spread(1)),
    "rows over 1e±6": changed(plain(), down=lambda X: spread(1)(X.mT).mT),
    "equal columns": changed(plain(), doubled),
    "columns of zeros": changed(plain(), zeroed),
    "rows of zeros too": changed(plain(), zeroed, lambda X: zeroed(X.flip(0).mT).mT.flip(0)),
    "rank above both sides": LowRank(normal(40, 60), normal(60, 30, seed=1)),
    "rank above one side": LowRank(normal(300, 60), normal(60, 30, seed=1)),
    "one row": LowRank(normal(1, 5), normal(5, 200, seed=1)),
    "one column": LowRank(normal(200, 5), normal(5, 1, seed=1)),
    "rank one": LowRank(normal(20, 1), normal(1, 30, seed=1)),
}  # fmt: skip


@pytest.mark.parametrize("a", PRODUCTS.values(), ids=PRODUCTS)
def test_every_rank_is_the_best_of_any_product(a, way):
    """Against numpy's SVD of the whole matrix, whose own rounding is 50 ε of the sizes of what is added up."""
    A = whole(a)
    sizes = abs(a.scale) * float((a.up.double().norm(dim=0) * a.down.double().norm(dim=1)).sum())
    rounding = (1e-14 * sizes) ** 2
    S = np.linalg.svd(A, compute_uv=False)
    energy, found = (A**2).sum(), core_of(a)
    assert found.energy == pytest.approx(energy, rel=1e-9)
    assert found.S.shape == (min(a.rank, *A.shape),) and (found.S.diff() <= 0).all()
    np.testing.assert_allclose(found.S, S[: len(found.S)], rtol=1e-7, atol=1e-12 * S[0])
    for rank in {1, 2, 5, 8, found.rank - 3, found.rank} - {0, -1, -2}:
        made = found.factors(rank, torch.float64)
        assert made.rank == min(rank, found.rank)
        miss = ((A - made.up.numpy() @ made.down.numpy()) ** 2).sum()
        best = (S[rank:] ** 2).sum()
        assert miss <= best * (1 + ABOVE) + rounding
        assert made.error2 == pytest.approx(miss, rel=ABOVE, abs=rounding)
        lengths = made.up.norm(dim=0), made.down.norm(dim=1)
        clear = 1e-10 * S[0] < made.S
        np.testing.assert_allclose(lengths[0][clear], made.S[clear].sqrt(), rtol=1e-4)  # balanced, in order
        np.testing.assert_allclose(lengths[1][clear], made.S[clear].sqrt(), rtol=1e-4)
        assert (made.up.gather(0, made.up.abs().argmax(0, keepdim=True)) > 0).all()


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 50), st.integers(1, 50), st.integers(0, 3), seeds)
def test_small_products_of_all_shapes(n, k, r, rank, lost, seed):
    """By Gram matrices where their threshold allows it."""
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((n, r)), rng.standard_normal((r, k))
    up[:, :lost] = 0
    a, A = LowRank(torch.from_numpy(up), torch.from_numpy(down)), up @ down
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "_SMALL", 0)
        found = core_of(a)
    made = found.factors(rank, torch.float64)
    S = np.linalg.svd(A, compute_uv=False)
    assert found.rank == min(n, k, max(0, r - lost))
    miss = ((A - made.up.numpy() @ made.down.numpy()) ** 2).sum()
    assert miss <= (S[made.rank :] ** 2).sum() * (1 + ABOVE) + 1e-24 * (A**2).sum()
    assert made.error2 == pytest.approx(miss, rel=ABOVE, abs=1e-24 * (A**2).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [4, 30, None])
def test_rounded_factors_are_hardly_worse_and_measured(dtype, rank, way):
    """Rounding at random would add the square of its unit twice; it adds less than once, and no more than that."""
    a = plain()
    A = whole(a)
    made = core_of(a).factors(rank, dtype)
    assert (made.up.dtype, made.down.dtype, made.S.dtype) == (dtype, dtype, torch.float64)
    assert made.up.is_contiguous() and made.down.is_contiguous()
    miss = ((A - made.up.double().numpy() @ made.down.double().numpy()) ** 2).sum()
    best = (np.linalg.svd(A, compute_uv=False)[made.rank :] ** 2).sum()
    assert best - 1e-20 <= miss <= best + torch.finfo(dtype).eps ** 2 / 12 * 1.2 * (A**2).sum()
    assert made.error2 == pytest.approx(miss, rel=1e-6)


@pytest.mark.parametrize("product", ["plain", "equal columns", "up of condition 1e8"])
def test_ranks_of_one_core_are_those_of_many(product):
    a = PRODUCTS[product]
    found = core_of(a)
    ladder = [found.factors(rank, torch.float16) for rank in (2, 9, 5, None)]
    for made, rank in zip(ladder, (2, 9, 5, None), strict=True):
        alone = core_of(a).factors(rank, torch.float16)
        assert torch.equal(made.up, alone.up) and torch.equal(made.down, alone.down) and made.error2 == alone.error2
    assert torch.equal(ladder[1].up[:, :5], ladder[2].up)  # the first directions are those of every rank
    assert ladder[0].error2 > ladder[2].error2 > ladder[1].error2 > ladder[3].error2


# --- what would not do ------------------------------------------------------------------------------------------------


def _excess(a: LowRank, rank: int) -> float:
    A = whole(a)
    made = core_of(a).factors(rank, torch.float64)
    best = (np.linalg.svd(A, compute_uv=False)[rank:] ** 2).sum()
    return float(((A - made.up.numpy() @ made.down.numpy()) ** 2).sum() / best - 1)


def test_gram_matrices_of_nearly_dependent_columns_would_not_do(monkeypatch):
    a = opposed(1e7, power=0.01)
    monkeypatch.setattr(core, "_SMALL", 0)
    assert abs(_excess(a, 40)) < ABOVE
    monkeypatch.setattr(core, "_WORST", float("inf"))
    has_no_factor = core._cholesky(slabs.cross(a.up)) is None  # noqa: SLF001
    assert has_no_factor or _excess(a, 40) > ABOVE


def test_gram_matrices_in_float32_would_not_do(monkeypatch):
    a = opposed(1000.0)
    monkeypatch.setattr(core, "_SMALL", 0)
    assert abs(_excess(a, 40)) < ABOVE
    monkeypatch.setattr(core, "cross", lambda X: (X.float().mT @ X.float()).double())
    monkeypatch.setattr(core, "_WORST", float("inf"))
    assert _excess(a, 40) > ABOVE


def test_the_threshold_keeps_what_it_promises(monkeypatch):
    """Just below it, the columns that Cholesky's factor makes are orthonormal to 1e-6."""
    used = 0
    for condition in (10.0, 100.0, 1e3, 3e3, 1e4, 1e5):
        X = conditioned(4000, 64, condition, 1)
        R = core._cholesky(slabs.cross(X))  # noqa: SLF001
        if R is not None:
            used += 1
            Q = torch.linalg.solve_triangular(R, X, upper=True, left=False)
            assert torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(64), 2) < 1e-6
    assert 2 <= used < 6


# --- what does not fit, or is not there -------------------------------------------------------------------------------


def test_nothing_but_noise_is_nothing(way):
    a = plain()
    nothing = LowRank(torch.cat((a.up, -a.up), 1), torch.cat((a.down, a.down)))
    made = core_of(nothing).factors(5, torch.float16)
    assert core_of(nothing).rank == 0 and made.rank == 1
    assert made.error2 <= 1e-20 and not made.up.any() and made.S[0] < 1e-12 * core_of(a).S[0]
    for up, down, scale in ((0, 1, 1.0), (1, 0, 1.0), (0, 0, 1.0), (1, 1, 0.0)):
        zero = core_of(LowRank(up * a.up, down * a.down, scale))
        assert (zero.rank, zero.energy) == (0, 0)
        made = zero.factors(4)
        assert (made.rank, made.error2) == (1, 0) and not made.up.any() and made.down.isfinite().all()


def test_what_the_number_format_cannot_hold():
    big = LowRank(torch.full((3, 1), 1e6), torch.full((1, 3), 1e6))
    with pytest.raises(NumericalError, match="too large for float16"):
        core_of(big).factors(1, torch.float16)
    assert core_of(big).factors(1, torch.bfloat16).rank == 1
    up, down = torch.eye(4)[:, :3].double(), torch.eye(5)[:3].double()
    made = core_of(LowRank(up * torch.tensor([1.0, 1e-6, 1e-20]), down)).factors(3, torch.float16)
    assert made.rank == 2 and made.error2 == pytest.approx(1e-40, rel=1e-6)  # of float16, √1e-20 is zero


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
def test_numbers_that_are_none(bad, way):
    up, down = normal(200, 100), normal(100, 300)
    up[3, 4] = down[4, 5] = bad
    with pytest.raises(NumericalError, match="NaN or Inf"):
        core_of(LowRank(up, down))


# --- signs, slabs, distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_entry_decides_the_sign_and_the_first_of_equal_ones(dtype):
    up = torch.tensor([[1.0, 2.0, -3.0, 0.0, -5.0], [-2.0, 1.0, 3.0, 0.0, -5.0], [0.5, -1.0, 3.0, 0.0, 5.0]])
    assert signs_of(up.to(dtype)).tolist() == [-1.0, 1.0, -1.0, 1.0, -1.0]


@QUICK
@given(st.integers(1, 70), st.integers(1, 6), st.integers(1, 6), st.integers(1, 40), seeds)
def test_slabs_are_the_whole(m, r, p, elements, seed):
    rng = np.random.default_rng(seed)
    X, Y, C = (torch.from_numpy(rng.standard_normal(shape)) for shape in ((r, m), (m, p), (r, p)))
    X = X.half().mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "_ELEMENTS", elements * r)
        patch.setattr(slabs, "_LEAST", 1)
        cross, own = slabs.cross(X, Y), slabs.cross(X)
        made, square, against = slabs.times(X, C, torch.float32)
    wide = X.double().numpy()
    np.testing.assert_allclose(cross, wide.T @ Y.numpy(), atol=1e-12)
    np.testing.assert_allclose(own, wide.T @ wide, atol=1e-12)
    np.testing.assert_array_equal(made, (X.double() @ C).float())
    np.testing.assert_allclose(square, made.double().numpy().T @ made.double().numpy(), atol=1e-12)
    np.testing.assert_allclose(against, made.double().numpy().T @ wide, atol=1e-12)


@pytest.mark.parametrize("step", [1.0, 1e-3, 1e-7, 1e-12])
def test_distances_of_any_size(step):
    a = plain()
    b = LowRank(a.up + step * normal(*a.up.shape, seed=8), a.down * 0.5, 2 * a.scale)
    assert distance2(a, b) == pytest.approx(((whole(a) - whole(b)) ** 2).sum(), rel=1e-3 if step < 1e-9 else 1e-6)
    assert distance2(a, a) <= 1e-28 * (whole(a) ** 2).sum()


class Largest(TorchDispatchMode):
    """The most elements that any one new float64 tensor has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("dependent", [False, True])
def test_long_factors_are_never_whole_in_float64(dependent):
    a = LowRank(normal(40_000, 16).half(), normal(16, 30_000).half())
    if dependent:
        a.up[:, 8:] = a.up[:, :8]
    with Largest() as largest:
        made = core_of(a).factors(4, torch.float16)
    assert made.rank == 4
    assert largest.elements <= 1 << 17 < a.down.numel()
