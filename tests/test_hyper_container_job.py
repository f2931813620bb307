"""The container that a hyper-merge writes, against the models, the hyper-model and a plain reader of its file."""

from __future__ import annotations

import json
from pathlib import Path

import hyper_oracle as oracle
import pytest
import torch
from hyper_families import hyper, known, subspace
from models import listing
from safetensors import safe_open
from safetensors.torch import load_file

RANKS = "3,2"
QUICK = ("--starts", 1, "--iterations", 10)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Many that share their spaces, but no directions: what a container is for."""
    return subspace(8, 2, 4, divisor=64).save(tmp_path_factory.mktemp("models"), torch.float16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, models) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("made")
    return folder, hyper(models, folder, "--ranks", RANKS, "--form", "both", "--compare", *QUICK)


def errors_of(container: Path, hyper_model: Path, models: list[Path]) -> tuple[float, dict[str, float]]:
    """(residual share, relative error by label) of hyper-model + up·core·down, in float64."""
    stored = {key: tensor.double() for key, tensor in load_file(container).items()}
    with safe_open(container, "pt") as file:
        labels = json.loads(file.metadata()["hypermerge_container"])["labels"]
    left, whole = torch.zeros(len(models)).double(), torch.zeros(len(models)).double()
    assert labels == [path.stem for path in models]
    for piece in oracle.pieces(models, hyper_model, []):
        for m, weight in enumerate(piece.models):
            change = torch.zeros_like(weight)
            if f"{piece.name}.up" in stored:
                up, down, cores = (stored.pop(f"{piece.name}.{part}") if m == len(models) - 1 else
                                   stored[f"{piece.name}.{part}"] for part in ("up", "down", "cores"))  # fmt: skip
                change = up @ cores[m] @ down.flatten(1)
            left[m] += (weight - piece.hyper - change).square().sum()
            whole[m] += (weight - piece.centre).square().sum()
    assert not stored  # nothing in the file that the models do not have
    return float(left.sum() / whole.sum()), dict(zip(labels, (left / whole).sqrt().tolist(), strict=True))


def test_the_error_reported_is_that_of_the_file(made, models):
    folder, answer = made
    said = answer["container"]
    path = folder / said["name"]
    assert path.name == "h.hypermerge" and path.stat().st_size == said["bytes"]
    share, by_model = errors_of(path, folder / "h.safetensors", models)
    assert said["residual_share"] == pytest.approx(share, rel=1e-3, abs=1e-6)
    assert said["models"] == pytest.approx(by_model, rel=1e-3, abs=1e-3)


def test_it_beats_the_loras_of_the_same_size_where_models_are_many(made):
    answer = made[1]
    said, numbers = answer["container"], sum(one["bytes"] for one in answer["loras"])
    assert said["bytes"] <= 1.05 * numbers
    assert said["residual_share"] < 0.5 * answer["residual_share"]
    assert answer["better"].startswith("A container")


def test_the_recipe_names_it(made):
    folder, _ = made
    recipe = json.loads((folder / "h.hypermerge.json").read_text(encoding="utf-8"))
    assert recipe["container"] == "h.hypermerge"
    with safe_open(folder / "h.hypermerge", "pt") as file:
        stated = json.loads(file.metadata()["hypermerge_container"])
        assert json.loads(file.metadata()["hypermerge"])["container"] == "h.hypermerge"
    assert stated["version"] == 1 and stated["hyper"] == "h.safetensors"


def test_alone_it_needs_no_loras(tmp_path, models, made):
    answer = hyper(models, tmp_path, "--ranks", RANKS, "--form", "container", *QUICK)
    assert set(listing(tmp_path)) == {"h.safetensors", "h.hypermerge", "h.hypermerge.json"}
    assert answer["loras"] == [] and answer["prompts"] == {}
    assert answer["container"]["residual_share"] == pytest.approx(made[1]["container"]["residual_share"], rel=1e-2)


def test_q_k_and_v_of_a_fused_attention_stand_together(tmp_path):
    """A1111 applies all of them or none, so those without a change are there too."""
    family = known(3, (2, 1), own=0.2, family="sd21", divisor=64)
    for model in family.models:
        for key in model:
            if "model.transformer.resblocks" in key and "in_proj_weight" in key:
                third = len(model[key]) // 3
                model[key] = torch.cat((family.base[key][: 2 * third], model[key][2 * third :]))
    paths = family.save(tmp_path / "models", torch.float16)
    answer = hyper(paths, tmp_path / "out", "--ranks", RANKS, "--form", "container", *QUICK)
    names = {key.rpartition(".")[0] for key in load_file(tmp_path / "out" / "h.hypermerge")}
    for name in names:
        if name.endswith("_self_attn_v_proj"):
            assert {name.replace("_v_proj", f"_{other}_proj") for other in ("q", "k", "out")} <= names
    share, _ = errors_of(tmp_path / "out" / "h.hypermerge", tmp_path / "out" / "h.safetensors", paths)
    assert answer["container"]["residual_share"] == pytest.approx(share, rel=1e-3)
