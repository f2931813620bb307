"""One LoRA for a narrow checkpoint, written in every dialect; diffusers' names come from diffusers' own conversion."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from models import Weights, base_weights, save_checkpoint
from safetensors.torch import load_file, save_file
from test_independent_readers import models_of

from lib_hypermerge.layouts.module import LORA_KINDS, Module
from lib_hypermerge.layouts.opening import open_checkpoint

ARCHITECTURES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}
RANK = 3


def distinct(weights: Weights) -> Weights:
    """The same keys and shapes, every number random: no two tensors are equal."""
    generator = torch.Generator().manual_seed(5)
    return {
        key: torch.randn(w.shape, generator=generator) if w.is_floating_point() else w for key, w in weights.items()
    }


@dataclass(frozen=True)
class Layer:
    """A layer that a LoRA changes. diffusers: its name there with the component before."""

    module: Module
    diffusers: str
    up: torch.Tensor
    down: torch.Tensor

    @property
    def place(self) -> tuple[str, str]:
        return self.module.component, self.module.path

    @property
    def delta(self) -> torch.Tensor:
        flat = self.up.double().flatten(1) @ self.down.double().flatten(1)
        return flat.reshape(len(self.up), *self.down.shape[1:])


def rows_of(module: Module, weights: Weights) -> torch.Tensor:
    """A module's weight; the q, k or v third of a fused one."""
    assert module.weight is not None
    whole = weights[module.weight.name]
    if module.part is None:
        return whole
    third = len(whole) // 3
    return whole["qkv".index(module.part) * third :][:third]


@functools.cache
def checkpoint_weights(family: str) -> Weights:
    return distinct(base_weights(family))


@functools.cache
def named_by_diffusers(family: str) -> dict[bytes, str]:
    """The numbers of a weight -> its module's name in a model that diffusers converted."""
    return {
        tensor.numpy().tobytes(): f"{component}.{key.removesuffix('.weight')}"
        for component, network in models_of(family, checkpoint_weights(family)).items()
        for key, tensor in network.state_dict().items()
        if key.endswith(".weight")
    }


def save_distinct(folder: Path, family: str) -> Path:
    return save_checkpoint(folder / f"{family}.safetensors", checkpoint_weights(family))


def layers(family: str, checkpoint: Path) -> list[Layer]:
    """Every layer that a LoRA can change, with its factors."""
    weights, generator, out = checkpoint_weights(family), torch.Generator().manual_seed(7), []
    names = named_by_diffusers(family)
    model = open_checkpoint(checkpoint)
    model.file.close()
    for modules in model.components.values():
        for module in modules.values():
            name = names.get(rows_of(module, weights).contiguous().numpy().tobytes()) if module.weight else None
            if module.kind not in LORA_KINDS or name is None or module.name is None or module.weight is None:
                continue
            shape = module.weight.shape
            up = torch.randn(shape[0], RANK, *(1 for _ in shape[2:]), generator=generator)
            down = torch.randn(RANK, *shape[1:], generator=generator)
            out.append(Layer(module, name, up, down))
    return out


def under(s: str) -> str:
    return s.replace(".", "_")


_NUMBERS = {"text_encoder": "te1", "text_encoder_2": "te2", "unet": "unet"}
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _kohya(layer: Layer, name: str) -> Weights:
    return {
        f"{name}.lora_up.weight": layer.up,
        f"{name}.lora_down.weight": layer.down,
        f"{name}.alpha": torch.tensor(float(RANK)),
    }


def kohya(layer: Layer) -> Weights:
    return _kohya(layer, layer.module.name or "")


def own_paths(layer: Layer) -> Weights:
    """kohya's form, the checkpoint's own path."""
    return _kohya(layer, f"lora_{layer.module.component}_{under(layer.module.path)}")


def underscored_diffusers(layer: Layer) -> Weights:
    """kohya's form, diffusers' path: what a trainer on diffusers' SDXL writes."""
    component, _, path = layer.diffusers.partition(".")
    return _kohya(layer, f"lora_{_NUMBERS[component]}_{under(path)}")


def lycoris(layer: Layer) -> Weights:
    """LyCORIS around a model alone: no component."""
    return _kohya(layer, f"lycoris_{under(layer.diffusers.partition('.')[2])}")


def diffusers(layer: Layer) -> Weights:
    return {f"{layer.diffusers}.lora_A.weight": layer.down, f"{layer.diffusers}.lora_B.weight": layer.up}


def bare(layer: Layer) -> Weights:
    """Of a model alone: no component."""
    name = layer.diffusers.partition(".")[2]
    return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}


def adapter_names(layer: Layer) -> Weights:
    name = layer.diffusers
    return {f"{name}.lora_A.default.weight": layer.down, f"{name}.lora_B.default.weight": layer.up}


def diffusers_2023(layer: Layer) -> Weights:
    name = layer.diffusers
    inner = "lora_linear_layer" if name.startswith("text") else "lora"
    return {f"{name}.{inner}.down.weight": layer.down, f"{name}.{inner}.up.weight": layer.up}


def attention_processors(layer: Layer) -> Weights:
    """The oldest: attention alone, named after diffusers' classes for it."""
    name = layer.diffusers.removesuffix(".0") if layer.diffusers.endswith("to_out.0") else layer.diffusers
    parent, _, last = name.rpartition(".")
    if ".self_attn" in parent:
        name = f"{parent}.{_OLD_TEXT[last]}_lora"
    elif parent.endswith((".attn1", ".attn2")):
        name = f"{parent}.processor.{last}_lora"
    else:
        return {}
    return {f"{name}.down.weight": layer.down, f"{name}.up.weight": layer.up}


def comfyui(layer: Layer) -> Weights:
    """The checkpoint's own dotted path for the UNet, transformers' for text encoders."""
    name = f"diffusion_model.{layer.module.path}" if layer.module.component == "unet" else layer.diffusers
    return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}


DIALECTS: dict[str, tuple[Callable[[Layer], Weights], str]] = {  # how to write -> what it must be recognised as
    "kohya": (kohya, "kohya"),
    "own paths": (own_paths, "kohya"),
    "underscored diffusers": (underscored_diffusers, "kohya"),
    "lycoris": (lycoris, "lycoris"),
    "diffusers": (diffusers, "diffusers"),
    "bare": (bare, "diffusers"),
    "adapter names": (adapter_names, "diffusers"),
    "diffusers 2023": (diffusers_2023, "diffusers-old"),
    "attention processors": (attention_processors, "diffusers-old"),
    "comfyui": (comfyui, "comfyui"),
}


def save_lora(path: Path, layers: list[Layer], write: Callable[[Layer], Weights], **metadata: str) -> Path:
    tensors = {key: tensor.contiguous() for layer in layers for key, tensor in write(layer).items()}
    save_file(tensors, path, metadata or None)
    return path


def stored(path: Path) -> Weights:
    """A file's tensors in memory of their own, so that the file can be written anew."""
    return {key: tensor.clone() for key, tensor in load_file(path).items()}
