"""Transfer of every family, dialect and kind of module: what stays, what becomes a plain LoRA, what is left out."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import convert_files as files
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from models import base_weights, cast, save_checkpoint
from safetensors.torch import load_file, save_file
from transfer_models import noisy, transfer

from lib_hypermerge.jobs.adapter_inputs import family_of
from lib_hypermerge.layouts.adapter_file import open_adapter
from lib_hypermerge.words import counts

FAMILY, DIVISOR = "sd15", 16
FACTORS = ("lora", "locon_cp", "loha", "loha_cp", "lokr", "lokr_full")
NEED_WEIGHT = ("ia3", "dora_input", "dora_output", "glora", "oft")
PATHS = (
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_in", "input_blocks.4.0.in_layers.2",
    "encoder.layers.0.mlp.fc1",
)  # fmt: skip


@functools.cache
def chosen() -> list:
    """A linear layer, a 1×1 and a 3×3 convolution, a text encoder's layer, large enough for rank 9."""
    found = files.layers(FAMILY, DIVISOR)
    return [next(m for m in found if m.path == path) for path in PATHS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("families")
    base = base_weights(FAMILY, DIVISOR)
    save_checkpoint(made / "source.safetensors", base)
    save_checkpoint(made / "target.safetensors", noisy(base, 0.1))
    tuned = noisy(base, 0.1)
    for module in chosen():
        key = module.weight.name
        tuned[key] = base[key]
    save_checkpoint(made / "same.safetensors", tuned)  # the chosen layers are equal in it
    return made


def made_of(kind: str, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """(a file of a family on the chosen layers, module name → its change of the source's weights)."""
    base, tensors, changes = base_weights(FAMILY, DIVISOR), {}, {}
    for i, module in enumerate(chosen()):
        weight = base[module.weight.name]
        parts, change = SAMPLES[kind](tuple(weight.shape), Dice(i))
        tensors |= {f"{module.name}.{part}": t.clone() for part, t in parts.items()}
        changes[module.name] = change(weight.double()).flatten(1)
    save_file(tensors, path)
    return path, changes


def others(lora: Path) -> dict[str, int]:
    """A file's modules that are no plain LoRAs, by what they are."""
    with open_adapter(lora) as file:
        titles = [family_of(file, entry).title for entry in file.entries.values()]
    return Counter(title for title in titles if title != "LoRA")


def off(made: dict[str, torch.Tensor], goal: dict[str, torch.Tensor]) -> float:
    error = sum(float((made[name] - goal[name]).square().sum()) for name in goal)
    return (error / sum(float(delta.square().sum()) for delta in goal.values())) ** 0.5


@pytest.mark.parametrize("kind", [*FACTORS, "full"])
def test_what_does_not_depend_on_the_weights_is_copied_as_it_is(folder, tmp_path, kind):
    lora, _ = made_of(kind, tmp_path / "in.safetensors")
    report = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out",
                      "--method", "copy")  # fmt: skip
    assert files.same_bits(load_file(tmp_path / "out.safetensors"), load_file(lora))
    assert report["actions"] == {"copied": 4}
    told = files.texts(tmp_path / "out.safetensors")["ss_network_module"]
    assert told == ("networks.lora" if kind in ("lora", "locon_cp") else "lycoris.kohya")


@pytest.mark.parametrize("kind", NEED_WEIGHT)
def test_what_depends_on_the_weights_becomes_a_plain_lora_of_the_sources_change(folder, tmp_path, kind):
    lora, changes = made_of(kind, tmp_path / "in.safetensors")
    report = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out",
                      "--method", "copy", "--rank", 300, "--dtype", "fp32")  # fmt: skip
    made = load_file(tmp_path / "out.safetensors")
    assert {key.split(".", 1)[1] for key in made} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert off(files.deltas(made), changes) < 1e-5
    assert report["actions"] == {"copied": 4}
    assert report["loras"][0]["became_plain"] == others(lora)
    small = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "small",
                     "--method", "copy", "--rank", 2, "--dtype", "fp32")  # fmt: skip
    missed = off(files.deltas(load_file(tmp_path / "small.safetensors")), changes)
    assert small["relative_error"] == small["loras"][0]["relative_error"] == pytest.approx(missed, rel=1e-3)
    told = f"{counts(others(lora))} modules became plain LoRAs of rank up to 2, of"
    assert any(told in warning and "--rank" in warning for warning in small["warnings"])
    assert small["loras"][0]["retained"] == pytest.approx(1 - missed**2, rel=1e-3)


