"""merge: what a prompt would show, written into the checkpoint, tensor by tensor, and nothing else touched."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch
from adapter_samples import SAMPLES, Dice
from models import (
    ATTENTION,
    base_weights,
    cast,
    extract,
    last_json,
    rank_change,
    reachable,
    run_cli,
    save_checkpoint,
    save_pair,
    tuned_weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FAMILIES = ("sd15", "sd21", "sdxl")
Layer = tuple[str, str, slice]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """family → a narrow fp16 checkpoint with a VAE, a marker, EMA copies and metadata."""

    @functools.cache
    def make(family: str) -> Path:
        weights = cast(base_weights(family), torch.float16)
        weights["v_pred"] = torch.zeros(0)
        weights["model_ema.decay"] = torch.tensor(0.99)
        path = tmp_path_factory.mktemp(family) / "model.safetensors"
        save_file(weights, path, {"format": "pt", "modelspec.title": "old", "modelspec.hash_sha256": "0x1", "a": "b"})
        return path

    return make


def write_lora(path: Path, layers: list[Layer], shapes: dict, family: str, seed: int = 0) -> dict[str, tuple]:
    """A file of one module per layer; returns (tensor, rows, change) by module name."""
    dice, tensors, changes = Dice(seed), {}, {}
    for name, key, rows in layers:
        shape = (rows.stop - rows.start, *shapes[key][1:])
        parts, change = SAMPLES[family](shape, dice)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        changes[name] = (key, rows, change)
    save_file(tensors, path)
    return changes


def applied(weights: dict, changes: dict[str, tuple], unet: float, te: float) -> dict[str, torch.Tensor]:
    """The oracle: float64 sums over the changed tensors."""
    out = {key: weights[key].double() for key, _, _ in changes.values()}
    for name, (key, rows, change) in changes.items():
        strength = te if name.startswith("lora_te") else unet
        part = out[key][rows].clone()
        out[key][rows] = part + strength * change(part)
    return out


def merge(*arguments) -> dict:
    result = run_cli(["merge", "--json", "--quiet", *arguments])
    assert result.returncode == 0, result.stderr
    return last_json(result)


def refused(*arguments) -> str:
    result = run_cli(["merge", "--json", "--quiet", *arguments])
    assert result.returncode == 2, result.stdout
    return result.stderr


def rounded(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers. torch goes from float64 to 16 bits by way of float32, which rounds twice."""
    if dtype == torch.float16:
        return torch.from_numpy(exact.numpy().astype("float16"))
    return exact.to(dtype)


