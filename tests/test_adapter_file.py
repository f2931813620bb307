"""Adapter files as others write them: PEFT's folders, diffusers' files, lists, spectral shifts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from dialect_files import (
    ARCHITECTURES,
    attention_processors,
    checkpoint_weights,
    diffusers,
    kohya,
    layers,
    named_by_diffusers,
    rows_of,
    save_distinct,
    save_lora,
    stored,
)
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from test_dialects import traversed
from test_independent_readers import models_of

from lib_hypermerge.jobs.adapter_inputs import LoraInput, open_lora
from lib_hypermerge.layouts.adapter_file import open_adapter
from lib_hypermerge.layouts.dialects import peft
from lib_hypermerge.layouts.opening import open_checkpoint

FAMILIES = tuple(ARCHITECTURES)
TIGHT = {"rtol": 1e-5, "atol": 1e-6}  # float32 against float64
Deltas = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_distinct(folder, name) for name in FAMILIES}


def opened(path, checkpoint) -> LoraInput:
    model = open_checkpoint(checkpoint)
    try:
        return open_lora(path, model)
    finally:
        model.file.close()


def deltas(lora: LoraInput, family: str) -> Deltas:
    """What a file does to each weight, float64, under diffusers' names."""
    weights, names = checkpoint_weights(family), named_by_diffusers(family)
    out = {}
    for entry, target in lora.resolution.targets:
        weight = rows_of(target.module, weights).contiguous()
        name = names[weight.numpy().tobytes()]
        out[name] = lora.load(entry).change(weight.double())
    return out


