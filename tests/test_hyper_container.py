"""The container: bases by naive decompositions in float64, the file as any reader of safetensors sees it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from hyper_cores import problem_of, random_cores, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.hyper.container import SharedCores, allot, shared_cores
from lib_hypermerge.algebra.hyper.container_finish import finish
from lib_hypermerge.algebra.hyper.problem import Settings
from lib_hypermerge.algebra.hyper.solve import solve
from lib_hypermerge.errors import Cancelled, FormatError, HypermergeError, NumericalError, SpecError
from lib_hypermerge.files.dtypes import name_of
from lib_hypermerge.files.writer import SafetensorsWriter
from lib_hypermerge.jobs.hyper import container as files
from lib_hypermerge.jobs.hyper.recipe import Recipe
from lib_hypermerge.layouts import sd1

QUICK = settings(derandomize=True, deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)
HOW = Settings()


def layers_of(found: SharedCores) -> list[tuple[np.ndarray, np.ndarray, int, int]]:
    """(up (p, a), down (b, q), a, b) of each layer."""
    return [
        (up.numpy().astype(np.float64), down.numpy().astype(np.float64), int(a), int(b))
        for layers in zip(found.ups, found.downs, found.up_ranks, found.ranks, strict=True)
        for up, down, a, b in zip(*layers, strict=True)
    ]


def hooi(C: np.ndarray, rank: int, steps: int) -> float:
    """Energy kept by the textbook's iteration, with a whole eigendecomposition in each step; 0 steps: HOSVD."""
    U = np.linalg.eigh(np.einsum("mij,mkj->ik", C, C))[1][:, ::-1][:, :rank]
    V = np.linalg.eigh(np.einsum("mij,mik->jk", C, C))[1][:, ::-1][:, :rank]
    for _ in range(steps):
        T = C @ V
        U = np.linalg.eigh(np.einsum("mij,mkj->ik", T, T))[1][:, ::-1][:, :rank]
        T = U.T @ C
        V = np.linalg.eigh(np.einsum("mij,mik->jk", T, T))[1][:, ::-1][:, :rank]
    return float(np.square(U.T @ C @ V).sum())


# --- bases -------------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(1, 5), st.integers(2, 9), st.integers(2, 9), st.integers(0, 600), st.booleans(), seeds)
def test_bases_are_orthonormal_within_the_budget_and_leave_what_is_said(M, p, q, numbers, square, seed):
    groups = [random_cores(3, M, p, q, seed, 2), random_cores(2, M, q, p, seed + 1)]
    costs, rows = [[20, 30, 40], [25, 18]], [[10, 12, 30], [13, 9]]
    problem = problem_of(groups, costs, 0.1, () if square else rows)
    found = shared_cores(problem, numbers, HOW)
    kept, spent = 0.0, 0
    sizes = zip(sum(costs, []), sum(rows, []), strict=True)
    for (U, V, a, b), C, (cost, n) in zip(layers_of(found), values_of(problem), sizes, strict=True):
        for basis, rank in ((U.T, a), (V, b)):
            eye = np.diag((np.arange(len(basis)) < rank).astype(float))
            np.testing.assert_allclose(basis @ basis.T, eye, atol=3e-6)
        kept += np.square(U.T @ C @ V.T).sum()
        spent += (a * cost if square else a * n + b * (cost - n)) + M * a * b
        assert a <= C.shape[1] and b <= C.shape[2] and (a == b or not square)
    assert found.numbers == spent <= numbers
    assert found.share == pytest.approx((problem.energy - kept) / problem.total, abs=1e-5)


def test_as_good_as_the_textbooks_iteration_at_the_same_ranks():
    problem = problem_of([random_cores(6, 5, 20, 24, 0, 6, 3.0)], [[90, 120, 150, 80, 100, 60]])
    found = shared_cores(problem, 4000, HOW)
    ranks = [rank for *_, rank in layers_of(found)]
    kept, first, best = (1 - found.share) * problem.energy, 0.0, 0.0
    for C, rank in zip(values_of(problem), ranks, strict=True):
        first, best = first + hooi(C, rank, 0), best + hooi(C, rank, 100)
    assert max(ranks) > min(ranks)  # by what layers gain
    assert first < best  # iterating does help here
    assert first < kept and best - kept < 0.5 * (best - first)


