"""The solver of Hyper-Merge on cores, against the definition written out in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.hyper import sample, sweep
from lib_hypermerge.algebra.hyper.allocation import plan_ranks
from lib_hypermerge.algebra.hyper.problem import Cores, Problem, Settings, Solution
from lib_hypermerge.algebra.hyper.solve import solve

METHODS = ("joint", "greedy", "directions")
QUICK = Settings(iterations=40)


def problem_of(*groups: np.ndarray, outside: float = 0.0) -> Problem:
    """groups: (L, M, p, q). outside: energy of each model that the cores do not hold."""
    gram = sum(np.einsum("lmpq,lnpq->mn", C, C) for C in (g.astype(np.float64) for g in groups))
    gram = gram + outside * np.eye(len(gram))
    cores = [
        Cores(
            torch.from_numpy(C.astype(np.float32)),
            torch.full((len(C),), C.shape[2] + C.shape[3]),
            torch.full((len(C),), min(C.shape[2:])),
        )
        for C in groups
    ]
    return Problem(cores, torch.from_numpy(gram), float(np.trace(gram)))


def family(
    seed: int, models: int, layers: int, p: int, q: int, shared: int, decay: float, own: float = 0.5
) -> np.ndarray:
    """(L, M, p, q), centred: models that mix shared changes of decaying spectra, and each a change of its own."""
    rng = np.random.default_rng(seed)
    s = np.arange(1, min(p, q) + 1) ** -decay

    def change() -> np.ndarray:
        U, _, Vt = np.linalg.svd(rng.standard_normal((layers, p, q)), full_matrices=False)
        return (U * s) @ Vt

    mix = rng.standard_normal((models, shared)) * 0.85 ** np.arange(shared)
    common = np.stack([change() for _ in range(shared)])
    C = np.einsum("mk,klpq->lmpq", mix, common) + own * shared**0.5 * np.stack([change() for _ in range(models)], 1)
    return C - C.mean(1, keepdims=True)


def parts_of(solution: Solution, g: int) -> np.ndarray:
    """(L, K, p, q) float64: the LoRAs of a group."""
    ups, downs = solution.ups[g].double().numpy(), solution.downs[g].double().numpy()
    ends = np.cumsum(solution.rooms)
    return np.stack([ups[:, :, e - r : e] @ downs[:, e - r : e] for e, r in zip(ends, solution.rooms, strict=True)], 1)


def share_of(problem: Problem, solution: Solution) -> float:
    """The residual share by its definition, in float64."""
    multipliers = solution.multipliers.numpy()
    left, held = 0.0, 0.0
    for g, cores in enumerate(problem.groups):
        C = cores.values.double().numpy()
        left += np.square(C - np.einsum("mk,lkpq->lmpq", multipliers, parts_of(solution, g))).sum()
        held += np.square(C).sum()
    return float((left + problem.energy - held) / problem.total)


def truncated(X: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(X, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vt[..., :rank, :]


def greedy_by_definition(C: np.ndarray, ranks: tuple[int, ...], seed: int, iterations: int = 100) -> float:
    """The published loop on centred differences from the best of three random starts: its residual share."""
    rng, E = np.random.default_rng(seed), C.astype(np.float64)
    energy = np.square(E).sum()
    for rank in ranks:
        found = []
        for _ in range(3):
            lam, last = rng.standard_normal(C.shape[1]), np.inf
            for _ in range(iterations):
                D = truncated(np.einsum("m,lmpq->lpq", lam, E) / (lam @ lam), rank)
                lam = np.einsum("lmpq,lpq->m", E, D) / np.square(D).sum()
                loss = np.square(E - lam[:, None, None] * D[:, None]).sum()
                if last - loss < 1e-7 * loss:
                    break
                last = loss
            found.append((loss, E - lam[:, None, None] * D[:, None]))
        E = min(found, key=lambda item: item[0])[1]
    return float(np.square(E).sum() / energy)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    models=st.integers(2, 5),
    shape=st.tuples(st.integers(1, 4), st.integers(5, 16), st.integers(5, 16)),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.4, 0.8, 1.5]),
    shared=st.integers(1, 4),
)
def test_joint_is_never_above_greedy(seed, models, shape, ranks, decay, shared) -> None:
    C = family(seed, models, *shape, shared, decay)
    problem, ranks = problem_of(C), tuple(ranks)
    joint = solve(problem, ranks, "joint", QUICK)
    greedy = solve(problem, ranks, "greedy", QUICK)
    assert joint.loss[-1] <= greedy.loss[-1] + 1e-7
    assert joint.loss[-1] <= greedy_by_definition(C, ranks, seed) + 1e-6


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    models=st.integers(2, 5),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    method=st.sampled_from(METHODS),
    allocate=st.booleans(),
)
def test_the_loss_reported_is_that_of_the_factors_and_never_rises(seed, models, ranks, method, allocate) -> None:
    groups = [family(seed, models, 3, 8, 6, 2, 0.8), family(seed + 1, models, 2, 5, 9, 2, 0.3)]
    problem = problem_of(*groups, outside=0.1 * float(np.square(groups[0]).sum()))
    problem = replace(problem, total=1.7 * problem.total)
    solution = solve(problem, tuple(ranks), method, QUICK, allocate and method != "directions")
    assert solution.loss[-1] == pytest.approx(share_of(problem, solution), rel=1e-6, abs=1e-7)
    assert all(a >= b for a, b in zip(solution.loss, solution.loss[1:], strict=False))
    for k, column in enumerate(solution.multipliers.T):
        assert column.abs().max() == 1 or not column.any(), k
        assert not column.any() or column[column.abs().argmax()] > 0 or -column.min() <= column.max() * (1 + 1e-5)
    for g, cores in enumerate(problem.groups):
        offset = 0
        for k, room in enumerate(solution.rooms):
            up, down = solution.ups[g][:, :, offset : offset + room], solution.downs[g][:, offset : offset + room]
            for layer, own in enumerate(solution.ranks[g][:, k].tolist()):
                assert own <= min(*cores.values.shape[2:], room)
                assert not down[layer, own:].any() and not up[layer, :, own:].any()
                sizes = down[layer, :own].norm(dim=1)
                torch.testing.assert_close(up[layer, :, :own].norm(dim=0), sizes, rtol=1e-3, atol=1e-6)
                assert (sizes.diff() <= 1e-5 * sizes[:1].sum()).all()
                products = down[layer, :own] @ down[layer, :own].T - torch.diag(sizes.square())
                assert not own or products.abs().max() <= 1e-4 * sizes[0] ** 2
            offset += room


def test_eight_models_and_four_or_more_loras_come_at_least_8_percent_closer_than_greedy() -> None:
    ratios = []
    for seed, ranks in ((0, (6, 6, 6, 6, 6, 6, 6)), (1, (12, 6, 3, 3)), (2, (12,) * 4), (3, (8, 6, 4, 3, 2))):
        C = family(seed, 8, 4, 30, 30, 7, 0.6, own=0.3)
        ratios.append(solve(problem_of(C), ranks, "joint", QUICK).loss[-1] / greedy_by_definition(C, ranks, seed, 40))
    assert max(ratios) <= 1 + 1e-6
    assert sum(ratios) / len(ratios) <= 0.92


def test_true_shared_directions_are_recovered() -> None:
    rng = np.random.default_rng(5)
    models, layers, p, ranks = 6, 5, 24, (6, 4, 2)
    true = rng.standard_normal((models, 3))
    true -= true.mean(0)
    D = [rng.standard_normal((layers, p, r)) @ rng.standard_normal((layers, r, p)) for r in ranks]
    noise = 1e-3 * rng.standard_normal((layers, models, p, p))
    C = np.einsum("mk,klpq->lmpq", true, np.stack(D)) + noise - noise.mean(1, keepdims=True)
    problem = problem_of(C)
    solution = solve(problem, ranks, "joint", Settings(tolerance=1e-7, iterations=500))
    assert solution.loss[-1] <= 1.05 * np.square(noise).sum() / np.square(C).sum()
    for k in range(3):
        expected = true[:, k] / true[np.abs(true[:, k]).argmax(), k]
        np.testing.assert_allclose(solution.multipliers[:, k], expected, atol=2e-3)
        expected = D[k] * true[np.abs(true[:, k]).argmax(), k]
        error = np.linalg.norm(parts_of(solution, 0)[:, k] - expected) / np.linalg.norm(expected)
        assert error <= 5e-3


def test_main_directions_are_the_eigenvectors_each_cut_by_its_svd() -> None:
    C = family(3, 5, 4, 12, 14, 3, 0.7)
    problem, ranks = problem_of(C), (5, 2)
    values, vectors = np.linalg.eigh(problem.gram.numpy())
    left = C.copy()
    for k, rank in enumerate(ranks):
        v = vectors[:, -1 - k]
        left -= v[:, None, None] * truncated(np.einsum("m,lmpq->lpq", v, C), rank)[:, None]
    expected = np.square(left).sum() / np.square(C).sum()
    solution = solve(problem, ranks, "directions", Settings(tolerance=1e-9))
    assert solution.loss[-1] == pytest.approx(expected, rel=1e-4)
    cosines = np.abs(np.sum(solution.multipliers.numpy() * vectors[:, [-1, -2]], 0))
    np.testing.assert_allclose(cosines, np.linalg.norm(solution.multipliers.numpy(), axis=0), rtol=1e-9)


def test_without_a_limit_of_rank_one_lora_is_the_main_direction() -> None:
    C = family(4, 6, 3, 7, 7, 3, 0.5)
    problem = problem_of(C)
    values = np.linalg.eigvalsh(problem.gram.numpy())[::-1]
    for method in METHODS:
        solution = solve(problem, (50, 7), method, Settings(tolerance=1e-9))
        assert solution.loss[-1] == pytest.approx(values[2:].sum() / values.sum(), rel=1e-4)
        assert solution.rooms == (50, 7)


def test_two_models_and_two_loras_share_one_direction() -> None:
    """M − 1 = 1: both multipliers are ±1, and the LoRAs together are one of their ranks' sum."""
    C = family(6, 2, 4, 12, 10, 2, 0.5)
    problem = problem_of(C)
    solution = solve(problem, (3, 2), "joint", Settings())
    left = C[:, 0] - truncated(C[:, 0], 5)
    assert solution.loss[-1] == pytest.approx(np.square(left).sum() / np.square(C[:, 0]).sum(), rel=1e-5)
    np.testing.assert_allclose(solution.multipliers.abs(), 1, rtol=1e-5)
    assert any("one direction" in note for note in solution.notes)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_are_alike_and_layers_that_do_not_change(method: str) -> None:
    C = family(7, 4, 3, 10, 10, 2, 1.0)
    C[:, 1] = C[:, 0]
    C[1] = 0
    solution = solve(problem_of(C), (4, 2, 2), method, QUICK)
    np.testing.assert_allclose(solution.multipliers[0], solution.multipliers[1], atol=1e-5)
    assert not solution.ranks[0][1].any() and not solution.downs[0][1].any() and not solution.ups[0][1].any()
    assert solution.loss[-1] == pytest.approx(share_of(problem_of(C), solution), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_models_that_do_not_differ_give_empty_loras_and_say_so(method: str) -> None:
    solution = solve(problem_of(np.zeros((3, 3, 6, 5))), (4, 2), method, QUICK, allocate=method != "directions")
    assert set(solution.loss) == {0.0}
    assert not solution.multipliers.any() and not solution.downs[0].any() and not solution.ups[0].any()
    assert "do not differ" in solution.notes[0]


def test_ranks_of_the_layers_own_come_closer_at_the_same_size() -> None:
    groups = [family(8, 5, 3, 18, 22, 4, 1.2), 2 * family(9, 5, 2, 14, 14, 4, 0.3)]
    problem, ranks = problem_of(*groups), (4, 2)
    for method in ("joint", "greedy"):
        uniform = solve(problem, ranks, method, QUICK)
        uneven = solve(problem, ranks, method, QUICK, allocate=True)
        assert uneven.loss[-1] < 0.99 * uniform.loss[-1]
        for k, rank in enumerate(ranks):
            numbers = sum(
                int((own[:, k] * cores.costs).sum()) for own, cores in zip(uneven.ranks, problem.groups, strict=True)
            )
            assert numbers <= rank * sum(int(cores.costs.sum()) for cores in problem.groups)


def test_joint_with_ranks_of_the_layers_own_is_never_above_greedy_with_them() -> None:
    for seed in range(2):
        problem = problem_of(family(seed, 4, 3, 12, 9, 3, 1.0), family(seed, 4, 2, 8, 8, 3, 0.2))
        joint, greedy = (solve(problem, (3, 2), m, QUICK, allocate=True).loss[-1] for m in ("joint", "greedy"))
        assert joint <= greedy + 1e-9


def test_equal_inputs_and_seeds_give_equal_outputs() -> None:
    problem = problem_of(family(10, 4, 4, 12, 12, 3, 0.5))
    for method in METHODS:
        a, b = (solve(problem, (4, 3), method, QUICK) for _ in range(2))
        assert torch.equal(a.multipliers, b.multipliers) and a.loss == b.loss
        assert torch.equal(a.downs[0], b.downs[0]) and torch.equal(a.ups[0], b.ups[0])


def test_cores_on_a_disk_are_gone_through_in_chunks(tmp_path, monkeypatch) -> None:
    C = family(11, 4, 9, 10, 12, 3, 0.5).astype(np.float32)
    np.save(tmp_path / "cores.npy", C)
    problem = problem_of(C)
    whole = {method: solve(problem, (4, 2), method, QUICK) for method in METHODS}
    mapped = torch.from_numpy(np.load(tmp_path / "cores.npy", mmap_mode="c"))
    chunked = replace(problem, groups=[replace(problem.groups[0], values=mapped)])
    monkeypatch.setattr(sweep, "_BYTES", 4 * 4 * 120 * 2)
    monkeypatch.setattr(sweep, "_COPIED", 0)
    for method in METHODS:
        solution = solve(chunked, (4, 2), method, QUICK)
        assert solution.loss[-1] == pytest.approx(whole[method].loss[-1], rel=1e-4)
        torch.testing.assert_close(solution.multipliers, whole[method].multipliers, rtol=0, atol=0.02)


def test_starts_may_be_tried_on_a_part_of_the_layers(monkeypatch) -> None:
    C = family(12, 5, 24, 12, 12, 3, 0.5)
    problem, ranks = problem_of(C), (4, 3)
    whole = solve(problem, ranks, "joint", QUICK)
    monkeypatch.setattr(sample.sample, "__defaults__", (C.size // 3,))
    part, greedy = (solve(problem, ranks, method, QUICK) for method in ("joint", "greedy"))
    assert part.loss[-1] <= greedy.loss[-1] + 1e-9
    assert part.loss[-1] <= 1.01 * whole.loss[-1]
    assert part.loss[-1] <= greedy_by_definition(C, ranks, 0) + 1e-6


def test_loras_that_could_cancel_each_other_without_end_stay_small() -> None:
    """a∘b∘c-like sums whose best approximation does not exist: a tensor of border rank 2 and rank 3."""
    rng = np.random.default_rng(13)
    p = 8
    a, b = (np.linalg.qr(rng.standard_normal((p, 2)))[0] for _ in range(2))
    slope = np.outer(a[:, 0], b[:, 1]) + np.outer(a[:, 1], b[:, 0])
    C = np.stack([slope, np.outer(a[:, 0], b[:, 0]), -slope - np.outer(a[:, 0], b[:, 0])])[None]
    solution = solve(problem_of(C), (1, 1), "joint", Settings(tolerance=0, iterations=3000))
    terms = np.einsum("mk,kpq->mkpq", solution.multipliers.numpy(), parts_of(solution, 0)[0])
    assert solution.loss[-1] < 0.02
    assert np.square(terms).sum() < 1e4 * np.square(C).sum()
    assert float(solution.ups[0].abs().max()) < 1e3 and float(solution.downs[0].abs().max()) < 1e3


def test_a_check_that_raises_stops_the_solver() -> None:
    class Stop(Exception):
        pass

    shares: list[float] = []

    def check(share: float) -> None:
        shares.append(share)
        if len(shares) == 20:
            raise Stop

    with pytest.raises(Stop):
        solve(problem_of(family(14, 4, 3, 12, 12, 3, 0.4)), (3, 2), "joint", Settings(check=check))
    assert all(0 <= a <= b <= 1 for a, b in zip(shares, shares[1:], strict=False))


def test_ranks_for_a_size_keep_to_it() -> None:
    problem = problem_of(family(15, 5, 3, 16, 12, 3, 0.8), family(16, 5, 2, 9, 9, 3, 0.8))
    cost = sum(int(cores.costs.sum()) for cores in problem.groups)
    for total, count in ((1, None), (7, None), (9, 3), (2, 5), (200, 2)):
        ranks = plan_ranks(problem, total * cost + 5, count, QUICK)
        assert sum(ranks) <= total and list(ranks) == sorted(ranks, reverse=True) and min(ranks) >= 1
        assert count is None or len(ranks) == min(count, total)
        assert max(ranks) <= 12
    one_way = np.random.default_rng(17).standard_normal((3, 1, 10, 10)) * np.array([2.0, -1, -1])[:, None, None]
    assert plan_ranks(problem_of(one_way), 6 * 60, None, QUICK) == (6,)


def test_words_that_are_no_method_and_no_ranks_are_refused() -> None:
    problem = problem_of(family(18, 3, 2, 6, 6, 2, 0.5))
    for ranks, method in (((4,), "both"), ((), "joint"), ((4, 0), "joint")):
        with pytest.raises(ValueError):
            solve(problem, ranks, method, QUICK)
