"""Hyper-merge from end to end: what it finds, against truths known by construction and figures recomputed here."""

import math
from pathlib import Path

import hyper_oracle as oracle
import pytest
import torch
from hyper_families import Family, gradual, hyper, known, lora_files, matched, subspace
from models import lora_deltas, reachable
from safetensors.torch import save_file

ROUNDING = {"fp32": 1e-5, "fp16": 1e-3}  # of a reported figure, relative


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[Path]:
    """Six models that share three directions of decaying spectra and have a part of their own."""
    return gradual(6, own=0.5, rests=0.02).save(tmp_path_factory.mktemp("mixed"), torch.float16)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> tuple[Family, list[Path]]:
    """Five models of two true directions, and 3 % of noise."""
    family = known(5, (3, 2), own=0.03)
    return family, family.save(tmp_path_factory.mktemp("shared"))


def judged(folder: Path, models: list[Path], answer: dict, base: Path | None = None) -> oracle.Judged:
    return oracle.judge(
        {path.stem: path for path in models}, base or folder / answer["hyper"], lora_files(folder, answer),
        answer["multipliers"], answer["te_multipliers"], base,
    )  # fmt: skip


def table(answer: dict) -> torch.Tensor:
    """λ (M, K) in the order of the answer."""
    return torch.tensor([list(row.values()) for row in answer["multipliers"].values()], dtype=torch.float64)


def test_the_checker_finds_what_was_put_there(tmp_path):
    """True LoRAs of true multipliers leave nothing; one multiplier too large by a half leaves what that adds."""
    family = known(4, (3, 2), divisor=64)
    paths, loras = family.save(tmp_path), {}
    for i, direction in enumerate(family.directions):
        tensors = {}
        for name, key in ((name, key) for name, key, _ in reachable(paths[0]) if key in direction):
            U, S, Vh = torch.linalg.svd(direction[key], full_matrices=False)
            tensors |= {f"{name}.lora_up.weight": (U * S).contiguous(), f"{name}.lora_down.weight": Vh.contiguous(),
                        f"{name}.alpha": torch.tensor(2.0 * len(S))}  # fmt: skip
        loras[f"l{i}"] = tmp_path / f"l{i}.safetensors"
        save_file(tensors, loras[f"l{i}"])
    λ = {path.stem: dict(zip(loras, (row / 2).tolist(), strict=True))
         for path, row in zip(paths, family.multipliers, strict=True)}  # fmt: skip
    named, base = {path.stem: path for path in paths}, tmp_path / "base.safetensors"
    right = oracle.judge(named, base, loras, λ)
    assert right.residual_share < 1e-9
    assert oracle.best_multipliers(paths, base, list(loras.values()))[0].tolist() == [
        pytest.approx(list(row.values()), rel=1e-4) for row in λ.values()
    ]
    whole = sum(sum(row.values()) for row in right.wholes.values())
    λ["a"]["l0"] *= 1.5
    added = sum(float((λ["a"]["l0"] * 2 / 3 * D).square().sum()) for D in family.directions[0].values())
    assert oracle.judge(named, base, loras, λ).residual_share == pytest.approx(added / whole, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("solver", ["joint", "greedy", "directions"])
def test_the_figures_are_those_of_the_files(tmp_path, mixed, solver, dtype):
    answer = hyper(mixed, tmp_path, "--ranks", "4,2", "--solver", solver, "--dtype", dtype)
    found = judged(tmp_path, mixed, answer)
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=ROUNDING[dtype])
    assert answer["models"] == pytest.approx(found.models, rel=ROUNDING[dtype])
    assert answer["solver"] == solver
    assert 0.1 < answer["residual_share"] < 0.9
    for model, parts in found.components.items():
        reported = answer["by_model"][model]["components"]
        assert {c: part["relative_error"] for c, part in reported.items()} == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("solver", ["joint", "greedy"])
def test_the_loss_never_rises_and_ends_near_the_share_of_the_files(tmp_path, mixed, solver):
    answer = hyper(mixed, tmp_path, "--ranks", "4,2", "--solver", solver)
    loss = answer["loss"]
    assert len(loss) > 1
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(loss, loss[1:], strict=False))
    assert answer["residual_share"] == pytest.approx(loss[-1], rel=0.02)


@pytest.mark.parametrize(("models", "ranks", "own"), [(5, (3, 2), 0.0), (5, (3, 2), 0.03), (7, (2, 2, 1), 0.02)])
def test_true_multipliers_and_directions_are_recovered(tmp_path, models, ranks, own):
    family = known(models, ranks, own, seed=3)
    paths = family.save(tmp_path / "models")
    answer = hyper(paths, tmp_path / "out", "--ranks", ",".join(map(str, ranks)), "--dtype", "fp32", "--starts", 5)
    pairs = matched(table(answer), family.multipliers)
    assert sorted(j for _, j, _ in pairs) == list(range(len(ranks)))
    assert min(cosine for *_, cosine in pairs) > 0.999
    keys = {name: key for name, key, _ in reachable(paths[0])}
    files = list(lora_files(tmp_path / "out", answer).values())
    for i, j, _ in pairs:
        dot = square = whole = 0.0
        for name, delta in lora_deltas(files[i]).items():
            true = family.directions[j].get(keys[name])
            if true is not None and min(true.shape) >= 8:  # smaller layers have no room for all ranks
                dot += float((delta.flatten(1) * true).sum())
                square, whole = square + float(delta.square().sum()), whole + float(true.square().sum())
        assert abs(dot) / math.sqrt(square * whole) > 0.99
    floor = own**2 * models / (float(family.multipliers.square().sum()) + own**2 * models)
    assert answer["residual_share"] <= 1.1 * floor + 1e-6


