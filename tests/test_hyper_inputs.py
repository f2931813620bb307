"""The models of a hyper-merge: each layer's rows are the file's own numbers, or the change that a LoRA makes."""

from __future__ import annotations

import functools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from families_naive import CASES, CONV1, CONV3, LINEAR, NORM, dora, magnitudes
from models import (
    ATTENTION,
    CONVOLUTION,
    SD1_TEXT,
    UNET,
    Weights,
    base_weights,
    cast,
    last_json,
    lora_deltas,
    rank_change,
    reachable,
    run_cli,
    save_checkpoint,
    tuned_weights,
)
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import InputChangedError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.hyper import lora_source, sources
from lib_hypermerge.jobs.hyper.inputs import Inputs, Layer, Source, blame, open_inputs, unique_labels
from lib_hypermerge.jobs.hyper.spec import HyperSpec
from lib_hypermerge.layouts.dialects import diffusers
from lib_hypermerge.layouts.opening import open_checkpoint
from lib_hypermerge.layouts.tables import narrow, shapes

PROJECTION = UNET + "input_blocks.4.1.proj_in.weight"


def opened(models: list[Path], base: Path | None = None, host=None, **more) -> Inputs:
    values = {"models": [str(path) for path in models], "name": "h", "ranks": "2,1", **more}
    return open_inputs(HyperSpec.from_json(values | ({"base": str(base)} if base else {})), host or PathHost())


@functools.cache
def family(name: str = "sd15", count: int = 3) -> list[Weights]:
    base = base_weights(name)
    return [tuned_weights(base, rank_change(3), seed=seed) for seed in range(count)]


def flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().flatten(1)


def read(source: Source, layer: Layer, start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start, layer.shape[1]), float("nan"))
    source.rows_into(layer, start, stop, out)
    return out


