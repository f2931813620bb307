"""restore from a container: a model, or a blend, is hyper-model + up·core·down, as one LoRA and as a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hyper_sets import HyperSet, make_set
from models import NORM, last_json, listing, lora_deltas, lora_ranks, run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_hypermerge.jobs.hyper.container import Stated, container_metadata, module_tensors
from lib_hypermerge.layouts.sd1 import SD1

LABELS = ("anna", "bert", "carl")
NORM_NAME = "lora_unet_down_blocks_1_resnets_0_norm1"
Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[HyperSet, dict[str, Deltas]]:
    """A hyper-model whose recipe has no LoRAs but a container and a remainder; and each model's change by module."""
    start = make_set(tmp_path_factory.mktemp("c"))
    generator, tensors = torch.Generator().manual_seed(0), {}
    weights, changes = start.weights(), {label: {} for label in LABELS}
    for name, key, rows in start.layers():
        shape = tuple(weights[key][rows].shape)
        n, k = shape[0], int(np.prod(shape[1:]))
        a, b = min(4, n, k), min(3, n, k)
        up, down, cores = (torch.randn(size, generator=generator).half() for size in ((n, a), (b, k), (3, a, b)))
        cores = (cores * 0.02 * float(weights[key][rows].float().norm()) / (n * k * a * b) ** 0.5 * 3).half()
        tensors |= dict(module_tensors(name, up, down, cores, shape))
        for index, label in enumerate(LABELS):
            changes[label][name] = (up.double() @ cores[index].double() @ down.double()).reshape(shape)
    recipe = replace(
        start.recipe, loras=[], multipliers={label: {} for label in LABELS}, container="fam.hypermerge",
        remainders={"carl": "fam-carl-rest"},
    )  # fmt: skip
    stated = Stated(LABELS, "fam.safetensors", SD1.base)
    save_file(tensors, start.folder / "fam.hypermerge", container_metadata(stated, recipe))
    save_file(weights, start.hyper, {"hypermerge": recipe.text()})
    rest = torch.randn(2, weights[f"{NORM}.weight"].shape[0])
    save_file({f"{NORM_NAME}.w_norm": rest[0].clone(), f"{NORM_NAME}.b_norm": rest[1].clone()},
              start.folder / "fam-carl-rest.safetensors")  # fmt: skip
    for path in start.loras:
        path.unlink()
    return replace(start, recipe=recipe), changes


def run(out: Path, *arguments) -> dict:
    result = run_cli(["restore", "--json", "--quiet", "--out", out, *arguments])
    assert result.returncode == 0, result.stderr
    return last_json(result)


def refusal(folder: Path, *arguments, code: int = 2) -> str:
    before = listing(folder)
    result = run_cli(["restore", "--json", "--quiet", *arguments])
    assert result.returncode == code and listing(folder) == before, result.stdout
    return result.stderr


def assert_close(got: Deltas, exact: Deltas, tolerance: float) -> None:
    assert got.keys() == exact.keys()
    for name, delta in exact.items():
        assert float((got[name].reshape(delta.shape) - delta).norm()) <= tolerance * float(delta.norm()), name


def blend(changes: dict[str, Deltas], unet: tuple[float, ...], te: tuple[float, ...]) -> Deltas:
    return {
        name: sum(
            (w * changes[label][name] for w, label in zip(te if "_te_" in name else unet, LABELS, strict=True)),
            torch.zeros(()).double(),
        )
        for name in changes["anna"]
    }


def test_a_model_as_one_lora_needs_no_hyper_model(made, tmp_path):
    start, changes = made
    box = start.folder / "fam.hypermerge"
    report = run(tmp_path / "o", "--container", box, "--model", "bert", "--as", "lora", "--dtype", "fp32")
    assert_close(lora_deltas(tmp_path / "o.safetensors"), changes["bert"], 1e-6)
    assert report["container"] == "fam.hypermerge" and report["hyper"] == "fam.safetensors"
    assert report["prompt"] == "<lora:o:1>" and report["relative_error"] < 1e-6
    assert report["architecture"] == "Stable Diffusion 1" and report["expected_error"] == 0.2
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "o" and metadata["ss_sd_model_name"] == "fam.safetensors"
    assert json.loads(metadata["hypermerge"])["parameters"]["model"] == "bert"
    assert str(start.folder) not in json.dumps(metadata)


