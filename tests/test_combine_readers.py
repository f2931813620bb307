"""One file made with weights w changes a model of diffusers as the LoRAs themselves do at these weights.

Both ways the files are read and added by diffusers and peft alone.
"""

from __future__ import annotations

import re

import pytest
import torch
from combine_files import combine
from convert_files import lora, save
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.utils import set_weights_and_activate_adapters
from models import base_weights
from safetensors.torch import load_file
from test_independent_readers import TEXT, UNREAD, models_of, plain

WEIGHTS = {"a": (0.7, 0.7), "b": (-0.3, 0.1)}  # in the UNet, in text encoders


def applied(family: str, loras: dict[str, dict[str, torch.Tensor]], weights: dict[str, tuple[float, float]]) -> dict:
    """Every component's weights with LoRAs of kohya's spelling at these weights, merged by peft."""
    models, xl = models_of(family, base_weights(family)), family == "sdxl"
    loader = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin
    more = {"unet_config": models["unet"].config} if xl else {}
    for name, tensors in loras.items():
        state, alphas = loader.lora_state_dict(dict(tensors), **more)
        loader.load_lora_into_unet(state, network_alphas=alphas, unet=models["unet"], adapter_name=name)
        for component in TEXT[family]:
            part = {key: tensor for key, tensor in state.items() if key.startswith(f"{component}.")}
            loader.load_lora_into_text_encoder(
                part, network_alphas=alphas, text_encoder=models[component], prefix=component, adapter_name=name
            )
    for component, model in models.items():
        own = [weights[name][component != "unet"] for name in loras]
        set_weights_and_activate_adapters(model, list(loras), own)
        for layer in model.modules():
            if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
                layer.merge(adapter_names=list(loras))
    return {component: plain(model.state_dict()) for component, model in models.items()}


def read_by_diffusers(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: t for key, t in tensors.items() if not re.fullmatch(UNREAD[family], key.split(".")[0])}


@pytest.mark.parametrize("more", [(), ("--energy", 1)], ids=["exact", "energy"])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_one_file_is_as_strong_as_the_prompt(tmp_path, family, more):
    """--energy 1: as many directions as both have, decomposed anew."""
    parts = {
        name: read_by_diffusers(family, lora(family, rank=lambda i, r=r: r, alpha=lambda i, own=alpha: own, seed=r))
        for name, r, alpha in (("a", 3, 3.0), ("b", 2, 1.0))
    }
    for name, tensors in parts.items():
        save(tmp_path / f"{name}.safetensors", tensors, {})
    flags = [x for name, pair in WEIGHTS.items() for x in ("--lora", tmp_path / f"{name}.safetensors", *pair)]
    combine(*flags, "--out", tmp_path / "out", "--dtype", "fp32", *more)
    one = load_file(tmp_path / "out.safetensors")
    before, together = plain_models(family), applied(family, parts, WEIGHTS)
    alone = applied(family, {"out": one}, {"out": (1.0, 1.0)})
    changed = 0
    for component, weights in before.items():
        for key, weight in weights.items():
            change = together[component][key] - weight
            off = (alone[component][key] - together[component][key]).norm()
            assert off <= 3e-6 * weight.norm() + 1e-9, key  # float32, through several additions
            changed += bool(change.norm() > 1e-3 * weight.norm())
    assert changed == len({key.split(".")[0] for key in one})


def plain_models(family: str) -> dict:
    return {name: plain(model.state_dict()) for name, model in models_of(family, base_weights(family)).items()}
