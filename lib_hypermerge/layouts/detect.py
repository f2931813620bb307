"""Recognise a checkpoint by its key names and tensor ranks, at any width, and see it as modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ..errors import LayoutError
from ..files.dtypes import FLOATS
from ..files.source import TensorFile, TensorInfo
from .module import CONV, CONV1X1, EMBEDDING, LINEAR, NORM, PARAMETER, Architecture, ComponentTable, Model, Module
from .sd1 import SD1
from .sd2 import SD2
from .sdxl import SDXL

ARCHITECTURES = (SD1, SD2, SDXL)

_VAE_PREFIX = "first_stage_model."
_VARIANTS = {9: "inpainting", 8: "instruct-pix2pix"}
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
_OTHERS = (
    ("double_blocks.0.", "a Flux model"),
    ("joint_blocks.0.", "a Stable Diffusion 3 model"),
    ("down_blocks.0.resnets.0", "a UNet in diffusers' own layout"),
    ("decoder.up.0.block.0", "a VAE"),
)


def recognise(file: TensorFile) -> Model:
    """The file as a Model. LayoutError names what it is instead, where that can be told."""
    names = file.tensors
    if any(mark in name for name in names for mark in _LORA_MARKS):
        raise LayoutError(
            f"{file.path.name} is a LoRA, not a checkpoint.", hint="Name the checkpoint files themselves here."
        )
    architecture = _architecture(file)
    _refuse_scales(file)
    model = Model(architecture, _variant(architecture, names), file)
    claimed: set[str] = set()
    for table in architecture.components:
        prefix = _prefix(table, names)
        if prefix is not None:
            own = {k: v for k, v in names.items() if _belongs(table, prefix, k)}
            _refuse_integers(file, own)
            claimed |= own.keys()
            model.components[table.id] = dict(_modules(table, prefix, own))
    model.vae = {k[len(_VAE_PREFIX) :]: v for k, v in names.items() if k.startswith(_VAE_PREFIX) and v.dtype in FLOATS}
    for name in names:
        if name not in claimed and not name.startswith(_VAE_PREFIX):
            what = "EMA copies" if name.startswith("model_ema.") else "other tensors"
            model.ignored[what] = model.ignored.get(what, 0) + 1
    return model


def _refuse_scales(file: TensorFile) -> None:
    scales = [name for name in file.tensors if name.endswith(_SCALES) and not name.startswith(_VAE_PREFIX)]
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


def _architecture(file: TensorFile) -> Architecture:
    names = file.tensors
    unet = _prefix(SD1.components[0], names)
    if unet is not None:
        if f"{unet}label_emb.0.0.weight" in names:
            if not any(name.startswith(f"{unet}input_blocks.9.") for name in names):
                return SDXL
            raise _unknown(file, "It has class embeddings and twelve input blocks: an SDXL refiner or SD2 unCLIP.")
        projection = names.get(f"{unet}input_blocks.1.1.proj_in.weight")
        if projection is not None:
            return SD1 if len(projection.shape) == 4 else SD2
        raise _unknown(file, "Its UNet has no attention in the first block.")
    for architecture in ARCHITECTURES:
        if all(_prefix(table, names) is not None for table in architecture.components[1:]):
            return architecture
    kind = next((title for mark, title in _OTHERS if any(mark in name for name in names)), None)
    raise _unknown(file, f"It looks like {kind}." if kind else "None of its tensors has a name that a checkpoint has.")


def _unknown(file: TensorFile, why: str) -> LayoutError:
    return LayoutError(
        f"{file.path.name} is no Stable Diffusion 1, 2 or XL checkpoint.",
        why,
        "Name a checkpoint in the original (CompVis/Stability) layout.",
    )


def _variant(architecture: Architecture, names: dict[str, TensorInfo]) -> str:
    prefix = _prefix(architecture.components[0], names)
    first = names.get(f"{prefix}input_blocks.0.0.weight")
    return _VARIANTS.get(first.shape[1], "") if first is not None and len(first.shape) == 4 else ""


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
        kind = EMBEDDING if path.endswith("_embedding") else LINEAR
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