def test_a_blend_of_a_rank(made, tmp_path):
    start, changes = made
    text = "anna=0.25:0.5,carl=-0.75"
    report = run(tmp_path / "o", "--hyper", start.hyper, "--multipliers", text, "--as", "lora", "--rank", 2)
    exact = blend(changes, (0.5, 0, -0.75), (0.25, 0, -0.75))
    got = lora_deltas(tmp_path / "o.safetensors")
    assert set(lora_ranks(tmp_path / "o.safetensors").values()) == {2}
    for name, delta in exact.items():
        S = np.linalg.svd(delta.flatten(1).numpy(), compute_uv=False)
        best, missed = float(np.square(S[2:]).sum()) ** 0.5, float((got[name].reshape(delta.shape) - delta).norm())
        assert best * (1 - 1e-9) <= missed <= best + 2e-3 * float(delta.norm()), name
    assert report["te_multipliers"] == {"anna": 0.25, "bert": 0.0, "carl": -0.75}


def test_a_model_as_a_checkpoint(made, tmp_path):
    """Found by the hyper-model's own recipe; the remainder is merged too."""
    start, changes = made
    report = run(tmp_path / "o", "--hyper", start.hyper, "--model", "carl", "--dtype", "fp32")
    before, got = start.weights(), load_file(tmp_path / "o.safetensors")
    layers = {name: (key, rows) for name, key, rows in start.layers()}
    differences = {name: got[key][rows].double() - before[key][rows].double() for name, (key, rows) in layers.items()}
    assert_close(differences, changes["carl"], 1e-5)
    rest = load_file(start.folder / "fam-carl-rest.safetensors")
    moved = got[f"{NORM}.weight"].double() - before[f"{NORM}.weight"].double()
    assert (moved - rest[f"{NORM_NAME}.w_norm"].double()).abs().max() < 1e-6
    touched = {key for key, _ in layers.values()} | {f"{NORM}.weight", f"{NORM}.bias"}
    assert all(torch.equal(got[key], before[key].float()) for key in before if key not in touched)
    assert report["remainder"] == "fam-carl-rest" and report["kind"] == "checkpoint"
    one = run(tmp_path / "l", "--hyper", start.hyper, "--model", "carl", "--as", "lora")
    assert one["prompt"] == "<lora:l:1><lora:fam-carl-rest:1>"


def test_beside_loras_the_error_is_the_containers_own(made, tmp_path):
    start, _ = made
    box = tmp_path / "both.hypermerge"
    loras = replace(
        start.recipe, loras=["x"], multipliers={label: {"x": 1.0} for label in LABELS}, container=box.name,
        container_models={label: 0.015 for label in LABELS}, remainders={},
    )  # fmt: skip
    stated = Stated(LABELS, "fam.safetensors", SD1.base)
    for recipe, error in ((loras, 0.015), (replace(loras, container_models=None), None)):
        save_file(load_file(start.folder / "fam.hypermerge"), box, container_metadata(stated, recipe))
        report = run(tmp_path / "o", "--container", box, "--model", "bert", "--as", "lora", "--overwrite")
        assert report["expected_error"] == error


def test_what_cannot_be_restored(made, tmp_path):
    start, _ = made
    box, out = start.folder / "fam.hypermerge", ["--out", tmp_path / "o"]
    assert "anna, bert, carl" in refusal(tmp_path, "--container", box, *out, "--as", "lora", "--model", "dora")
    assert "anna, bert, carl" in refusal(tmp_path, "--container", box, *out, "--as", "lora", "--multipliers", "x=1")
    assert "hyper" in refusal(tmp_path, "--container", box, *out, "--model", "anna")
    assert "0" in refusal(tmp_path, "--container", box, *out, "--as", "lora", "--multipliers", "0,0,0")
    assert "Both" in refusal(tmp_path, "--container", box, *out, "--as", "lora", "--model", "anna", "--lora", box)
    said = refusal(tmp_path, "--container", tmp_path / "none.hypermerge", *out, "--as", "lora", "--model", "anna")
    assert "none.hypermerge" in said
    assert "container" in refusal(tmp_path, "--container", start.hyper, *out, "--as", "lora", "--model", "anna")
    for name, text in (
        ("moved", start.recipe.text()),
        ("none", start.recipe.text().replace('"fam.hyper', '"un.hyper')),
    ):
        save_file(start.weights(), tmp_path / f"{name}.safetensors", {"hypermerge": text})
        said = refusal(tmp_path, "--hyper", tmp_path / f"{name}.safetensors", *out, "--model", "anna")
        assert "is missing" in said
    tensors = load_file(box)
    key = next(key for key in tensors if key.endswith(".cores"))
    tensors[key][0, 0, 0] = float("nan")
    with safe_open(box, "pt") as file:
        save_file(tensors, tmp_path / "bad.hypermerge", file.metadata())
    for more in (["--as", "lora"], ["--hyper", start.hyper]):
        said = refusal(tmp_path, "--container", tmp_path / "bad.hypermerge", *out, "--model", "anna", *more)
        assert key in said and "finite" in said
