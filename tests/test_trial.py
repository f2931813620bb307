"""Merge tried in memory: on models built of torch modules as the hosts build theirs, with a Lora extension's habits."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import module_tree, parameters
from models import ATTENTION, CONVOLUTION, base_weights, cast, extract, rank_change, save_pair, tuned_weights
from safetensors.torch import load_file

from lib_hypermerge.errors import Cancelled, LayoutError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.hosts.webui import WebUIHost
from lib_hypermerge.jobs import trial as trial_job
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import VERBS


class Networks:
    """The Lora extension: what its layers do at each forward, with a change of its own for one layer."""

    def __init__(self) -> None:
        self.loaded: tuple = ()

    def network_restore_weights_from_backup(self, module: Any) -> None:
        module.weight.copy_(module.network_weights_backup)

    def network_reset_cached_weight(self, module: Any) -> None:
        module.network_current_names, module.network_weights_backup = (), None

    def forward(self, module: Any) -> torch.Tensor:
        """What the layer would compute with now."""
        current = getattr(module, "network_current_names", ())
        if getattr(module, "network_weights_backup", None) is None and self.loaded != ():
            assert current == (), "no backup weights found and current weights are not unchanged"
            module.network_weights_backup = module.weight.to("cpu", copy=True)
        if current != self.loaded:
            if getattr(module, "network_weights_backup", None) is not None:
                self.network_restore_weights_from_backup(module)
            if self.loaded:
                module.weight.copy_(module.weight + len(self.loaded))
            module.network_current_names = self.loaded
        return module.weight


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base checkpoint, a fine-tune of it, and the LoRA that is the difference."""
    path = tmp_path_factory.mktemp("trial")
    (path / "Lora").mkdir()
    base = base_weights()
    pair = save_pair(path, base, tuned_weights(base, rank_change(2)), torch.float16)
    extract(*pair, path / "Lora" / "change", "--rank", 2)
    return path