def trained(network: torch.nn.Module, kind=LoraConfig, only=(), **settings):
    """A model in PEFT's wrapper, its adapters random."""
    targets = [
        name for name, layer in network.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)) and (not only or name.endswith(only))
        and not name.endswith("text_projection")
    ]  # fmt: skip
    torch.manual_seed(3)
    wrapped = get_peft_model(network, kind(target_modules=targets, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(mark in name for mark in ("lora_A", "lora_B", "hada_", "lokr_")):
                parameter.normal_()
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    return wrapped


def merged(wrapped: torch.nn.Module) -> Deltas:
    """What PEFT's own merging adds to each weight."""
    out = {}
    with torch.no_grad():
        for name, layer in wrapped.base_model.model.named_modules():
            if hasattr(layer, "base_layer"):
                before = layer.get_base_layer().weight.double().clone()
                layer.merge()
                out[name] = layer.get_base_layer().weight.double() - before
    return out


def assert_same(ours: Deltas, theirs: Deltas, component: str) -> None:
    assert {f"{component}.{name}" for name in theirs} == {name for name in ours if name.startswith(f"{component}.")}
    for name, delta in theirs.items():
        mine = ours[f"{component}.{name}"].reshape(delta.shape)
        assert torch.allclose(mine, delta, rtol=1e-4, atol=1e-5), name


TRAINED = ("to_q", "attn2.to_k", "attn2.to_v", "proj_in", "conv1")
PEFT_SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "patterns": {
        "r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2, r"attn2\.to_k": 3}, "alpha_pattern": {"to_q": 7},
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_v": 1}},
    "DoRA": {"r": 2, "lora_alpha": 3, "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"), [*(("sd15", name) for name in PEFT_SETTINGS), ("sd21", "patterns"), ("sdxl", "patterns")]
)
def test_a_folder_that_peft_saved(checkpoints, tmp_path, family, settings):
    network = models_of(family, checkpoint_weights(family))["unet"]
    wrapped = trained(network, only=TRAINED, **PEFT_SETTINGS[settings])
    wrapped.save_pretrained(tmp_path / "adapter")
    with opened(tmp_path / "adapter", checkpoints[family]) as lora:
        assert lora.file.dialect == "peft"
        assert lora.warnings == []
        assert_same(deltas(lora, family), merged(wrapped), "unet")
    with opened(tmp_path / "adapter" / "adapter_model.safetensors", checkpoints[family]) as alone:
        assert len(alone.resolution.targets) == len(lora.resolution.targets)
        assert [e.alpha for e in alone.file.entries.values()] == [e.alpha for e in lora.file.entries.values()]


def test_a_pickle_that_peft_saved(checkpoints, tmp_path):
    network = models_of("sd15", checkpoint_weights("sd15"))["unet"]
    wrapped = trained(network, only=("to_q",), r=2, lora_alpha=2)
    wrapped.save_pretrained(tmp_path, safe_serialization=False)
    with opened(tmp_path, checkpoints["sd15"]) as lora:
        assert_same(deltas(lora, "sd15"), merged(wrapped), "unet")


@pytest.mark.parametrize(
    ("kind", "settings", "family_name"),
    [
        (LoHaConfig, {"r": 2, "alpha": 3}, "loha"),
        (LoHaConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}, "loha"),
        (LoKrConfig, {"r": 2, "alpha": 3, "use_effective_conv2d": True}, "lokr"),
    ],
)
def test_other_families_of_peft(checkpoints, tmp_path, kind, settings, family_name):
    network = models_of("sd15", checkpoint_weights("sd15"))["unet"]
    wrapped = trained(network, kind, only=("to_q", "conv1"), **settings)
    wrapped.save_pretrained(tmp_path)
    with opened(tmp_path, checkpoints["sd15"]) as lora:
        assert lora.counts == {family_name: 54}
        assert_same(deltas(lora, "sd15"), merged(wrapped), "unet")


def test_a_folder_per_component(family, checkpoints, tmp_path):
    """Text encoders too, which nothing but the folder's name tells apart."""
    theirs = {}
    for component, network in models_of(family, checkpoint_weights(family)).items():
        wrapped = trained(network, only=("attn2.to_k", "fc1", "q_proj"), r=3, lora_alpha=5 + len(theirs))
        wrapped.save_pretrained(tmp_path / component)
        theirs[component] = merged(wrapped)
    with opened(tmp_path, checkpoints[family]) as lora:
        ours = deltas(lora, family)
        for component, expected in theirs.items():
            assert_same(ours, expected, component)
        assert len(ours) == sum(len(expected) for expected in theirs.values())
        assert lora.file.file.path == tmp_path
    last = list(theirs)[-1]
    with opened(tmp_path / last, checkpoints[family]) as one:
        assert_same(deltas(one, family), theirs[last], last)


@pytest.mark.parametrize("spelling", ["as it is", "converted"])
def test_a_file_that_a_pipeline_saved(family, checkpoints, tmp_path, spelling):
    pipeline = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    states, theirs = {}, {}
    for component, network in models_of(family, checkpoint_weights(family)).items():
        wrapped = trained(network, only=("attn1.to_k", "attn2.to_out.0", "fc1", "out_proj"), r=3, lora_alpha=3)
        state = get_peft_model_state_dict(wrapped)
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
        states[f"{component}_lora_layers"] = state if spelling == "as it is" else convert_state_dict_to_diffusers(state)
        theirs[component] = merged(wrapped)
    pipeline.save_lora_weights(tmp_path, **states)
    with opened(tmp_path, checkpoints[family]) as lora:
        assert lora.file.dialect == ("diffusers" if spelling == "as it is" else "diffusers-old")
        ours = deltas(lora, family)
        for component, expected in theirs.items():
            assert_same(ours, expected, component)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_alphas_that_newer_diffusers_writes_into_the_header(checkpoints, tmp_path, rslora):
    written = [layer for layer in layers("sd15", checkpoints["sd15"]) if ".attn1.to_q" in layer.module.path]
    special = written[0].diffusers.removeprefix("unet.")
    header = {
        "unet.r": 3, "unet.lora_alpha": 6, "unet.use_rslora": rslora, "unet.peft_type": "LORA",
        "unet.alpha_pattern": {f"^{special}": 1.5}, "unet.rank_pattern": {},
    }  # fmt: skip
    path = save_lora(tmp_path / "a.safetensors", written, diffusers, lora_adapter_metadata=json.dumps(header))
    divisor = 3**0.5 if rslora else 3
    with opened(path, checkpoints["sd15"]) as lora:
        scales = {target.module.path: lora.load(entry).scale for entry, target in lora.resolution.targets}
    for layer in written:
        expected = (1.5 if layer is written[0] else 6) / divisor
        assert scales[layer.module.path] == pytest.approx(expected)


def test_an_alpha_in_the_file_goes_before_the_configuration(checkpoints, tmp_path):
    written = layers("sd15", checkpoints["sd15"])[:1]
    path = save_lora(tmp_path / "a.safetensors", written, diffusers)
    state = stored(path) | {f"{written[0].diffusers}.alpha": torch.tensor(1.0)}
    header = {"unet.r": 3, "unet.lora_alpha": 6}
    save_file(state, path, {"lora_adapter_metadata": json.dumps(header)})
    with opened(path, checkpoints["sd15"]) as lora:
        ((entry, _),) = lora.resolution.targets
        assert (entry.alpha, lora.load(entry).alpha) == (None, 1.0)


# --- configurations of our own --------------------------------------------------------------------------------


def test_peft_loads_a_configuration_of_ours(family, checkpoints, tmp_path):
    """Ranks and alphas that differ from module to module; nothing missing, nothing unexpected, the same sums."""
    network = models_of(family, checkpoint_weights(family))["unet"]
    written = [layer for layer in layers(family, checkpoints[family]) if layer.module.component == "unet"][::7]
    state, numbers, expected = {}, {}, {}
    for index, layer in enumerate(written):
        path, rank, alpha = layer.diffusers.removeprefix("unet."), 1 + index % 3, 1.0 + index % 4
        up, down = layer.up[:, :rank], layer.down[:rank]
        state[f"base_model.model.{path}.lora_A.weight"] = down.contiguous()
        state[f"base_model.model.{path}.lora_B.weight"] = up.contiguous()
        numbers[path] = (rank, alpha)
        flat = alpha / rank * (up.double().flatten(1) @ down.double().flatten(1))
        expected[path] = flat.reshape(len(up), *down.shape[1:])
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft.config(numbers)), encoding="utf-8")
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    wrapped = PeftModel.from_pretrained(network, str(tmp_path))
    loaded = get_peft_model_state_dict(wrapped)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    after = wrapped.merge_and_unload().state_dict()
    for path, delta in expected.items():
        change = (after[f"{path}.weight"] - before[f"{path}.weight"]).double().reshape(delta.shape)
        assert torch.allclose(change, delta, rtol=1e-4, atol=1e-4), path
    with opened(tmp_path, checkpoints[family]) as lora:
        assert {e.key.removeprefix("base_model.model."): e.alpha for e in lora.file.entries.values()} == {
            path: alpha for path, (_, alpha) in numbers.items()
        }


