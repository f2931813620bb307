"""Recognise a checkpoint by its key names and tensor ranks, at any width, and see it as modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..errors import LayoutError
from ..files.dtypes import FLOATS
from ..files.metadata import BaseModel
from ..files.source import TensorFile, TensorInfo
from .flux import FLUX
from .module import (
    CONV,
    CONV1X1,
    EMBEDDING,
    LINEAR,
    NORM,
    PARAMETER,
    Architecture,
    ComponentTable,
    Lookup,
    Model,
    Module,
)
from .sd1 import SD1
from .sd2 import SD2
from .sd3 import SD3
from .sdxl import SDXL
from .vae import find_vae

ARCHITECTURES = (SD1, SD2, SDXL, SD3, FLUX)

_LORA_MARKS = (
    ".lora_up.",
    ".lora_down.",
    ".lora_A.",
    ".lora_B.",
    ".hada_w1",
    ".lokr_w1",
    ".oft_",
    "_lora.up",
    ".lora.up",
)
# beside a quantised tensor: scaled fp8 (ComfyUI's two ways), bitsandbytes' int8 and 4 bits
_SCALES = (
    "scaled_fp8",
    ".scale_weight",
    ".weight_scale",
    ".comfy_quant",
    ".SCB",
    ".weight.absmax",
    ".weight.quant_map",
)
_DENOISERS = (
    ("input_blocks.0.0.weight", "a UNet of another plan, such as an SDXL refiner, SD2 unCLIP or a ControlNet"),
    ("double_blocks.0.", "a relative of Flux, such as Chroma or Flux.2, or a part of Flux"),
    ("joint_blocks.0.", "a relative or a part of Stable Diffusion 3"),
    ("down_blocks.0.resnets.0", "a UNet in diffusers' own layout; name the folder it lies in"),
)
_OF_VAES = ("encoder.", "decoder.", "first_stage_model.", "vae.")
_EMBEDDINGS = ("_embedding", "shared", "relative_attention_bias", "embed_tokens")


def recognise(file: TensorFile) -> Model:
    """The file as a Model. LayoutError names what it is instead, where that can be told."""
    names = file.tensors
    if any(mark in name for name in names for mark in _LORA_MARKS):
        raise LayoutError(
            f"{file.path.name} is a LoRA, not a checkpoint.", hint="Name the checkpoint files themselves here."
        )
    architecture = _architecture(file)
    vae = architecture.vae_prefixes
    _refuse_scales(file, vae)
    denoiser = _prefix(architecture.components[0], names)
    variant = "" if denoiser is None else architecture.variant(_lookup(denoiser, names))
    model = Model(architecture, variant, file)
    claimed: set[str] = set()
    for table in architecture.components:
        prefix = _prefix(table, names)
        if prefix is not None:
            own = {k: v for k, v in names.items() if _belongs(table, prefix, k)}
            _refuse_integers(file, own)
            claimed |= own.keys()
            model.components[table.id] = dict(_modules(table, prefix, own))
    for name, info in names.items():
        start = next((prefix for prefix in vae if name.startswith(prefix)), None)
        if start is not None and name not in claimed:
            if info.dtype in FLOATS:
                model.vae[name[len(start) :]] = info
        elif name not in claimed:
            what = "EMA copies" if name.startswith("model_ema.") else "other tensors"
            model.ignored[what] = model.ignored.get(what, 0) + 1
    return model


def _refuse_scales(file: TensorFile, vae: tuple[str, ...]) -> None:
    scales = [name for name in file.tensors if name.endswith(_SCALES) and not name.startswith(vae)]
    if scales:
        raise _quantised(file, scales, "Its weights mean nothing without factors that are stored beside them")


def _refuse_integers(file: TensorFile, own: dict[str, TensorInfo]) -> None:
    """Weights that are no floats: codes of a quantisation, of which a difference says nothing."""
    integers = [key for key, info in own.items() if key.endswith(("weight", ".bias")) and info.dtype not in FLOATS]
    if integers:
        raise _quantised(file, integers, f"Its weights are stored as {own[integers[0]].dtype}")


def _quantised(file: TensorFile, names: list[str], why: str) -> LayoutError:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return LayoutError(
        f"{file.path.name} is quantised.",
        f"{why}: {shown}.",
        "Use an unquantised checkpoint: fp16, bf16, fp32 or plain fp8.",
    )


def _belongs(table: ComponentTable, prefix: str, name: str) -> bool:
    return name.startswith(prefix) and (bool(prefix) or name.split(".")[0] in table.roots)


def _prefix(table: ComponentTable, names: Iterable[str]) -> str | None:
    return next((prefix for prefix in table.prefixes if prefix + table.probe in names), None)


def _lookup(prefix: str, names: Mapping[str, TensorInfo]) -> Lookup:
    return lambda path: names.get(prefix + path)


def title_of(base: BaseModel) -> str:
    """An architecture as people call it, from what metadata calls it; that itself if it is none of these."""
    for architecture in ARCHITECTURES:
        titles = {
            own: architecture.titles.get(variant, architecture.title) for variant, own in architecture.bases.items()
        }
        titles[architecture.base] = architecture.title
        found = next((title for own, title in titles.items() if own.architecture == base.architecture), None)
        if found is not None:
            return found
    return base.architecture


def _architecture(file: TensorFile) -> Architecture:
    names = file.tensors
    for architecture in ARCHITECTURES:
        prefix = _prefix(architecture.components[0], names)
        if prefix is not None and architecture.matches(_lookup(prefix, names)):
            return architecture
    kind = _kind([name for name in names if not name.startswith(_OF_VAES)], _DENOISERS)
    if kind is None and not any(name.startswith("model.diffusion_model.") for name in names):
        best = max(ARCHITECTURES, key=lambda a: (_text_encoders(a, names), -len(a.components)))
        if _text_encoders(best, names):
            return best
        if find_vae(names):
            raise LayoutError(
                f"{file.path.name} is no Stable Diffusion or Flux.1 checkpoint.", "It looks like a VAE.",
                "Name the checkpoint that it belongs to.",
            )  # fmt: skip
    raise _unknown(file, f"It looks like {kind}." if kind else "None of its tensors has a name that a checkpoint has.")


def _kind(names: Iterable[str], marks: tuple[tuple[str, str], ...]) -> str | None:
    return next((title for mark, title in marks if any(mark in name for name in names)), None)


def _text_encoders(architecture: Architecture, names: Iterable[str]) -> int:
    return sum(_prefix(table, names) is not None for table in architecture.components[1:])


def _unknown(file: TensorFile, why: str) -> LayoutError:
    return LayoutError(
        f"{file.path.name} is no Stable Diffusion or Flux.1 checkpoint.",
        why,
        "Name a checkpoint in the original (Stability or Black Forest Labs) layout, or a folder in diffusers' layout.",
    )


def _modules(table: ComponentTable, prefix: str, own: dict[str, TensorInfo]):
    """Yield (path, Module) of a component's tensors; a fused attention weight yields its q, k and v."""
    for key, info in own.items():
        path = key[len(prefix) :]
        if path.endswith(".in_proj_weight"):
            yield from _fused(table, path.removesuffix(".in_proj_weight"), info, own.get(key[:-6] + "bias"))
        elif path.endswith(".weight"):
            stem = path.removesuffix(".weight")
            module = _module(table, stem, info, own.get(key.removesuffix("weight") + "bias"))
            yield stem, module
        elif info.dtype in FLOATS and (not path.endswith("bias") or _stands_alone(key, own)):
            block, _ = table.describe(path)
            yield path, Module(table.id, path, PARAMETER, block, "", None, info)