def assert_rows(source: Source, layer: Layer, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    """All rows at once, and a few ranges of them in any order."""
    n = layer.shape[0]
    assert expected.shape == layer.shape
    ranges = [(0, n), (n // 2, n), (0, 1), (n - 1, n), (n // 3, max(n // 3, 2 * n // 3)), (1, 1)]
    for start, stop in ranges:
        got, true = read(source, layer, start, stop).double(), expected[start:stop].double()
        assert got.shape == true.shape
        assert float((got - true).norm()) <= tolerance * float(expected.norm()), (layer.key, start, stop)


@functools.cache
def tensors_of(path: Path) -> dict[str, tuple[str, slice]]:
    return {name: (key, rows) for name, key, rows in reachable(path)}


numbers_of = functools.cache(load_file)  # of files that stay as they are


# --- checkpoints ------------------------------------------------------------------------------------------------


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


# --- LoRAs --------------------------------------------------------------------------------------------------------


def write_lora(path: Path, checkpoint: Path, kind: str, only=lambda name: True, seed: int = 0) -> tuple[Path, dict]:
    """One module per layer; returns what each changes as a function of its weight."""
    dice, tensors, changes = Dice(seed), {}, {}
    stored = numbers_of(checkpoint)
    for name, (key, rows) in tensors_of(checkpoint).items():
        if only(name):
            parts, changes[name] = SAMPLES[kind](tuple(stored[key][rows].shape), dice)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path)
    return path, changes


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """family → a narrow fp16 checkpoint."""

    @functools.cache
    def make(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "base.safetensors"
        return save_checkpoint(path, cast(base_weights(name), torch.float16))

    return make


def some(name: str) -> bool:
    """A few layers of every kind and component, parts of fused ones among them."""
    return "mid_block" in name or "middle_block" in name or "conv_in" in name or "_layers_3_" in name


@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_loras_rows_are_its_change_of_the_base(bases, tmp_path, name, kind):
    base = bases(name)
    lora, changes = write_lora(tmp_path / "a.safetensors", base, kind, some)
    other, _ = write_lora(tmp_path / "b.safetensors", base, "lora", lambda name: some(name) and "attn1" in name)
    inputs, stored, places = opened([lora, other], base), numbers_of(base), tensors_of(base)
    assert [source.relative for source in inputs.sources] == [True, True]
    assert inputs.template is inputs.base and inputs.models == []
    assert {layer.module.name for layer in inputs.layers} == changes.keys()
    for layer in inputs.layers:
        key, rows = places[layer.module.name]
        weight = stored[key][rows].double()
        assert_rows(inputs.sources[0], layer, changes[layer.module.name](weight).flatten(1), 2e-5)
        if "attn1" not in layer.module.name:  # the other one does not reach it
            assert float(read(inputs.sources[1], layer, 0, layer.shape[0]).abs().max()) == 0
    inputs.close()


PLACES = {LINEAR: ATTENTION, CONV1: PROJECTION, CONV3: CONVOLUTION}
NAMES = {
    LINEAR: "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    CONV1: "lora_unet_down_blocks_1_attentions_0_proj_in", CONV3: "lora_unet_down_blocks_1_resnets_0_conv1",
}  # fmt: skip
DEFINED = [(name, shape) for name, case in CASES.items() for shape in case.shapes if shape != NORM]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint with layers of the sizes that the definitions are written for."""
    generator = torch.Generator().manual_seed(3)
    weights = base_weights("sd15", 64)
    for shape, key in PLACES.items():
        weights[key] = torch.randn(shape, generator=generator)
    return save_checkpoint(tmp_path_factory.mktemp("small") / "base.safetensors", weights)


@pytest.mark.parametrize(("name", "shape"), DEFINED, ids=[f"{n}-{len(s)}-{s[-1]}" for n, s in DEFINED])
def test_every_family_by_its_definition(small, tmp_path, name, shape):
    """Alone, and under DoRA's magnitudes along either axis."""
    case, rng = CASES[name], np.random.default_rng(7)
    parts, alpha = case.make(rng, shape), None if case.family == "svdiff" else 2.0
    W = numbers_of(small)[PLACES[shape]].double().numpy()
    tuned = case.tuned(parts, W, alpha)
    files = [(parts, tuned)]
    for axis in (0, 1):
        if case.family not in ("svdiff", "oft", "ia3", "full", "lora+sparse"):
            m = magnitudes(rng, shape, axis)
            files.append(({**parts, "dora_scale": m}, dora(tuned, m, axis)))
    paths = [tmp_path / f"{index}.safetensors" for index in range(max(2, len(files)))]
    for (arrays, _), path in zip((files * 2)[: len(paths)], paths, strict=True):
        tensors = {part: torch.from_numpy(np.ascontiguousarray(a)) for part, a in arrays.items()}
        tensors = {part: t.float() if t.is_floating_point() else t for part, t in tensors.items()}
        tensors |= {} if alpha is None else {"alpha": torch.tensor(alpha)}
        save_file({f"{NAMES[shape]}.{part}": tensor for part, tensor in tensors.items()}, path)
    inputs = opened(paths, small)
    (layer,) = inputs.layers
    assert layer.module.weight.name == PLACES[shape]
    for source, (_, made) in zip(inputs.sources, files, strict=False):
        assert_rows(source, layer, torch.from_numpy(made - W).reshape(layer.shape), 1e-4)
    inputs.close()


@pytest.mark.parametrize("kind", ["dora_input", "loha", "full"])
def test_whole_changes_of_many_loras_go_to_the_disk(bases, tmp_path, monkeypatch, kind):
    base = bases("sd15")
    paths = [write_lora(tmp_path / f"{seed}.safetensors", base, kind, some, seed)[0] for seed in range(2)]
    inputs = opened(paths, base)
    held = [read(source, layer, 0, layer.shape[0]) for source in inputs.sources for layer in inputs.layers]
    inputs.close()
    monkeypatch.setattr(lora_source, "_HELD", 0)
    inputs = opened(paths, base)
    pairs = [(source, layer) for source in inputs.sources for layer in inputs.layers]
    for (source, layer), expected in zip(pairs, held, strict=True):
        assert_rows(source, layer, expected, 1e-6)
    assert set(map(type, inputs.sources[0]._prepared(layer.key, layer.shape[1]))) == {lora_source._Spilled}
    inputs.close()


def test_a_lora_beside_checkpoints(bases, tmp_path):
    """Checkpoints give weights, LoRAs changes; all layers stay."""
    base = bases("sd15")
    tuned = save_checkpoint(tmp_path / "tuned.safetensors", family()[1])
    lora, changes = write_lora(tmp_path / "a.safetensors", base, "lora", lambda name: "lora_te" in name)
    inputs, stored, places = opened([tuned, lora], base), load_file(base), tensors_of(base)
    assert [source.relative for source in inputs.sources] == [False, True]
    assert {layer.module.name for layer in inputs.layers} == places.keys()
    for layer in inputs.layers:
        key, rows = places[layer.module.name]
        assert_rows(inputs.sources[0], layer, flat(family()[1][key][rows]))
        change = changes.get(layer.module.name, torch.zeros_like)(stored[key][rows].double())
        assert_rows(inputs.sources[1], layer, change.flatten(1), 2e-5)
    inputs.close()


def test_only_what_a_lora_changes_is_looked_at_where_there_are_loras_alone(bases, tmp_path):
    base = bases("sd15")
    first, one = write_lora(tmp_path / "a.safetensors", base, "lora", lambda name: "down_blocks_0" in name)
    second, two = write_lora(tmp_path / "b.safetensors", base, "loha", lambda name: "up_blocks_3" in name)
    inputs = opened([first, second], base)
    assert {layer.module.name for layer in inputs.layers} == one.keys() | two.keys()
    inputs.close()


def test_a_lora_of_some_rows_of_a_fused_layer(tmp_path):
    table = narrow(shapes("flux_dev"), 32)
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(shape, generator=generator) * 0.1 for key, shape in table.items()}
    base = save_checkpoint(tmp_path / "flux.safetensors", cast(weights, torch.bfloat16))
    H = 96
    name, paths = "transformer.transformer_blocks.3.attn", []
    for seed, parts in enumerate((("to_q", "to_v"), ("to_k",))):
        generator.manual_seed(seed)
        tensors = {}
        for part in parts:
            tensors[f"{name}.{part}.lora_B.weight"] = torch.randn(H, 2, generator=generator)
            tensors[f"{name}.{part}.lora_A.weight"] = torch.randn(2, H, generator=generator)
        paths.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, paths[-1])
    inputs = opened(paths, base)
    (layer,) = inputs.layers
    assert layer.shape == (3 * H, H)
    for source, parts in zip(inputs.sources, ({"to_q": 0, "to_v": 2}, {"to_k": 1}), strict=True):
        stored, expected = load_file(source.path), torch.zeros(3 * H, H)
        for part, index in parts.items():
            rows = stored[f"{name}.{part}.lora_B.weight"] @ stored[f"{name}.{part}.lora_A.weight"]
            expected[index * H : (index + 1) * H] = rows
        assert_rows(source, layer, expected, 1e-6)
    inputs.close()


def test_a_peft_folder(bases, tmp_path):
    base = bases("sd15")
    folder = tmp_path / "my.peft"
    folder.mkdir()
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    n, k = load_file(base)[ATTENTION].shape
    down, up = torch.randn(2, k), torch.randn(n, 2)
    start = f"base_model.model.{module}"
    save_file({f"{start}.lora_A.weight": down, f"{start}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file, _ = write_lora(tmp_path / "b.safetensors", base, "lora", lambda name: "attn1_to_q" in name)
    inputs = opened([folder, file], base)
    assert inputs.labels == ["my.peft", "b"]
    layer = next(layer for layer in inputs.layers if layer.module.weight.name == ATTENTION)
    assert_rows(inputs.sources[0], layer, 3.0 * up @ down, 1e-6)
    inputs.close()


# --- names, lists and the state of the files -----------------------------------------------------------------------


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


def test_one_list_of_checkpoints_and_loras(bases, tmp_path):
    """A page's names: of the folder of checkpoints or that of LoRAs; a name in both is whichever is a model."""
    checkpoints, loras = tmp_path / "Stable-diffusion", tmp_path / "Lora"
    for folder in (checkpoints, loras):
        folder.mkdir()
    save_checkpoint(checkpoints / "base.safetensors", family()[0])
    save_checkpoint(checkpoints / "x.safetensors", family()[1])
    write_lora(loras / "style.safetensors", bases("sd15"), "lora")
    write_lora(loras / "x.safetensors", bases("sd15"), "lora")
    write_lora(checkpoints / "misplaced.safetensors", bases("sd15"), "lora")
    host = FolderHost(checkpoints, loras)
    names = ["x.safetensors", "style.safetensors", "misplaced.safetensors"]
    spec = HyperSpec.from_json({"models": names, "base": "base.safetensors", "name": "h", "ranks": "2"})
    inputs = open_inputs(spec, host)
    assert inputs.labels == ["x", "style", "misplaced"]
    assert [source.relative for source in inputs.sources] == [False, True, True]
    inputs.close()


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path):
    paths = [save_checkpoint(tmp_path / f"{i}.safetensors", w) for i, w in enumerate(family())]
    inputs = opened(paths)
    inputs.check_unchanged()
    save_checkpoint(paths[2], family()[0])
    with pytest.raises(InputChangedError, match="2.safetensors"):
        inputs.check_unchanged()
    inputs.close()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_who_brings_a_number_that_is_none(bases, tmp_path, number):
    first, second = ({**weights} for weights in family()[:2])
    second[ATTENTION] = second[ATTENTION].clone()
    second[ATTENTION][3, 1] = number
    paths = [save_checkpoint(tmp_path / f"{name}.safetensors", w) for name, w in (("good", first), ("bad", second))]
    inputs = opened(paths)
    found = {layer.module.weight.name: blame(inputs, layer) for layer in inputs.layers}
    assert found.pop(ATTENTION) == ["bad"]
    assert not any(found.values())
    inputs.close()
    broken, _ = write_lora(tmp_path / "broken.safetensors", bases("sd15"), "lora", lambda name: "attn1_to_q" in name)
    tensors = {key: tensor * number if ".lora_up" in key else tensor for key, tensor in load_file(broken).items()}
    save_file(tensors, broken)
    inputs = opened([broken, paths[0]], paths[1])
    layer = next(layer for layer in inputs.layers if layer.module.weight.name == ATTENTION)
    assert blame(inputs, layer) == ["broken", "bad.safetensors"]
    assert blame(inputs, next(layer for layer in inputs.layers if layer.module.weight.name == SD1_TEXT)) == []
    inputs.close()


def test_loras_of_several_families_become_shared_ones(bases, tmp_path):
    """What is reported is what the files written are away from the changes by the families' definitions."""
    base, kinds = bases("sd15"), ("lora", "loha", "dora_input", "oft")
    made = {kind: write_lora(tmp_path / f"{kind}.safetensors", base, kind, some) for kind in kinds}
    chosen = [part for path, _ in made.values() for part in ("--model", path)]
    result = run_cli(
        ["hyper", *chosen, "--base", base, "--loras-only", "--ranks", "6,4", "--dtype", "fp32", "--name", "h",
         "--out-dir", tmp_path / "out", "--device", "cpu", "--json", "--quiet"]
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    report = last_json(result)
    assert report["multipliers"].keys() == report["models"].keys() == set(kinds)
    loras = {name: lora_deltas(tmp_path / "out" / f"{name}.safetensors") for name in report["multipliers"]["lora"]}
    assert len(loras) == 2
    places, error, whole = tensors_of(base), 0.0, 0.0
    for kind, (_, changes) in made.items():
        own_error = own = 0.0
        for name, change in changes.items():
            key, rows = places[name]
            rest = delta = change(numbers_of(base)[key][rows].double())
            side = "multipliers" if name.startswith("lora_unet") else "te_multipliers"
            for lora, multiplier in report[side][kind].items():
                rest = rest - multiplier * loras[lora].get(name, torch.zeros(1)).reshape(delta.shape)
            own_error, own = own_error + float(rest.square().sum()), own + float(delta.square().sum())
        assert report["models"][kind] == pytest.approx((own_error / own) ** 0.5, rel=1e-4)
        error, whole = error + own_error, whole + own
    assert report["residual_share"] == pytest.approx(error / whole, rel=1e-4)