def test_a_name_that_ends_like_others_is_kept_apart():
    """Flux' proj_out is also the end of single_transformer_blocks.0.proj_out."""
    made = peft.config({"proj_out": (2, 3.0), "single_transformer_blocks.0.proj_out": (4, 5.5), "x": (4, 5.5)})
    assert (made["r"], made["lora_alpha"]) == (2, 3)
    assert made["rank_pattern"] == {"single_transformer_blocks.0.proj_out": 4, "x": 4}
    assert made["target_modules"] == r"proj_out|single_transformer_blocks\.0\.proj_out|x"
    read = peft.from_values(made, "it")
    assert (read.rank_of("proj_out"), read.alpha_of("single_transformer_blocks.0.proj_out")) == (2, 5.5)


# --- layers by number -------------------------------------------------------------------------------------------


def numbered_lora(family: str, component: str, counted: list[str]):
    """(tensors up and down in the order of a traversal, what each does to which layer)"""
    network = models_of(family, checkpoint_weights(family))[component]
    names = traversed(network, set(counted), (torch.nn.Linear, torch.nn.Conv2d))
    generator = torch.Generator().manual_seed(11)
    pairs, expected = [], {}
    for name in names:
        n, *rest = network.get_submodule(name).weight.shape
        up = torch.randn(n, 2, *(1 for _ in rest[1:]), generator=generator)
        down = torch.randn(2, *rest, generator=generator)
        pairs.append((up, down))
        expected[name] = (up.double().flatten(1) @ down.double().flatten(1)).reshape(n, *rest)
    return pairs, expected


COUNTED = {"unet": ["Attention", "GEGLU"], "text_encoder": ["CLIPAttention", "CLIPSdpaAttention"]}


@pytest.mark.parametrize(("family", "extended"), [("sd15", False), ("sd21", False), ("sdxl", False), ("sd15", True)])
def test_numbered_layers(checkpoints, tmp_path, family, extended):
    tensors, metadata, theirs = {}, {}, {}
    for component, counted in COUNTED.items():
        counted = [*counted, "ResnetBlock2D"] if extended and component == "unet" else counted
        pairs, theirs[component] = numbered_lora(family, component, counted)
        metadata[component] = json.dumps(counted)
        for index, (up, down) in enumerate(pairs):
            tensors |= {f"{component}:{index}:up": up, f"{component}:{index}:down": down}
            metadata[f"{component}:{index}:rank"] = "2"
    tensors["<s1>"], metadata["<s1>"] = torch.ones(24), "<embed>"
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    with opened(tmp_path / "a.safetensors", checkpoints[family]) as lora:
        assert lora.file.dialect == "cloneofsimo"
        assert list(lora.file.embeddings) == ["<s1>"]
        assert lora.warnings == []
        ours = deltas(lora, family)
        for component, expected in theirs.items():
            assert_same(ours, expected, component)


