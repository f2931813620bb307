"""The LoRAs of a hyper-merge, alone or beside checkpoints: each layer's rows are the change that a LoRA makes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES
from families_naive import CASES, CONV1, CONV3, LINEAR, NORM, dora, magnitudes
from hyper_rows import PROJECTION, assert_rows, family, flat, numbers_of, opened, read, tensors_of, write_lora
from models import (
    ATTENTION,
    CONVOLUTION,
    SD1_TEXT,
    base_weights,
    cast,
    last_json,
    lora_deltas,
    run_cli,
    save_checkpoint,
)
from safetensors.torch import load_file, save_file

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.hyper import lora_source
from lib_hypermerge.jobs.hyper.inputs import blame, open_inputs
from lib_hypermerge.jobs.hyper.spec import HyperSpec
from lib_hypermerge.layouts.tables import narrow, shapes


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