def test_a_layer_is_never_worse_for_more_iterations():
    problem = problem_of([random_cores(4, 6, 18, 18, 3, 5, 4.0)], [[60] * 4])
    shares = [shared_cores(problem, 2500, Settings(iterations=i, tolerance=0)).share for i in (1, 2, 4, 8)]
    assert all(a >= b - 1e-7 for a, b in itertools.pairwise(shares)) and shares[-1] < shares[0]


def test_all_that_there_is_needs_no_budget_beyond_it():
    problem = problem_of([random_cores(3, 4, 7, 9, 1)], [[30, 30, 30]], rows=[[14, 14, 14]])
    found = shared_cores(problem, 10**9, HOW)
    assert found.share < 1e-6 and found.numbers == 3 * (7 * 14 + 9 * 16 + 4 * 7 * 9)


def test_directions_of_the_short_side_are_cheap_and_taken():
    """At equal numbers, bases of two sizes leave less than of one."""
    values, costs = random_cores(3, 6, 24, 24, 9, 12, 1.0), [[320] * 3]
    square = shared_cores(problem_of([values], costs), 10_000, HOW)
    found = shared_cores(problem_of([values], costs, rows=[[32] * 3]), 10_000, HOW)
    assert all(a > b for *_, a, b in layers_of(found))
    assert found.share < 0.95 * square.share


def test_models_of_a_shared_subspace_are_exact_at_its_rank():
    problem = problem_of([random_cores(3, 8, 16, 12, 2, 4, 0.0)], [[60, 70, 80]])
    found = shared_cores(problem, 4 * (60 + 70 + 80) + 3 * 8 * 16, HOW)
    assert [rank for *_, rank in layers_of(found)] == [4] * 3
    assert found.share < 1e-6


def test_bases_are_ordered_so_that_a_lower_rank_is_a_part_of_them():
    problem = problem_of([random_cores(2, 5, 14, 14, 5, 5, 1.0)], [[60, 60]])
    for (U, V, rank, _), C in zip(layers_of(shared_cores(problem, 900, HOW)), values_of(problem), strict=True):
        W = U.T @ C @ V.T
        for along in (np.square(W).sum((0, 2)), np.square(W).sum((0, 1))):
            assert (np.diff(along[:rank]) <= 1e-6 * along[0]).all()


def test_for_many_models_it_beats_any_shared_loras_of_the_same_size():
    """Sixteen models with cores of their own in bases they share: K LoRAs leave no less than G's other eigenvalues."""
    M, ranks = 16, (6, 4, 3)
    problem = problem_of([random_cores(5, M, 26, 26, 4, 6, 0.4)], [[160] * 5])
    numbers = 5 * 160 * sum(ranks)
    found = shared_cores(problem, numbers, HOW)
    bound = float(np.linalg.eigvalsh(problem.gram.numpy())[: M - len(ranks)].sum()) / problem.total
    joint = solve(problem, ranks, "joint", Settings(starts=1, iterations=10)).loss[-1]
    assert found.numbers <= numbers
    assert joint >= bound - 1e-6
    assert found.share < 0.6 * bound


def test_mapped_cores_in_chunks_give_the_same(tmp_path, monkeypatch):
    values = random_cores(7, 3, 12, 10, 6, 4)
    costs = [[50, 60, 70, 80, 90, 100, 40]]
    whole = shared_cores(problem_of([values], costs), 2000, HOW)
    mapped = np.memmap(tmp_path / "cores.bin", dtype=np.float32, mode="w+", shape=values.shape)
    mapped[:] = values
    monkeypatch.setattr("lib_hypermerge.algebra.hyper.container._CHUNK", 800)
    found = shared_cores(problem_of([mapped], costs), 2000, HOW)
    assert found.ranks[0].tolist() == whole.ranks[0].tolist()
    assert found.share == pytest.approx(whole.share, rel=1e-2)