@pytest.fixture
def webui(folder: Path, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    infos = {
        name: types.SimpleNamespace(title=name, name=name, filename=str(folder / name))
        for name in ("base.safetensors", "tuned.safetensors")
    }
    processing = types.SimpleNamespace(
        StableDiffusionProcessing=type("P", (), {"cached_c": ["old"], "cached_uc": ["old"]}),
        StableDiffusionProcessingTxt2Img=type("T", (), {"cached_hr_c": ["old"], "cached_hr_uc": ["old"]}),
    )
    parts = {
        "shared": types.SimpleNamespace(
            opts=types.SimpleNamespace(), cmd_opts=types.SimpleNamespace(lora_dir=str(folder / "Lora"))
        ),
        "sd_models": types.SimpleNamespace(
            checkpoints_list=infos, model_path=str(folder), model_data=types.SimpleNamespace(sd_model=None),
        ),
        "processing": processing,
        "sd_unet": types.SimpleNamespace(current_unet=None),
    }  # fmt: skip
    package = types.ModuleType("modules")
    for name, part in parts.items():
        setattr(package, name, part)
        monkeypatch.setitem(sys.modules, f"modules.{name}", part)
    monkeypatch.setitem(sys.modules, "modules", package)
    weights = load_file(folder / "base.safetensors")
    return types.SimpleNamespace(folder=folder, weights=weights, infos=infos, **parts)


@pytest.fixture
def networks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Networks:
    module = Networks()
    entry = types.SimpleNamespace(filename=str(folder / "Lora" / "change.safetensors"))
    module.available_networks = {"change.safetensors": entry}
    monkeypatch.setitem(sys.modules, "networks", module)
    return module


def loaded(webui, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Load base.safetensors as AUTOMATIC1111 does: all modules in one number format, text encoder wrapped."""
    model = module_tree(cast(webui.weights, dtype), ("cond_stage_model",))
    model.sd_checkpoint_info = webui.infos["base.safetensors"]
    webui.sd_models.model_data.sd_model = model
    return model


def spec(**more) -> Any:
    values = {"checkpoint": "base.safetensors", "loras": [{"lora": "change.safetensors"}], "out": "unused", **more}
    return VERBS["merge"].spec.from_json(values)


def attempt(host: WebUIHost, context: Context | None = None, **more):
    return execute(trial_job.TRY_VERB, spec(**more), host, context or Context())


def take_back(host: WebUIHost):
    return execute(trial_job.TAKE_BACK_VERB, trial_job.NoParameters(), host, Context())


def merged(webui, **more) -> dict[str, torch.Tensor]:
    """What the file of the same merge holds."""
    execute(VERBS["merge"], spec(**{**more, "out": "merged", "overwrite": True}), WebUIHost(), Context())
    return load_file(webui.folder / "merged.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_model_is_as_if_the_merged_file_was_loaded_and_then_as_before(webui, dtype: torch.dtype) -> None:
    host, model = WebUIHost(), loaded(webui, dtype)
    before, files = parameters(model), sorted(webui.folder.rglob("*"))
    report = attempt(host)
    assert sorted(webui.folder.rglob("*")) == files
    expected = cast(merged(webui), dtype)
    after = parameters(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], expected[key]) for key in after)
    assert sum(not torch.equal(after[key], before[key]) for key in after) == report.details["changed_tensors"] > 300
    assert report.outputs == []
    assert "change" in trial_job.current(host).text
    assert take_back(host).modules == report.details["changed_tensors"]
    restored = parameters(model)
    assert all(torch.equal(restored[key], before[key]) for key in before)
    assert trial_job.current(host) is None


def test_prompts_with_loras_work_on_top_and_are_no_part_of_what_is_kept(webui, networks) -> None:
    host, model = WebUIHost(), loaded(webui)
    layer = model.get_submodule(ATTENTION.removesuffix(".weight"))
    original = layer.weight.clone()
    networks.loaded = ("x",)
    assert torch.equal(networks.forward(layer), original + 1)  # a prompt had a LoRA before the merge is tried
    attempt(host)
    changed = cast(merged(webui), torch.float32)[ATTENTION]
    assert torch.equal(layer.weight, changed), "the prompt's LoRA is off until the next generation"
    assert torch.equal(networks.forward(layer), changed + 1)
    networks.loaded = ("x", "y")
    assert torch.equal(networks.forward(layer), changed + 2)
    take_back(host)
    assert torch.equal(layer.weight, original)
    assert torch.equal(networks.forward(layer), original + 2)
    networks.loaded = ()
    assert torch.equal(networks.forward(layer), original)


def test_another_trial_takes_the_first_back_itself(webui) -> None:
    host, model = WebUIHost(), loaded(webui)
    before = parameters(model)
    attempt(host)
    attempt(host, loras=[{"lora": "change.safetensors", "weight": -0.5}])
    expected = cast(merged(webui, loras=[{"lora": "change.safetensors", "weight": -0.5}]), torch.float32)
    assert all(torch.equal(value, expected[key]) for key, value in parameters(model).items())
    take_back(host)
    assert all(torch.equal(value, before[key]) for key, value in parameters(model).items())
    with pytest.raises(SpecError, match="nothing to take back"):
        take_back(host)


def test_a_trial_that_is_interrupted_leaves_the_model_as_it_was(webui) -> None:
    host, model = WebUIHost(), loaded(webui)
    before, seen = parameters(model), []

    def interrupted() -> bool:
        seen.append(not torch.equal(model.get_parameter(CONVOLUTION), before[CONVOLUTION]))
        return seen[-1]

    with pytest.raises(Cancelled):
        attempt(host, Context(interrupted=interrupted))
    assert seen[-1], "it was changed when the interrupt came"
    assert all(torch.equal(value, before[key]) for key, value in parameters(model).items())
    assert host.trial is None


def test_remembered_conditionings_are_dropped(webui) -> None:
    host = WebUIHost()
    loaded(webui)
    owners = vars(webui.processing).values()
    for step in (attempt, take_back):
        for owner in owners:
            for name in [name for name in vars(owner) if name.startswith("cached")]:
                setattr(owner, name, ["old"])
        step(host)
        caches = [value for owner in owners for name, value in vars(owner).items() if name.startswith("cached")]
        assert caches == [[None, None]] * 4


def test_what_cannot_be_tried_is_refused_before_anything_changes(webui) -> None:
    host = WebUIHost()
    with pytest.raises(SpecError, match="no model in memory"):
        attempt(host)
    model = loaded(webui)
    with pytest.raises(SpecError, match=r"is base\.safetensors, not tuned\.safetensors"):
        attempt(host, checkpoint="tuned.safetensors")
    before = parameters(model)
    narrower = model.get_submodule(ATTENTION.removesuffix(".weight"))
    whole, narrower.weight = narrower.weight, torch.nn.Parameter(narrower.weight[:1])
    with pytest.raises(LayoutError, match="to_q.weight is not in the model"):
        attempt(host)
    narrower.weight = whole
    assert all(torch.equal(value, before[key]) for key, value in parameters(model).items())
    webui.sd_unet.current_unet = object()
    with pytest.raises(SpecError, match="compiled UNet"):
        attempt(host)
    webui.sd_unet.current_unet = None
    webui.sd_models.model_data.sd_model = types.SimpleNamespace(
        sd_checkpoint_info=webui.infos["base.safetensors"], forge_objects=types.SimpleNamespace(unet=None)
    )
    with pytest.raises(SpecError, match="cannot be changed in memory"):
        attempt(host)


def test_a_model_that_was_filled_anew_or_thrown_away_has_nothing_to_take_back(webui) -> None:
    host, model = WebUIHost(), loaded(webui)
    attempt(host)
    host.model_loaded(object())
    assert trial_job.current(host) is not None
    host.model_loaded(model)
    assert trial_job.current(host) is None
    attempt(host)
    model.to("meta")  # how the host empties a model
    assert trial_job.current(host) is None
    model = loaded(webui)
    with pytest.raises(SpecError, match="nothing to take back"):
        take_back(host)
    attempt(host)
    webui.sd_models.model_data.sd_model = None
    del model
    assert trial_job.current(host) is None


def test_eight_bit_storage_keeps_its_copies_of_sixteen(webui) -> None:
    host, model = WebUIHost(), loaded(webui, torch.float16)
    layer = model.get_submodule(ATTENTION.removesuffix(".weight"))
    layer.fp16_weight = layer.weight.data.clone()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    kept = layer.fp16_weight.clone(), layer.weight.view(torch.uint8).clone()
    attempt(host)
    expected = merged(webui)[ATTENTION]
    assert torch.equal(layer.fp16_weight, expected)
    assert torch.equal(layer.weight.view(torch.uint8), expected.to(torch.float8_e4m3fn).view(torch.uint8))
    take_back(host)
    assert torch.equal(layer.fp16_weight, kept[0])
    assert torch.equal(layer.weight.view(torch.uint8), kept[1])


# --- Forge ----------------------------------------------------------------------------------------------------


class LoraLoader:
    """Forge's: whole parameters are swapped for patched ones; the originals are kept until a refresh."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.backup = model, {}

    def patch(self, key: str) -> None:
        module, name = self._place(key)
        self.backup[key] = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(getattr(module, name) + 1, requires_grad=False))

    def refresh(self, patches: dict, force_refresh: bool = False) -> None:
        assert force_refresh and not patches
        for key, original in self.backup.items():
            setattr(*self._place(key), original)
        self.backup = {}

    def _place(self, key: str) -> tuple[torch.nn.Module, str]:
        path, _, name = key.rpartition(".")
        return self.model.get_submodule(path), name


def forge(webui) -> types.SimpleNamespace:
    """UNet by the checkpoint's names without `model.`, text encoder by those of transformers beneath clip_l."""
    unet = {k.removeprefix("model."): w for k, w in webui.weights.items() if k.startswith("model.diffusion_model.")}
    text = {
        "clip_l." + k.removeprefix("cond_stage_model."): w for k, w in webui.weights.items() if k.startswith("cond_st")
    }
    with torch.inference_mode():  # as Forge loads
        models = module_tree(unet), module_tree(text)
    for model in models:
        model.lora_loader = LoraLoader(model)
    parts = types.SimpleNamespace(
        unet=types.SimpleNamespace(model=models[0]), clip=types.SimpleNamespace(cond_stage_model=models[1])
    )
    engine = type("Engine", (), {})()
    engine.forge_objects = engine.forge_objects_original = parts
    engine.sd_checkpoint_info = webui.infos["base.safetensors"]
    webui.sd_models.model_data.sd_model = engine
    return engine


def forge_weights(engine) -> dict[str, torch.Tensor]:
    parts = engine.forge_objects
    unet = {f"model.{k}": v for k, v in parts.unet.model.named_parameters()}
    text = {k.replace("clip_l.", "cond_stage_model."): v for k, v in parts.clip.cond_stage_model.named_parameters()}
    return {k: v.clone() for k, v in (unet | text).items()}


def test_forge_s_model_is_changed_and_restored_beneath_its_own_patches(webui) -> None:
    host, engine = WebUIHost(), forge(webui)
    before = forge_weights(engine)
    loader, key = engine.forge_objects.unet.model.lora_loader, ATTENTION.removeprefix("model.")
    loader.patch(key)
    attempt(host)
    expected = merged(webui)
    assert all(torch.equal(value, expected[k]) for k, value in forge_weights(engine).items())
    loader.patch(key)  # the next prompt has a LoRA again
    take_back(host)
    assert all(torch.equal(value, before[k]) for k, value in forge_weights(engine).items())


def test_forge_s_model_with_other_shapes_is_refused(webui) -> None:
    host, engine = WebUIHost(), forge(webui)
    text = engine.forge_objects.clip.cond_stage_model
    del text.clip_l
    with pytest.raises(LayoutError, match="cond_stage_model.* is not in the model"):
        attempt(host)
    assert host.trial is None


def test_only_a_webui_has_such_a_thing() -> None:
    assert not hasattr(FolderHost(Path(), Path()), "model_in_memory")