def _stands_alone(bias_key: str, own: dict[str, TensorInfo]) -> bool:
    return bias_key.removesuffix("bias") + "weight" not in own


def _module(table: ComponentTable, path: str, weight: TensorInfo, bias: TensorInfo | None) -> Module:
    block, group = table.describe(path)
    rank = len(weight.shape)
    if rank == 4:
        kind = CONV1X1 if weight.shape[2:] == (1, 1) else CONV
    elif rank == 2:
        kind = EMBEDDING if path.endswith(_EMBEDDINGS) else LINEAR
    else:
        kind = NORM if rank == 1 else PARAMETER
    name = table.rename(path) if kind in (LINEAR, CONV1X1, CONV) or (kind == NORM and table.norms_reachable) else None
    if path == "input_blocks.0.0" and weight.shape[1] == 9:
        name = None  # A1111 pads any LoRA of this layer by five channels, so one of all nine fails
    fused = path.rsplit(".", 1)[0] if path.endswith(".attn.out_proj") else None
    return Module(table.id, path, kind, block, group if name and kind != NORM else "", name, weight, bias, None, fused)


def _fused(table: ComponentTable, path: str, weight: TensorInfo, bias: TensorInfo | None):
    rows = weight.shape[0] // 3
    for index, part in enumerate("qkv"):
        module = _module(table, f"{path}.{part}_proj", weight.rows(index * rows, (index + 1) * rows), None)
        if bias is not None:
            module = replace(module, bias=bias.rows(index * rows, (index + 1) * rows))
        yield module.path, replace(module, part=part, fused=path)