def test_nothing_and_no_room_leave_it_all():
    values = np.zeros((2, 3, 6, 6), dtype=np.float32)
    assert shared_cores(problem_of([values], [[20, 20]]), 100, HOW).share == 0
    problem = problem_of([random_cores(2, 3, 6, 6, 0)], [[20, 20]])
    found = shared_cores(problem, 10, HOW)
    assert found.share == 1 and found.numbers == 0 and found.ups[0].shape == (2, 6, 0)


def test_it_can_be_stopped():
    def stop(share: float) -> None:
        assert 0 < share <= 1
        raise Cancelled

    with pytest.raises(Cancelled):
        shared_cores(problem_of([random_cores(2, 3, 6, 6, 0)], [[20, 20]]), 100, Settings(check=stop))


@QUICK
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 120), seeds)
def test_ranks_are_those_that_gain_most(L, s, budget, seed):
    """Against all combinations: short by no more than the last step, which the budget may forbid."""
    rng = np.random.default_rng(seed)
    steps = rng.random((L, s)) ** 3
    curve = np.concatenate([np.zeros((L, 1)), steps.cumsum(1)], 1)
    n, M = rng.integers(3, 20, L), int(rng.integers(1, 4))
    cost = np.stack([r * n + M * r * r for r in range(s + 1)], 1)
    ranks = allot([torch.from_numpy(curve)], [torch.from_numpy(cost)], budget)[0].numpy()

    def worth(which) -> tuple[int, float]:
        return sum(cost[i, r] for i, r in enumerate(which)), sum(curve[i, r] for i, r in enumerate(which))

    best = max(worth(w)[1] for w in itertools.product(range(s + 1), repeat=L) if worth(w)[0] <= budget)
    spent, gained = worth(ranks)
    assert spent <= budget
    assert gained >= best - curve[:, -1].max() - 1e-12
    one_more = [ranks + np.eye(L, dtype=int)[i] for i in range(L) if ranks[i] < s]
    assert all(worth(w)[0] > budget for w in one_more)


# --- finishing on whole changes ----------------------------------------------------------------------------------