@pytest.mark.parametrize("kind", ["dora_input", "oft", "loha"])
def test_where_the_weights_are_equal_every_family_is_copied_as_it_is(folder, tmp_path, kind):
    lora, _ = made_of(kind, tmp_path / "in.safetensors")
    report = transfer(lora, folder / "source.safetensors", folder / "same.safetensors", tmp_path / "out")
    assert files.same_bits(load_file(tmp_path / "out.safetensors"), load_file(lora))
    assert report["layers_equal"] == 4 and report["loras"][0]["became_plain"] == {} and report["warnings"] == []


@pytest.mark.parametrize("kind", [*FACTORS, "full", *NEED_WEIGHT])
def test_every_family_is_projected_as_its_whole_change_is(folder, tmp_path, kind):
    lora, changes = made_of(kind, tmp_path / "in.safetensors")
    transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out", "--method", "lora-x",
             "--rank", 300, "--dtype", "fp32")  # fmt: skip
    target, goal = load_file(folder / "target.safetensors"), {}
    for module in chosen():
        U, S, Vh = torch.linalg.svd(target[module.weight.name].double().flatten(1), full_matrices=False)
        r = int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()) + 1
        goal[module.name] = U[:, :r] @ (U[:, :r].mT @ changes[module.name] @ Vh[:r].mT) @ Vh[:r]
    assert off(files.deltas(load_file(tmp_path / "out.safetensors")), goal) < 1e-4


# --- norms, biases, embeddings --------------------------------------------------------------------------------


def norm_and_layer() -> tuple:
    found = files.layers(FAMILY, DIVISOR)
    norm = next(m for m in found if m.path == "input_blocks.4.1.transformer_blocks.0.norm1")
    layer = next(m for m in found if m.path == "input_blocks.4.1.proj_in")
    return norm, layer


@pytest.mark.parametrize("method", ["copy", "prolora"])
def test_norms_and_biases_go_along_where_sizes_agree(folder, tmp_path, method):
    norm, layer = norm_and_layer()
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    tensors = load_file(lora)
    n, rows = norm.weight.shape[0], layer.weight.shape[0]
    tensors |= {f"{norm.name}.w_norm": torch.randn(n), f"{norm.name}.b_norm": torch.randn(n),
                f"{layer.name}.diff_b": torch.randn(rows).half()}  # fmt: skip
    save_file(tensors, lora)
    report = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out",
                      "--method", method)  # fmt: skip
    made = load_file(tmp_path / "out.safetensors")
    for key in (f"{norm.name}.w_norm", f"{norm.name}.b_norm", f"{layer.name}.diff_b"):
        assert torch.equal(made[key], tensors[key]) and made[key].dtype == tensors[key].dtype
    assert report["modules"] == 5 and len(report["layers"]) == 4


def test_a_bias_without_a_place_is_told(folder, tmp_path):
    module = chosen()[0]  # to_q has no bias
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    save_file(load_file(lora) | {f"{module.name}.diff_b": torch.randn(module.weight.shape[0])}, lora)
    for method in ("copy", "prolora"):
        report = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / method,
                          "--method", method)  # fmt: skip
        assert any("1 changes of biases have no place" in warning for warning in report["warnings"])
        assert f"{module.name}.diff_b" not in load_file(tmp_path / f"{method}.safetensors")


def test_bundled_embeddings_go_along(folder, tmp_path):
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    embedding = {"bundle_emb.word.string_to_param.*": torch.randn(2, 48)}
    save_file(load_file(lora) | embedding, lora)
    transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out")
    name = next(iter(embedding))
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], embedding[name])


def test_modules_that_change_nothing_are_left_out(folder, tmp_path):
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    tensors = load_file(lora)
    tensors[f"{chosen()[1].name}.alpha"] = torch.tensor(0.0)
    save_file(tensors, lora)
    report = transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out")
    assert report["modules"] == 3
    assert any("alpha 0" in warning for warning in report["warnings"])


# --- dialects and fused layers --------------------------------------------------------------------------------


def test_a_file_of_diffusers_becomes_kohyas_for_the_target(folder, tmp_path):
    kohya = files.lora(FAMILY, only=lambda m: m.path in PATHS, divisor=DIVISOR, alpha=lambda i: 4.0)
    tensors = {}
    for module in chosen():
        for name, _, _ in files.diffusers_names(FAMILY, module):
            for mine, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
                tensors[f"{name}.{mine}.weight"] = kohya[f"{module.name}.{theirs}.weight"]
    save_file(tensors, tmp_path / "diffusers.safetensors")
    report = transfer(tmp_path / "diffusers.safetensors", folder / "source.safetensors", folder / "target.safetensors",
             tmp_path / "out", "--method", "copy")  # fmt: skip
    assert "diffusers.safetensors: its names (those of diffusers) become kohya's, in one file." in report["warnings"]
    made = files.deltas(load_file(tmp_path / "out.safetensors"))
    assert off(made, files.deltas(kohya)) == 0 and len(made) == 4