def test_the_base_of_true_directions_that_are_centred_is_the_hyper_model(tmp_path, shared):
    family, paths = shared
    hyper(paths, tmp_path, "--ranks", "3,2")
    made = oracle.load_reached(tmp_path / "h.safetensors")
    for name, weight in oracle.load_reached(paths[0].with_name("base.safetensors")).items():
        assert float((made[name] - weight).norm()) < 0.01 * float(weight.norm()), name


def test_two_models_and_one_lora_reach_the_best_there_is(tmp_path, mixed):
    """Of two models, the difference alone is to be approximated: its truncated SVD, layer by layer."""
    pair = mixed[:2]
    answer = hyper(pair, tmp_path, "--ranks", "3", "--dtype", "fp32")
    left = whole = 0.0
    for piece in oracle.pieces(pair, tmp_path / "h.safetensors", []):
        squares = torch.linalg.svdvals(piece.models[0] - piece.models[1]).square()
        left, whole = left + float(squares[3:].sum()), whole + float(squares.sum())
    assert answer["residual_share"] == pytest.approx(left / whole, rel=2e-3)
    assert answer["residual_share"] >= left / whole * (1 - 1e-6)
    assert sorted(table(answer).flatten().tolist()) == pytest.approx([-1, 1], abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_ranks_the_eigenvectors_of_the_gram_matrix_are_the_answer(tmp_path, mixed, count):
    answer = hyper(mixed, tmp_path, "--ranks", ",".join(["full"] * count), "--dtype", "fp32", "--model-dtype", "fp32")
    gram = torch.zeros(len(mixed), len(mixed), dtype=torch.float64)
    for piece in oracle.pieces(mixed, tmp_path / "h.safetensors", []):
        changes = torch.stack([(weight - piece.centre).flatten() for weight in piece.models])
        gram += changes @ changes.mT
    values = torch.linalg.eigvalsh(gram).flip(0)
    best = float(values[count:].clamp_min(0).sum() / values.sum())
    assert answer["residual_share"] == pytest.approx(best, rel=1e-3, abs=1e-6)
    assert judged(tmp_path, mixed, answer).residual_share == pytest.approx(answer["residual_share"], rel=1e-3, abs=1e-9)


def test_the_multipliers_are_the_best_for_the_loras_in_the_files(tmp_path, mixed):
    answer = hyper(mixed, tmp_path, "--ranks", "4,2", "--separate-te")
    files = list(lora_files(tmp_path, answer).values())
    parts = [oracle.best_multipliers(mixed, tmp_path / "h.safetensors", files, only=f"lora_{c}_")[1]
             for c in ("unet", "te")]  # fmt: skip
    found = judged(tmp_path, mixed, answer)
    left = sum(sum(row.values()) for row in found.errors.values())
    assert left == pytest.approx(sum(parts), rel=1e-3)


FAMILIES = {
    "shared": lambda: known(4, (2, 2), own=0.5, divisor=64),
    "steep": lambda: gradual(4, K=2, own=0.3, divisor=64),
    "alone": lambda: gradual(5, K=1, own=1.5, divisor=64, seed=2),
    "one subspace": lambda: subspace(5, 2, 4, divisor=64),
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("ranks", ["2,2", "3,1,1"])
def test_joint_is_never_above_greedy_nor_above_directions(tmp_path, kind, ranks):
    paths = FAMILIES[kind]().save(tmp_path)
    shares = {
        solver: hyper(paths, tmp_path / solver, "--ranks", ranks, "--solver", solver, "--dtype", "fp32")[
            "residual_share"
        ]
        for solver in ("joint", "greedy", "directions")
    }
    assert shares["joint"] <= shares["greedy"] * (1 + 1e-4)
    assert shares["joint"] <= shares["directions"] * (1 + 1e-4)


def test_uneven_ranks_of_the_same_size_come_closer(tmp_path, mixed):
    even = hyper(mixed, tmp_path / "even", "--ranks", "4,2")
    uneven = hyper(mixed, tmp_path / "uneven", "--ranks", "4,2", "--allocation", "layers")
    assert uneven["residual_share"] < even["residual_share"]
    sizes = [sum(one["bytes"] for one in answer["loras"]) for answer in (even, uneven)]
    assert sizes[1] <= sizes[0] * 1.02
    assert judged(tmp_path / "uneven", mixed, uneven).residual_share == pytest.approx(
        uneven["residual_share"], rel=ROUNDING["fp16"]
    )


def test_multipliers_of_their_own_for_text_encoders_come_closer(tmp_path):
    unet, text = known(5, (2, 2), own=0.1, seed=4), known(5, (2, 2), own=0.1, seed=5)
    for mine, other in zip(unet.models, text.models, strict=True):
        mine.update({key: weight for key, weight in other.items() if key.startswith("cond_stage")})
    paths = unet.save(tmp_path)
    one = hyper(paths, tmp_path / "one", "--ranks", "2,2", "--dtype", "fp32", "--no-separate-te")
    two = hyper(paths, tmp_path / "two", "--ranks", "2,2", "--dtype", "fp32")
    assert one["te_multipliers"] is None
    assert two["te_multipliers"].keys() == two["multipliers"].keys()
    assert two["residual_share"] < 0.9 * one["residual_share"]
    found = judged(tmp_path / "two", paths, two)
    assert two["residual_share"] == pytest.approx(found.residual_share, rel=ROUNDING["fp32"])
    assert two["models"] == pytest.approx(found.models, rel=ROUNDING["fp32"])
    name = next(iter(two["prompts"]))
    assert any(one.count(":") == 3 for one in two["prompts"][name].split(">") if one)
