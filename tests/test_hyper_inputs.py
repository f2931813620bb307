"""The checkpoints of a hyper-merge: each layer's rows are the file's own numbers."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hyper_rows import assert_rows, family, flat, opened, read, tensors_of, write_lora
from models import ATTENTION, CONVOLUTION, UNET, Weights, cast, save_checkpoint
from safetensors.torch import save_file

from lib_hypermerge.errors import InputChangedError
from lib_hypermerge.jobs.hyper import sources
from lib_hypermerge.jobs.hyper.inputs import unique_labels
from lib_hypermerge.layouts.dialects import diffusers
from lib_hypermerge.layouts.opening import open_checkpoint


def interleaved(weights: Weights) -> Weights:
    """Convolutions channels last, one matrix turned: torch.save keeps their strides."""
    out = {k: w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for k, w in weights.items()}
    out[ATTENTION] = weights[ATTENTION].mT.contiguous().mT
    return out


FORMATS = {
    "fp32": (torch.float32, ".safetensors"), "fp16": (torch.float16, ".safetensors"),
    "bf16": (torch.bfloat16, ".safetensors"), "fp64": (torch.float64, ".safetensors"),
    "fp8": (torch.float8_e4m3fn, ".safetensors"), "pickle": (torch.float16, ".ckpt"),
    "pickle bf16": (torch.bfloat16, ".ckpt"), "strided": (torch.float32, ".pt"), "strided fp16": (torch.float16, ".pt"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMATS)
def test_rows_are_the_files_own_numbers(tmp_path, form):
    dtype, suffix = FORMATS[form]
    stored = [cast(weights, dtype) for weights in family()[:2]]
    if form.startswith("strided"):
        stored = [interleaved(weights) for weights in stored]
    paths = [save_checkpoint(tmp_path / f"{name}{suffix}", w) for name, w in zip("ab", stored, strict=True)]
    inputs = opened(paths)
    places = tensors_of(paths[0])
    assert {layer.module.name for layer in inputs.layers} == places.keys()
    for layer in inputs.layers:
        key, rows = places[layer.module.name]
        for source, weights in zip(inputs.sources, stored, strict=True):
            assert_rows(source, layer, flat(weights[key][rows]))
    inputs.close()


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_parts_of_fused_weights_are_layers_of_their_own(tmp_path, name):
    models = family(name, 2)
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", weights) for i, weights in enumerate(models)]
    inputs = opened(paths)
    fused = [layer for layer in inputs.layers if layer.module.part]
    places = tensors_of(paths[0])
    assert len(fused) >= 3
    for layer in fused:
        key, rows = places[layer.module.name]
        for source, weights in zip(inputs.sources, models, strict=True):
            assert_rows(source, layer, flat(weights[key][rows]))
    inputs.close()


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_layers_stand_as_in_the_first_models_file(tmp_path, name):
    """Fused parts beside each other, in the order of their rows."""
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", w) for i, w in enumerate(family(name, 2))]
    inputs = opened(paths)
    places = tensors_of(paths[0])
    tensors = inputs.template.file.tensors
    order = [
        (tensors[places[layer.module.name][0]].offset, places[layer.module.name][1].start) for layer in inputs.layers
    ]
    assert order == sorted(order)
    assert len({layer.key for layer in inputs.layers}) == len(inputs.layers)
    parts = [layer.module.part for layer in inputs.layers if layer.module.part]
    assert "".join(parts) == "qkv" * (len(parts) // 3)
    inputs.close()


def test_shards_and_their_index(tmp_path):
    whole, split = family()[:2]
    keys = sorted(split)
    pieces = {f"m-0000{i + 1}-of-00003.safetensors": keys[i::3] for i in range(3)}
    for name, own in pieces.items():
        save_file({key: split[key].contiguous() for key in own}, tmp_path / name)
    index = {"metadata": {}, "weight_map": {key: name for name, own in pieces.items() for key in own}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    paths = [save_checkpoint(tmp_path / "a.safetensors", whole), tmp_path / "m.safetensors.index.json"]
    inputs = opened(paths)
    assert inputs.labels == ["a", "m"]
    places = tensors_of(paths[0])
    for layer in inputs.layers:
        key, rows = places[layer.module.name]
        assert_rows(inputs.sources[1], layer, flat(split[key][rows]))
    inputs.close()


def as_folder(folder: Path, weights: Weights, single: Path) -> Path:
    """The same model as diffusers lays it out, written by hand; te and UNet only."""
    unet, model = {}, open_checkpoint(single)
    for module in model.components["unet"].values():
        key = f"{UNET}{module.path}"
        for piece in diffusers.pieces("sd1", module):
            unet[f"{piece.path}.weight"] = weights[f"{key}.weight"].contiguous()
            if f"{key}.bias" in weights:
                unet[f"{piece.path}.bias"] = weights[f"{key}.bias"].contiguous()
    model.file.close()
    text = {k.removeprefix("cond_stage_model.transformer."): w for k, w in weights.items() if k.startswith("cond")}
    for name, tensors, file in (("unet", unet, "diffusion_pytorch_model"), ("text_encoder", text, "model")):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
        save_file(tensors, folder / name / f"{file}.safetensors")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_folder_of_diffusers_beside_a_single_file(tmp_path):
    first, second = family()[:2]
    paths = [save_checkpoint(tmp_path / f"{name}.safetensors", w) for name, w in (("a", first), ("b", second))]
    folder = as_folder(tmp_path / "pipe.line", second, paths[1])
    inputs, places = opened([paths[0], folder]), tensors_of(paths[0])
    assert inputs.labels == ["a", "pipe.line"]
    assert {layer.module.name for layer in inputs.layers} == places.keys()
    for layer in inputs.layers:
        key, rows = places[layer.module.name]
        assert_rows(inputs.sources[1], layer, flat(second[key][rows]))
    inputs.close()


def test_other_prefixes_of_the_same_layers(tmp_path):
    """The oldest SD1 files lack `text_model.`; a file of the UNet alone may lack all before it."""
    first, second = family()[:2]
    old = {k.replace("transformer.text_model.", "transformer."): w for k, w in second.items()}
    assert old.keys() != second.keys()
    paths = [save_checkpoint(tmp_path / "new.safetensors", first), save_checkpoint(tmp_path / "old.ckpt", old)]
    for order in (paths, paths[::-1]):
        inputs, places = opened(order, ranks="1"), tensors_of(paths[0])
        assert {layer.module.name for layer in inputs.layers} == places.keys()
        assert not inputs.warnings
        for layer in inputs.layers:
            key, rows = places[layer.module.name]
            assert_rows(inputs.sources[order.index(paths[1])], layer, flat(second[key][rows]))
        inputs.close()


def test_rows_go_into_any_memory_and_into_no_fresh_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_PIECE", 64)  # many small reads
    stored = [cast(w, torch.float16) for w in family()[:2]]
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", w) for i, w in enumerate(stored)]
    inputs = opened(paths)
    layer = next(layer for layer in inputs.layers if layer.module.weight.name == CONVOLUTION)
    n, k = layer.shape
    wide = torch.zeros(n, k + 5, dtype=torch.float64)
    inputs.sources[1].rows_into(layer, 0, n, wide[:, 2 : k + 2])
    assert torch.equal(wide[:, 2 : k + 2], stored[1][CONVOLUTION].double().flatten(1))
    assert float(wide[:, :2].abs().sum()) == 0 == float(wide[:, k + 2 :].abs().sum())
    half = torch.empty(n, k, dtype=torch.bfloat16)
    inputs.sources[0].rows_into(layer, 0, n, half)
    assert torch.equal(half, stored[0][CONVOLUTION].flatten(1).bfloat16())
    inputs.close()


def test_threads_do_not_disturb_each_other(tmp_path):
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", cast(w, torch.float16)) for i, w in enumerate(family())]
    lora, _ = write_lora(tmp_path / "lora.safetensors", paths[0], "dora_input")
    inputs = opened([*paths[1:], lora], paths[0])
    truth = {(source.label, layer.key): read(source, layer, 0, layer.shape[0])
             for source in inputs.sources for layer in inputs.layers}  # fmt: skip
    barrier = threading.Barrier(4)

    def work(seed: int) -> bool:
        dice = random.Random(seed)
        barrier.wait()
        for _ in range(300):
            source, layer = dice.choice(inputs.sources), dice.choice(inputs.layers)
            start = dice.randrange(layer.shape[0])
            stop = dice.randint(start, layer.shape[0])
            if not torch.equal(read(source, layer, start, stop), truth[source.label, layer.key][start:stop]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    inputs.close()


@pytest.mark.parametrize(
    ("stems", "labels"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "A"], ["a", "a (2)", "A (3)"]),
        (["a", "a", "a (2)"], ["a", "a (3)", "a (2)"]),
        (["a (2)", "a", "a"], ["a (2)", "a", "a (3)"]),
    ],
)
def test_labels_are_unique(stems, labels):
    assert unique_labels(stems) == labels


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", w) for i, w in enumerate(family())]
    inputs = opened(paths)
    inputs.check_unchanged()
    save_checkpoint(paths[2], family()[0])
    with pytest.raises(InputChangedError, match="2.safetensors"):
        inputs.check_unchanged()
    inputs.close()