def test_parts_of_a_fused_layer_are_joined(tmp_path):
    """Flux' q, k and v, which diffusers' files keep apart: one module for all the rows that they have."""
    base = {key: w for key, w in base_weights("flux_dev", 64).items() if "blocks.0." in key or "blocks" not in key}
    save_checkpoint(tmp_path / "source.safetensors", cast(base, torch.bfloat16))
    save_checkpoint(tmp_path / "target.safetensors", cast(noisy(base, 0.05), torch.bfloat16))
    module = next(m for m in files.layers("flux_dev", 64) if m.path == "double_blocks.0.img_attn.qkv")
    n, k = module.matrix_shape
    tensors, goal = {}, torch.zeros(n, k, dtype=torch.float64)
    for i, (name, start, stop) in enumerate(files.diffusers_names("flux_dev", module)):
        if i == 1:
            continue  # k is not changed
        up, down = torch.randn(stop - start, 3).half(), torch.randn(3, k).half()
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        goal[start:stop] = up.double() @ down.double()
    save_file(tensors, tmp_path / "flux.safetensors")
    transfer(tmp_path / "flux.safetensors", tmp_path / "source.safetensors", tmp_path / "target.safetensors",
             tmp_path / "out", "--method", "copy", "--dtype", "fp32")  # fmt: skip
    made = load_file(tmp_path / "out.safetensors")
    assert len(made[f"{module.name}.lora_down.weight"]) == 6
    assert off(files.deltas(made), {module.name: goal}) < 1e-6


def test_all_four_layers_of_an_open_clip_attention_are_there_or_none(tmp_path):
    """A1111 applies them only together: where one is left out, zeros stand for it."""
    base = base_weights("sd21", 32)
    save_checkpoint(tmp_path / "source.safetensors", base)
    other = noisy(base, 0.02)
    key = next(key for key in base if key.endswith("resblocks.3.attn.out_proj.weight"))
    other[key] = torch.randn(base[key].shape) * base[key].std()
    save_checkpoint(tmp_path / "target.safetensors", other)
    attention = [m for m in files.layers("sd21", 32) if "resblocks.3.attn" in m.path]
    assert len(attention) == 4
    paths = {m.path for m in attention}
    lora = files.lora("sd21", only=lambda m: m.path in paths or m.block == "MID")
    files.save(tmp_path / "style.safetensors", lora)
    report = transfer(tmp_path / "style.safetensors", tmp_path / "source.safetensors", tmp_path / "target.safetensors",
                      tmp_path / "out")  # fmt: skip
    assert report["skipped_because"] == {"below the least similarity": 1}
    made = files.deltas(load_file(tmp_path / "out.safetensors"))
    sizes = {m.path: float(made[m.name].norm()) for m in attention}
    assert [path for path, size in sizes.items() if size == 0] == ["transformer.resblocks.3.attn.out_proj"]


def test_a_target_without_text_encoders_gets_the_rest(folder, tmp_path):
    target = {k: w for k, w in load_file(folder / "target.safetensors").items() if not k.startswith("cond_stage")}
    save_checkpoint(tmp_path / "unet.safetensors", target)
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    report = transfer(lora, folder / "source.safetensors", tmp_path / "unet.safetensors", tmp_path / "out")
    assert report["modules"] == 3 and report["skipped_because"] == {"no layer in the target": 1}
    assert any("te: the target base brings none along" in warning for warning in report["warnings"])
    lora_report = report["loras"][0]
    assert lora_report["arrived"] < lora_report["retained"]


def test_what_a_hyper_merge_or_an_extraction_made_stays_in_its_history(folder, tmp_path):
    lora, _ = made_of("lora", tmp_path / "in.safetensors")
    save_file(load_file(lora), lora, {"hypermerge": json.dumps({"job": "extract", "parents": {}})})
    transfer(lora, folder / "source.safetensors", folder / "target.safetensors", tmp_path / "out")
    recipe = json.loads(files.texts(tmp_path / "out.safetensors")["hypermerge"])
    assert recipe["parents"]["loras"]["recipe"]["job"] == "extract"