def assert_rounded(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Nearly all numbers are the nearest to the exact ones, and the others are next to it."""
    wrong = whole = 0
    for key, expected in exact.items():
        kind = torch.finfo(got[key].dtype)
        nearest = rounded(expected, got[key].dtype)
        # float32 sums of large numbers may come out small
        least = max(kind.tiny * kind.eps, 1e-6 * float(expected.abs().max()))
        spacing = (nearest.double().abs() * kind.eps).clamp_min(least)
        assert ((got[key].double() - expected).abs() <= 1.01 * spacing).all(), key
        wrong += int((got[key] != nearest).sum())
        whole += expected.numel()
    assert wrong <= 2e-3 * whole + 1, wrong / whole


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_on_every_architecture(checkpoint, tmp_path, family, kind):
    path = checkpoint(family)
    weights = load_file(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    changes = write_lora(tmp_path / "lora.safetensors", list(reachable(path)), shapes, kind)
    out = tmp_path / "out.safetensors"
    report = merge("--checkpoint", path, "--lora", tmp_path / "lora.safetensors", 0.8, -0.5, "--out", out)
    merged = load_file(out)
    exact = applied(weights, changes, 0.8, -0.5)
    assert_rounded(merged, exact)
    assert all(torch.equal(merged[key], weights[key]) for key in weights if key not in exact)
    assert list(merged) == list(weights)
    assert (report["modules"], report["unreachable"], report["skipped"]) == (len(changes), 0, 0)
    assert report["outputs"][0]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()


def test_the_source_is_carried_over_and_named(checkpoint, tmp_path):
    path, out = checkpoint("sd15"), tmp_path / "mixed.safetensors"
    layers = [layer for layer in reachable(path) if layer[1] == ATTENTION]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    write_lora(tmp_path / "lora.safetensors", layers, shapes, "lora")
    report = merge("--checkpoint", path, "--lora", tmp_path / "lora.safetensors", "--out", out)
    with safe_open(out, "pt") as merged, safe_open(path, "pt") as source:
        metadata = merged.metadata()
        assert set(merged.keys()) == set(source.keys())
    assert (metadata["a"], metadata["format"], metadata["modelspec.title"]) == ("b", "pt", "mixed")
    assert "modelspec.hash_sha256" not in metadata
    recipe = json.loads(metadata["hypermerge"])
    assert [parent["name"] for parent in recipe["parents"]] == ["model.safetensors", "lora.safetensors"]
    assert recipe["parameters"]["loras"][0]["lora"] == "lora.safetensors"
    assert not any(str(folder) in text for text in metadata.values() for folder in (tmp_path, path.parent))
    assert recipe["parameters"]["loras"][0]["weight"] == 1.0
    assert json.loads(metadata["sd_merge_recipe"])["type"] == "hypermerge"
    assert (report["changed_tensors"], report["modules"]) == (1, 1)


def test_a_merge_of_merges_keeps_its_ancestry(checkpoint, tmp_path):
    path = checkpoint("sd15")
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    write_lora(tmp_path / "l.safetensors", [x for x in reachable(path) if x[1] == ATTENTION], shapes, "lora")
    merge("--checkpoint", path, "--lora", tmp_path / "l.safetensors", "--out", tmp_path / "a")
    merge("--checkpoint", tmp_path / "a.safetensors", "--lora", tmp_path / "l.safetensors", "--out", tmp_path / "b")
    with safe_open(tmp_path / "b.safetensors", "pt") as merged:
        recipe = json.loads(merged.metadata()["hypermerge"])
    assert [parent["name"] for parent in recipe["parents"][0]["made"]["parents"]] == [path.name, "l.safetensors"]


def test_loras_are_applied_one_after_another(checkpoint, tmp_path):
    path, out = checkpoint("sd15"), tmp_path / "out.safetensors"
    weights = load_file(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    layers = [layer for layer in reachable(path) if layer[1] == ATTENTION]
    exact = {ATTENTION: weights[ATTENTION].double()}
    arguments = []
    for seed, (kind, weight) in enumerate([("lora", 0.7), ("dora_input", 1.0), ("lokr", -0.3)]):
        lora = tmp_path / f"{seed}.safetensors"
        changes = write_lora(lora, layers, shapes, kind, seed)
        exact = applied(exact, changes, weight, 0)
        arguments += ["--lora", lora, weight]
    merge("--checkpoint", path, *arguments, "--out", out)
    assert_rounded(load_file(out), exact)


@pytest.mark.parametrize(
    ("option", "component", "dtype"),
    [
        (("--dtype", "fp32"), "model.diffusion_model.", torch.float32),
        (("--dtype", "bf16"), "model.diffusion_model.", torch.bfloat16),
        (("--te-dtype", "fp32"), "cond_stage_model.", torch.float32),
        (("--vae-dtype", "fp32"), "first_stage_model.", torch.float32),
    ],
)
def test_formats_per_component(checkpoint, tmp_path, option, component, dtype):
    path, out = checkpoint("sd15"), tmp_path / "out.safetensors"
    weights = load_file(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    changes = write_lora(tmp_path / "l.safetensors", list(reachable(path)), shapes, "lora")
    merge("--checkpoint", path, "--lora", tmp_path / "l.safetensors", 0.5, "--out", out, *option)
    exact = applied(weights, changes, 0.5, 0.5)
    merged = load_file(out)
    assert_rounded(merged, exact)
    for key, tensor in merged.items():
        own = key.startswith(component) and weights[key].is_floating_point()
        assert tensor.dtype == (dtype if own else weights[key].dtype), key
        assert key in exact or torch.equal(tensor, weights[key].to(tensor.dtype))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_for_matrices_only(checkpoint, tmp_path, name):
    path, out = checkpoint("sd15"), tmp_path / "out.safetensors"
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    changes = write_lora(tmp_path / "l.safetensors", list(reachable(path)), shapes, "lora")
    merge("--checkpoint", path, "--lora", tmp_path / "l.safetensors", "--out", out, "--dtype", name)
    merged, exact = load_file(out), applied(load_file(path), changes, 1, 1)
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    assert merged[ATTENTION].dtype == dtype
    assert merged["model.diffusion_model.out.0.weight"].dtype == torch.float16
    nearest = exact[ATTENTION].float().to(dtype)
    assert (merged[ATTENTION].float() == nearest.float()).double().mean() > 0.99


def test_block_weights_reach_their_blocks(checkpoint, tmp_path):
    path, out = checkpoint("sd15"), tmp_path / "out.safetensors"
    weights = load_file(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    changes = write_lora(tmp_path / "l.safetensors", list(reachable(path)), shapes, "lora")
    blocks = "IN00-IN03=0, IN04=0.5, MID=0, BASE=0, default=1"
    report = merge("--checkpoint", path, "--lora", tmp_path / "l.safetensors", 2, "--out", out, "--blocks", blocks)
    merged, zeroed, got, exact = load_file(out), 0, {}, {}
    for name, (key, rows, change) in changes.items():
        where = key.split(".")
        off = where[0] == "cond_stage_model" or "middle_block" in where
        off = off or (where[2] == "input_blocks" and int(where[3]) <= 3)
        factor = 0 if off else 1 if where[2:4] == ["input_blocks", "4"] else 2
        zeroed += factor == 0
        part = weights[key][rows].double()
        got[name], exact[name] = merged[key][rows], part + factor * change(part)
    assert_rounded(got, exact)
    assert report["skipped"] == zeroed == report["skipped_because"]["weight 0"]


def test_extract_and_merge_back(tmp_path):
    base = base_weights("sd15")
    paths = save_pair(tmp_path, base, tuned_weights(base, rank_change(6)), torch.float16)
    report = extract(*paths, tmp_path / "lora.safetensors", "--rank", 4)
    merge("--checkpoint", paths[0], "--lora", tmp_path / "lora.safetensors", "--out", tmp_path / "back.safetensors")
    before, tuned, back = (load_file(p) for p in (*paths, tmp_path / "back.safetensors"))
    missed = whole = 0.0
    for _, key, rows in reachable(paths[0]):
        missed += float((tuned[key][rows].double() - back[key][rows].double()).square().sum())
        whole += float((tuned[key][rows].double() - before[key][rows].double()).square().sum())
    # the merged file is fp16: its own rounding, one part in 2^12 of the weights, comes on top
    assert (missed / whole) ** 0.5 == pytest.approx(report["relative_error"], rel=0.02, abs=0.004)


def test_from_a_pickle(checkpoint, tmp_path):
    weights = {key: tensor.clone() for key, tensor in load_file(checkpoint("sd15")).items()}
    pickled = save_checkpoint(tmp_path / "old.ckpt", weights)
    layers = [layer for layer in reachable(checkpoint("sd15")) if layer[1] == ATTENTION]
    write_lora(tmp_path / "l.safetensors", layers, {k: tuple(t.shape) for k, t in weights.items()}, "loha")
    for source, name in ((pickled, "a"), (checkpoint("sd15"), "b")):
        merge("--checkpoint", source, "--lora", tmp_path / "l.safetensors", "--out", tmp_path / f"{name}.safetensors")
    a, b = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