def changes(M: int, n: int, k: int, seed: int, scale: float = 1e-2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    s = np.arange(1, min(n, k) + 1) ** -1.0
    U, V = np.linalg.qr(rng.standard_normal((n, len(s))))[0], np.linalg.qr(rng.standard_normal((k, len(s))))[0]
    return (scale * (U * s) @ rng.standard_normal((M, len(s), len(s))) @ (V * s).T).astype(np.float32)


def leading_rows(E: np.ndarray, r: int) -> torch.Tensor:
    rows = np.linalg.svd(E.reshape(-1, E.shape[2]).astype(np.float64), full_matrices=False)[2][:r]
    return torch.from_numpy(rows.astype(np.float32))


def finished(E: np.ndarray, down: torch.Tensor, rank: int | None = None):
    whole = torch.from_numpy(E)
    return finish(whole @ down.float().mT, down, whole.double().square().sum((1, 2)), rank)


def errors_of(E: np.ndarray, up: torch.Tensor, cores: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    made = np.stack([up.double().numpy() @ core @ down.double().numpy() for core in cores.double().numpy()])
    return np.square(E.astype(np.float64) - made).sum((1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "n", "k", "r"), [(3, 40, 64, 12), (12, 30, 50, 7), (2, 90, 20, 16)])
def test_up_and_cores_are_the_best_and_measured_as_rounded(dtype, M, n, k, r):
    E, a = changes(M, n, k, n), r + 3
    down = leading_rows(E, r).to(dtype)
    made = finished(E, down, a)
    assert made.up.shape == (n, a) and made.cores.shape == (M, a, r)
    assert {made.up.dtype, made.cores.dtype} == {dtype}
    true = errors_of(E, made.up, made.cores, down)
    energy = np.square(E.astype(np.float64)).sum((1, 2))
    np.testing.assert_allclose(made.errors.numpy(), true, atol=3e-7 * energy.max())
    V = np.linalg.qr(down.double().numpy().T)[0]
    wide = np.concatenate(list(E @ V), 1)
    best = energy.sum() - np.square(np.linalg.svd(wide, compute_uv=False)[:a]).sum()
    rounding = {torch.float16: 1e-6, torch.bfloat16: 4e-5, torch.float32: 1e-9}[dtype]
    assert best * (1 - 1e-6) <= true.sum() <= best * 1.005 + rounding * energy.sum()


@pytest.mark.parametrize("scale", [1e-5, 1e-4, 30.0, 3e4])
def test_small_and_large_changes_keep_their_precision_in_fp16(scale):
    E = changes(3, 30, 40, 1, scale)
    down = leading_rows(E, 30).half()
    made = finished(E, down)
    share = errors_of(E, made.up, made.cores, down).sum() / np.square(E.astype(np.float64)).sum()
    assert share < 1e-6


def test_rounded_bases_cost_no_more_than_their_format_for_cores_alone():
    """Cores that were cut with the exact bases and only then rounded miss several times as much."""
    E = changes(4, 40, 40, 2)
    down = leading_rows(E, 40).to(torch.bfloat16)
    made = finished(E, down)
    U = np.linalg.svd(np.concatenate(list(E), 1))[0]
    naive = torch.from_numpy(U.T @ E @ leading_rows(E, 40).numpy().T).to(torch.bfloat16)
    rounded = torch.from_numpy(U).to(torch.bfloat16)
    ours, theirs = errors_of(E, made.up, made.cores, down).sum(), errors_of(E, rounded, naive, down).sum()
    assert ours < 0.7 * theirs


def test_no_change_gives_zeros_and_one_too_large_is_refused():
    E = np.zeros((2, 10, 12), dtype=np.float32)
    down = torch.eye(12)[:3].half()
    made = finished(E, down)
    assert not made.cores.any() and made.errors.tolist() == [0, 0]
    with pytest.raises(NumericalError):
        finished(E + 1e12, down)


# --- the file ----------------------------------------------------------------------------------------------------

LABELS = ("anime", "photo", "ink")
SHAPES = {
    "lora_unet_a_to_q": (24, 16), "lora_unet_b_conv": (12, 6, 3, 3), "lora_unet_c_proj": (10, 14, 1, 1),
}  # fmt: skip
FIRST = next(iter(SHAPES))
STATED = files.Stated(LABELS, "family.safetensors", sd1.SD1.base)
RECIPE = Recipe("family.safetensors", [], {label: {} for label in LABELS}, container="family.hypermerge")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path, whole changes by module, measured errors by module)."""
    path = tmp_path_factory.mktemp("container") / "family.hypermerge"
    metadata = files.container_metadata(STATED, RECIPE)
    all_changes, errors = {}, {}
    with SafetensorsWriter(path, files.header_reserve(list(SHAPES), metadata)) as writer:
        for i, (name, shape) in enumerate(SHAPES.items()):
            E = changes(3, shape[0], int(np.prod(shape[1:])), i)
            down = leading_rows(E, 6).half()
            made = finished(E, down)
            for key, tensor in files.module_tensors(name, made.up, down, made.cores, shape):
                writer.add(key, tensor)
            all_changes[name], errors[name] = E, made.errors.numpy()
        writer.commit(lambda *_: metadata)
    return path, all_changes, errors


def test_the_file_is_plain_safetensors_and_holds_what_was_measured(written):
    path, all_changes, errors = written
    stored = {key: value.astype(np.float64) for key, value in safetensors.numpy.load_file(path).items()}
    assert set(stored) == {f"{name}.{part}" for name in SHAPES for part in ("up", "down", "cores")}
    for name, shape in SHAPES.items():
        up, down, cores = (stored[f"{name}.{part}"] for part in ("up", "down", "cores"))
        assert up.shape == (shape[0], 6) and down.shape == (6, *shape[1:]) and cores.shape == (3, 6, 6)
        E = all_changes[name].astype(np.float64)
        true = np.square(E - up @ cores @ down.reshape(6, -1)).sum((1, 2))
        np.testing.assert_allclose(errors[name], true, atol=3e-7 * np.square(E).sum((1, 2)).max())


def test_the_file_says_of_what_it_is(written):
    with files.open_container(written[0]) as container:
        assert container.labels == LABELS and container.stated == STATED
        assert container.recipe == RECIPE
        assert container.modules == SHAPES and container.dtype == "F16"


@pytest.mark.parametrize("weights", [{"photo": 1.0}, {"anime": 0.5, "ink": -1.5}])
def test_the_change_of_one_model_and_of_a_blend(written, weights):
    stored = {key: value.astype(np.float64) for key, value in safetensors.numpy.load_file(written[0]).items()}
    with files.open_container(written[0]) as container:
        for name in SHAPES:
            core = sum(weight * stored[f"{name}.cores"][LABELS.index(label)] for label, weight in weights.items())
            true = stored[f"{name}.up"] @ core @ stored[f"{name}.down"].reshape(6, -1)
            made = container.change(name, weights)
            assert made.rank == container.rank(name) == 6 and container.rank(name, 3) == 3
            np.testing.assert_allclose(made.up.numpy() @ made.down.double().numpy(), true, atol=1e-12)


def test_a_model_that_is_not_there_is_named_with_those_that_are(written):
    with files.open_container(written[0]) as container, pytest.raises(SpecError, match="anime, photo, ink"):
        container.change(FIRST, {"oil": 1.0})


def rewritten(written, path, change) -> None:
    tensors = {key: torch.from_numpy(value.copy()) for key, value in safetensors.numpy.load_file(written[0]).items()}
    metadata = files.container_metadata(STATED, RECIPE)
    change(tensors, metadata)
    header: dict = {"__metadata__": metadata}
    data = b""
    for key, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        shape = list(tensor.shape)
        header[key] = {
            "dtype": name_of(tensor.dtype),
            "shape": shape,
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("no container", lambda tensors, metadata: metadata.pop(files.KEY)),
        ("no container", lambda tensors, metadata: metadata.update({files.KEY: '{"labels": 3}'})),
        ("no container", lambda tensors, metadata: metadata.update({files.KEY: "[" * 9999})),
        ("version 2", lambda t, m: m.update({files.KEY: m[files.KEY].replace('"version":1', '"version":2')})),
        ("incomplete", lambda tensors, metadata: tensors.pop(f"{FIRST}.down")),
        ("no modules", lambda tensors, metadata: tensors.clear()),
        ("no part", lambda tensors, metadata: tensors.update({"lora_unet_a.alpha": torch.ones(1)})),
        ("do not fit", lambda tensors, metadata: tensors.update({f"{FIRST}.cores": torch.ones(2, 6, 6)})),
        ("do not fit", lambda tensors, metadata: tensors.update({f"{FIRST}.cores": torch.tensor(1.0)})),
        ("do not fit", lambda tensors, metadata: tensors.update({f"{FIRST}.up": torch.ones(24, 5)})),
        ("do not fit", lambda tensors, metadata: tensors.update({f"{FIRST}.up": torch.ones(24, 6).int()})),
    ],
)  # fmt: skip
def test_broken_files_are_refused_when_they_are_opened(written, tmp_path, why, change):
    path = tmp_path / "broken.hypermerge"
    rewritten(written, path, change)
    with pytest.raises(FormatError, match=why):
        files.open_container(path)


def test_a_truncated_file_a_missing_one_and_numbers_that_are_none(written, tmp_path):
    path = tmp_path / "broken.hypermerge"
    path.write_bytes(written[0].read_bytes()[:-10])
    with pytest.raises(FormatError):
        files.open_container(path)
    with pytest.raises(HypermergeError, match="no file"):
        files.open_container(tmp_path / "none.hypermerge")

    def spoil(tensors, metadata):
        tensors[f"{FIRST}.up"][3, 2] = float("nan")

    rewritten(written, path, spoil)
    with files.open_container(path) as container, pytest.raises(FormatError, match="not finite"):
        container.change(FIRST, {"ink": 1.0})


def test_the_recipe_in_it_may_be_missing(written, tmp_path):
    path = tmp_path / "bare.hypermerge"
    rewritten(written, path, lambda tensors, metadata: metadata.pop("hypermerge"))
    with files.open_container(path) as container, pytest.raises(FormatError, match="no recipe"):
        _ = container.recipe
