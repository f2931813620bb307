"""How alike files are: cosines of dense float64 changes, whatever the dialect and family; checkpoints by values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES
from dialect_files import ARCHITECTURES, DIALECTS, checkpoint_weights, layers, save_distinct, save_lora
from models import base_weights, cast, is_vae, rank_change, save_checkpoint, tuned_weights
from safetensors.torch import load_file, save_file
from test_inspect import deltas, inspect, save_family

from lib_hypermerge.jobs import inspect_weights


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (checkpoint, its layers)"""
    folder = tmp_path_factory.mktemp("alike")
    checkpoints = {family: save_distinct(folder, family) for family in ARCHITECTURES}
    return {family: (path, layers(family, path)) for family, path in checkpoints.items()}


def cosine(a: dict, b: dict) -> float:
    """Over everything that either changes; what the other does not change is zero there."""
    inner = sum(float((a[key] * b[key]).sum()) for key in a.keys() & b.keys())
    norms = [np.sqrt(sum(float((x**2).sum()) for x in side.values())) for side in (a, b)]
    return inner / (norms[0] * norms[1])


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_one_lora_is_itself_in_every_dialect(made, tmp_path, family):
    checkpoint, all_layers = made[family]
    dialects = [name for name in DIALECTS if name not in ("bare", "lycoris", "attention processors")]
    files = [save_lora(tmp_path / f"{name}.safetensors", all_layers, DIALECTS[name][0]) for name in dialects]
    (item,) = inspect(*files, "--base", checkpoint)["similarity"]
    assert (item["kind"], item["of"], item["files"]) == ("adapters", "changes", list(range(len(files))))
    assert np.abs(np.array(item["cosine"]) - 1).max() < 1e-12
    assert np.unique(item["shared_layers"]) == [len(all_layers)]
    assert item["left_out"] == {}


def test_different_families_are_compared_by_what_they_change(made, tmp_path):
    checkpoint, _ = made["sd15"]
    files, expected = [], []
    for seed, family in enumerate(SAMPLES):
        files.append(tmp_path / f"{family}.safetensors")
        expected.append(deltas(save_family(files[-1], family, seed)))
    (item,) = inspect(*files, "--base", checkpoint)["similarity"]
    for i, a in enumerate(expected):
        for j, b in enumerate(expected):
            assert item["cosine"][i][j] == pytest.approx(cosine(a, b), abs=2e-6)
    assert item["left_out"] == {}


def test_a_part_of_a_lora_is_alike_as_far_as_it_goes(tmp_path):
    changes = deltas(save_family(tmp_path / "a.safetensors", "lora"))
    dropped = list(changes)[0]
    tensors = load_file(tmp_path / "a.safetensors")
    save_file({k: t for k, t in tensors.items() if not k.startswith(dropped)}, tmp_path / "b.safetensors")
    (item,) = inspect(tmp_path / "a.safetensors", tmp_path / "b.safetensors")["similarity"]
    part = {name: delta for name, delta in changes.items() if name != dropped}
    assert item["cosine"][0][1] == pytest.approx(cosine(changes, part), abs=1e-6)
    assert item["shared_layers"] == [[4, 3], [3, 3]]
    assert item["components"]["te"]["cosine"][0][1] == pytest.approx(1, abs=1e-6)


def test_what_needs_the_base_is_left_out_without_it_and_counted(tmp_path):
    for seed, family in enumerate(("lora", "dora_input")):
        save_family(tmp_path / f"{family}.safetensors", family, seed)
    report = inspect(tmp_path / "lora.safetensors", tmp_path / "dora_input.safetensors")
    (item,) = report["similarity"]
    assert sum(item["left_out"].values()) == 4
    assert item["cosine"] == [[pytest.approx(1), None], [None, None]]
    assert "Not in the comparison: 4" in report["warnings"][0]


def test_loras_for_different_architectures_are_not_compared(made, tmp_path):
    files = [save_lora(tmp_path / f"{f}.safetensors", made[f][1], DIALECTS["kohya"][0]) for f in ("sd15", "sdxl")]
    report = inspect(*files)
    assert report["similarity"] == []
    assert [file["architecture"] for file in report["files"]] == ["sd1", "sdxl"]


# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A base, two fine-tunes of it, and their files; the second in fp16, without the VAE."""
    folder = tmp_path_factory.mktemp("checkpoints")
    base = base_weights("sd15")
    all_weights = [base, *(tuned_weights(base, rank_change(2), seed) for seed in (1, 2))]
    all_weights[2] = cast({key: w for key, w in all_weights[2].items() if not is_vae(key)}, torch.float16)
    files = [save_checkpoint(folder / f"{i}.safetensors", weights) for i, weights in enumerate(all_weights)]
    return all_weights, files


def vectors(all_weights) -> list[np.ndarray]:
    """Every value of UNet and text encoder, float64."""
    keys = sorted(key for key, w in all_weights[0].items() if not is_vae(key) and w.is_floating_point())
    return [np.concatenate([weights[key].double().numpy().ravel() for key in keys]) for weights in all_weights]


