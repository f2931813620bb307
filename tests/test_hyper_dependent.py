"""LoRAs beyond what there is: more than directions, ranks beyond a layer's size, sizes beyond a model's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hyper_families import gradual, hyper, lora_files
from test_hyper_solver import METHODS, QUICK, family, problem_of

from lib_hypermerge.algebra.hyper.allocation import plan_ranks
from lib_hypermerge.algebra.hyper.finish import Fit, fit
from lib_hypermerge.algebra.hyper.problem import Solution
from lib_hypermerge.algebra.hyper.solve import solve

SHAPES = ((3, 40, 40), (2, 40, 5), (2, 6, 40), (1, 7, 7))


def layers_of(models: int, seed: int = 1) -> list[np.ndarray]:
    return [family(seed + i, models, *shape, 3, 0.7) for i, shape in enumerate(SHAPES)]


def fits(layers: list[np.ndarray], solution: Solution, dtype: torch.dtype) -> list[tuple[torch.Tensor, Fit]]:
    """Per layer (‖E_m‖², what the last step makes of the downs rounded to dtype), products as float32 has them."""
    out = []
    ends = np.cumsum(solution.rooms)
    for g, C in enumerate(layers):
        for layer, E in enumerate(torch.from_numpy(C.astype(np.float32))):
            own = solution.ranks[g][layer].tolist()
            rows = [
                solution.downs[g][layer, e - r : e - r + n] for e, r, n in zip(ends, solution.rooms, own, strict=True)
            ]
            kept = [i for i, down in enumerate(rows) if len(down)]
            downs = [rows[i].to(dtype) for i in kept]
            energies = E.double().square().sum((1, 2))
            products = E @ torch.cat([down.float() for down in downs]).mT
            out.append((energies, fit(products, downs, solution.multipliers[:, kept], energies, dtype)))
    return out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("models", "ranks"),
    [(2, (4, 4)), (2, (32, 16)), (3, (4, 4, 4)), (3, (9, 9, 9, 9)), (3, (40, 8)), (4, (12, 8, 8, 4)), (4, (8,) * 7)],
)
def test_loras_are_small_and_as_close_in_fp16_as_in_fp32(method, models, ranks) -> None:
    layers = layers_of(models)
    solution = solve(problem_of(*layers), ranks, method, QUICK)
    shares = []
    for dtype in (torch.float32, torch.float16):
        found = fits(layers, solution, dtype)
        for energies, made in found:
            assert (made.gram.diagonal().sqrt() <= 12 * energies.sum().sqrt()).all()
            assert all(up.isfinite().all() for up in made.ups)
        shares.append(float(sum(made.errors.sum() for _, made in found) / sum(e.sum() for e, _ in found)))
    exact, rounded = shares
    assert exact <= solution.loss[-1] * (1 + 1e-5) + 1e-6
    assert rounded <= exact * 1.01 + 1e-6


def test_ups_that_are_well_told_apart_are_those_of_exact_least_squares() -> None:
    rng = np.random.default_rng(3)
    E, multipliers = rng.standard_normal((4, 12, 20)), rng.standard_normal((4, 2))
    downs = [rng.standard_normal((3, 20)), 1e-3 * rng.standard_normal((5, 20))]
    stacked = np.concatenate([multipliers[:, i, None, None] * A for i, A in enumerate(downs)], 1)  # (M, Σr, k)
    wide = np.concatenate(list(stacked), 1)  # all models beside each other
    right = np.concatenate(list(E), 1)
    expected = np.linalg.lstsq(wide.T, right.T, rcond=None)[0].T
    error = np.square(right - expected @ wide).sum()
    tensors = [torch.from_numpy(A) for A in downs]
    products = torch.from_numpy(E) @ torch.from_numpy(np.concatenate(downs)).mT
    energies = torch.from_numpy(np.square(E).sum((1, 2)))
    made = fit(products, tensors, torch.from_numpy(multipliers), energies, torch.float64)
    np.testing.assert_allclose(torch.cat(made.ups, 1).numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert float(made.errors.sum()) == pytest.approx(error, rel=1e-9)


def test_two_equal_downs_share_what_there_is() -> None:
    A = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    E = torch.stack([torch.eye(8)[:, :3] @ A, -torch.eye(8)[:, :3] @ A])
    ones = torch.tensor([[1.0, 1], [-1, -1]], dtype=torch.float64)
    made = fit(E @ torch.cat([A, A]).mT, [A, A], ones, E.double().square().sum((1, 2)), torch.float32)
    for up in made.ups:
        torch.testing.assert_close(up, torch.eye(8)[:, :3] / 2, rtol=0, atol=1e-3)
    assert float(made.errors.sum()) < 1e-5


def test_a_size_buys_no_more_loras_than_directions_and_no_more_ranks_than_there_are() -> None:
    layers = layers_of(3)
    problem = problem_of(*layers)
    for numbers in (500, 2000, 5000, 10**5, 10**9):
        ranks = plan_ranks(problem, numbers, None, QUICK)
        assert len(ranks) <= 2 and max(ranks) <= 40
        taken = sum(int(g.costs[g.most == m].sum()) * min(r, int(m)) for r in ranks for g in problem.groups
                    for m in g.most.unique())  # fmt: skip
        assert taken <= numbers
    assert ranks == (40, 40)
    assert len(plan_ranks(problem, 10**9, 3, QUICK)) == 3
    assert sum(plan_ranks(problem, 3000, 2, QUICK, beside=500)) < sum(plan_ranks(problem, 3000, 2, QUICK))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return gradual(3, K=2, own=0.5, divisor=64, rests=0.02).save(tmp_path_factory.mktemp("models"), torch.float16)


def test_all_files_together_keep_to_the_size(tmp_path, models) -> None:
    for number, size in enumerate((0.15, 0.4, 60)):
        folder = tmp_path / str(number)
        answer = hyper(models, folder, "--size", size, "--iterations", 20)
        files = lora_files(folder, answer)
        assert sum(path.stat().st_size for path in files.values()) <= size * 2**20
        assert len(files) <= 2
    assert any("MiB are enough" in warning for warning in answer["warnings"])


@pytest.mark.parametrize(
    "options", [("--ranks", "64,32"), ("--ranks", "8,8", "--solver", "greedy"), ("--ranks", "4,4,4")]
)
def test_two_models_share_their_difference(tmp_path, models, options) -> None:
    answer = hyper(models[:2], tmp_path, *options)
    if options[1] != "64,32":  # there the first leaves nothing
        assert all(one["share"] > 0.005 for one in answer["loras"])
    assert answer["residual_share"] == pytest.approx(answer["loss"][-1], rel=0.05, abs=1e-4)