@pytest.mark.parametrize(("component", "name"), [("unet", "lora.pt"), ("text_encoder", "lora.text_encoder.pt")])
def test_a_list_of_tensors(checkpoints, tmp_path, component, name):
    pairs, expected = numbered_lora("sd15", component, COUNTED[component])
    torch.save([torch.nn.Parameter(tensor) for pair in pairs for tensor in pair], tmp_path / name)
    with opened(tmp_path / name, checkpoints["sd15"]) as lora:
        assert lora.file.dialect == "cloneofsimo"
        assert_same(deltas(lora, "sd15"), expected, component)


def test_the_order_of_older_diffusers_is_told_by_shapes(checkpoints, tmp_path):
    pairs, expected = numbered_lora("sd15", "unet", COUNTED["unet"])
    order = list(expected)
    older = [9 * (i // 9) + (0, 1, 2, 3, 8, 4, 5, 6, 7)[i % 9] for i in range(len(order))]
    assert ".ff." in order[older[4]]
    torch.save([tensor for i in older for tensor in pairs[i]], tmp_path / "lora.pt")
    with opened(tmp_path / "lora.pt", checkpoints["sd15"]) as lora:
        assert_same(deltas(lora, "sd15"), expected, "unet")


# --- spectral shifts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("component", "name"), [("unet", "spectral_shifts"), ("text_encoder", "spectral_shifts_te")])
def test_spectral_shifts_reach_every_weight(family, checkpoints, tmp_path, component, name):
    """Norms and embeddings too, which no LoRA reaches."""
    network = models_of(family, checkpoint_weights(family))[component]
    shifts = {
        f"{key.removesuffix('.weight')}.delta": torch.ones(min(len(w), w[0].numel()) if w.dim() > 1 else 1)
        for key, w in network.state_dict().items()
        if key.endswith(".weight")
    }
    save_file(shifts, tmp_path / f"{name}.safetensors")
    with opened(tmp_path / f"{name}.safetensors", checkpoints[family]) as lora:
        assert lora.file.dialect == "svdiff"
        assert lora.counts == {"svdiff": len(shifts)}
        assert {target.module.component == "unet" for _, target in lora.resolution.targets} == {component == "unet"}


# --- beside modules ---------------------------------------------------------------------------------------------


def test_bundled_embeddings_are_kept_apart(checkpoints, tmp_path):
    written = layers("sd15", checkpoints["sd15"])[:2]
    path = save_lora(tmp_path / "a.safetensors", written, kohya)
    bundle = {"bundle_emb.cat.string_to_param.*": torch.ones(1, 24), "bundle_emb.dog.emb_params": torch.ones(1, 24)}
    save_file(stored(path) | bundle, path)
    with open_adapter(path) as adapter:
        assert adapter.embeddings.keys() == bundle.keys()
        assert len(adapter.entries) == 2 and adapter.unknown == []


def test_full_weights_beside_a_lora_are_no_modules(checkpoints, tmp_path):
    """PEFT's modules_to_save, and an alpha without factors."""
    written = layers("sd15", checkpoints["sd15"])[:2]
    path = save_lora(tmp_path / "a.safetensors", written, diffusers)
    more = {"unet.conv_in.weight": torch.ones(4, 4), "unet.mid_block.alpha": torch.tensor(1.0)}
    save_file(stored(path) | more, path)
    with opened(path, checkpoints["sd15"]) as lora:
        assert set(lora.file.unknown) == set(more)
        assert "2 tensors are part of no module" in lora.warnings[0]


def test_peft_names_without_a_configuration_are_told(checkpoints, tmp_path):
    network = models_of("sd15", checkpoint_weights("sd15"))["unet"]
    trained(network, only=("to_q",), r=2, lora_alpha=9).save_pretrained(tmp_path / "adapter")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", alone)
    with opened(alone, checkpoints["sd15"]) as lora:
        assert lora.file.dialect == "peft"
        assert lora.warnings == [
            "alone.safetensors: adapter_config.json is not beside it: alpha is taken to be equal to the rank."
        ]


def test_a_start_that_changed_the_base_is_told(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.a.to_q.lora_{x}.weight": torch.ones(2, 2) * (x == "A") for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with open_adapter(tmp_path) as adapter:
        assert ["pissa_niter_4" in note for note in adapter.notes] == [True]


def test_the_oldest_files_hold_attention_alone(checkpoints, tmp_path):
    every = layers("sd15", checkpoints["sd15"])
    path = save_lora(tmp_path / "a.bin.safetensors", every, attention_processors)
    with open_adapter(path) as adapter:
        assert len(adapter.entries) == 16 * 8 + 12 * 4