def test_checkpoints_are_compared_by_their_weights(tuned):
    all_weights, files = tuned
    (item,) = inspect(*files)["similarity"]
    assert (item["kind"], item["of"], item["base"]) == ("checkpoints", "weights", None)
    flat = vectors(all_weights)
    assert item["values"] == item["all_values"] == len(flat[0])
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            assert item["cosine"][i][j] == pytest.approx(a @ b / norms, abs=1e-12)
            assert item["distance"][i][j] == pytest.approx(np.linalg.norm(a - b) / np.sqrt(norms), abs=1e-7)


def test_against_a_base_they_are_compared_by_their_changes(tuned):
    all_weights, files = tuned
    (item,) = inspect(files[1], files[2], "--base", files[0])["similarity"]
    assert (item["of"], item["base"], item["files"]) == ("changes", files[0].name, [0, 1])
    base, *changed = vectors(all_weights)
    a, b = (x - base for x in changed)
    assert item["cosine"][0][1] == pytest.approx(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), abs=1e-9)


def test_large_ones_are_sampled_and_that_is_said(tuned, monkeypatch):
    _, files = tuned
    (whole,) = inspect(*files)["similarity"]
    monkeypatch.setattr(inspect_weights, "_SAMPLE", 1 << 18)
    monkeypatch.setattr(inspect_weights, "_WHOLE", 1 << 6)
    monkeypatch.setattr(inspect_weights, "_PIECE", 1 << 10)
    (sample,) = inspect(*files)["similarity"]
    assert 0.2 < sample["values"] / sample["all_values"] < 0.5
    assert np.abs(np.array(sample["cosine"]) - np.array(whole["cosine"])).max() < 1e-3
    (full,) = inspect(*files, "--similarity", "full")["similarity"]
    assert full["values"] == full["all_values"]
    assert full["cosine"] == [[pytest.approx(c, abs=1e-12) for c in row] for row in whole["cosine"]]
    assert inspect(*files, "--similarity", "none")["similarity"] == []


def test_a_damaged_value_does_not_spoil_the_comparison(tuned, tmp_path):
    all_weights, files = tuned
    damaged = {key: w.clone() for key, w in all_weights[1].items()}
    key = next(key for key, w in damaged.items() if key.endswith("attn1.to_q.weight"))
    damaged[key][0, 0] = float("nan")
    report = inspect(files[0], save_checkpoint(tmp_path / "nan.safetensors", damaged))
    (item,) = report["similarity"]
    assert item["cosine"][0][1] == pytest.approx(inspect(*files[:2])["similarity"][0]["cosine"][0][1], abs=1e-5)
    assert "1 values of the checkpoints are NaN or Inf" in report["warnings"][0]


def test_kinds_with_other_layers_are_not_compared(tuned, tmp_path):
    _, files = tuned
    other = save_checkpoint(tmp_path / "2.safetensors", checkpoint_weights("sd21"))
    report = inspect(files[0], other, files[1])
    assert [item["files"] for item in report["similarity"]] == [[0, 2]]


def test_what_one_file_fuses_and_the_other_keeps_apart_is_compared_row_by_row(tmp_path):
    """Flux: q, k and v of diffusers' file against the fused layer of kohya's."""
    weights = base_weights("flux_dev")
    checkpoint = save_checkpoint(tmp_path / "flux.safetensors", weights)
    width = weights["model.diffusion_model.double_blocks.0.img_attn.proj.weight"].shape[0]
    generator = torch.Generator().manual_seed(3)
    split, fused = {}, {}
    for block in range(2):
        sizes = ((width, 2), (2, width))
        pairs = [tuple(torch.randn(size, generator=generator) for size in sizes) for _ in "qkv"]
        for part, (up, down) in zip("qkv", pairs, strict=True):
            name = f"transformer.transformer_blocks.{block}.attn.to_{part}"
            split |= {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
        name = f"lora_unet_double_blocks_{block}_img_attn_qkv"
        fused |= {f"{name}.lora_up.weight": torch.block_diag(*(up for up, _ in pairs)),
                  f"{name}.lora_down.weight": torch.cat([down for _, down in pairs])}  # fmt: skip
    save_file(split, tmp_path / "split.safetensors")
    save_file(fused, tmp_path / "fused.safetensors")
    save_file({k: t for k, t in split.items() if ".to_q" in k}, tmp_path / "queries.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in ("split", "fused", "queries")]
    report = inspect(*files, "--base", checkpoint)
    assert [file["dialect"] for file in report["files"]] == ["diffusers", "kohya", "diffusers"]
    (item,) = report["similarity"]
    assert item["cosine"][0][1] == pytest.approx(1, abs=1e-12)
    products = [split[k.replace("lora_A", "lora_B")].double() @ split[k].double() for k in split if "lora_A" in k]
    queries = [split[k.replace("lora_A", "lora_B")].double() @ split[k].double() for k in split if "to_q.lora_A" in k]
    norms = [sum(float((p**2).sum()) for p in side) ** 0.5 for side in (products, queries)]
    for row in (0, 1):
        assert item["cosine"][row][2] == pytest.approx(norms[1] / norms[0], abs=1e-9)
    assert [file["hosts"]["a1111"]["verdict"] for file in report["files"]] == ["refused"] * 3
    assert [file["hosts"]["forge"]["verdict"] for file in report["files"]] == ["all"] * 3
