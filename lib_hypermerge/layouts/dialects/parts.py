"""How the dialects spell a tensor's name: the module it belongs to, and which part of that module it is.

Sources: kohya-ss/sd-scripts networks/lora.py; KohakuBlueleaf/LyCORIS lycoris/modules; huggingface/diffusers
src/diffusers/utils/state_dict_utils.py and loaders/lora_conversion_utils.py; huggingface/peft utils/save_and_load.py;
cloneofsimo/lora lora_diffusion/lora.py; mkshing/svdiff-pytorch train_svdiff.py; XLabs-AI/x-flux.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KOHYA, LYCORIS, DIFFUSERS, DIFFUSERS_OLD, PEFT, COMFYUI, XLABS, CLONEOFSIMO, SVDIFF = (
    "kohya", "lycoris", "diffusers", "diffusers-old", "peft", "comfyui", "xlabs", "cloneofsimo", "svdiff",
)  # fmt: skip

# kohya's and LyCORIS' own part names, as all families here know them
_OWN = (
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_up.bias", "alpha", "scale", "dora_scale", "rescale",
    "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2",
    "oft_diag", "oft_blocks", "on_input", "a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight",
    "diff", "diff_b", "w_norm", "b_norm", "bias_indices", "bias_values", "bias_size",
)  # fmt: skip

# parts that make no module by themselves
AUXILIARY = frozenset(("alpha", "scale", "dora_scale", "lora_magnitude_vector", "rescale", "weight"))

_OWN_ENDING = re.compile(r"(.+?)\.(" + "|".join(re.escape(part) for part in sorted(_OWN, key=len, reverse=True)) + ")")
_SIDES = {"up": "lora_up.weight", "down": "lora_down.weight", "A": "lora_down.weight", "B": "lora_up.weight"}
_PEFT = re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight")
_PEFT_BIAS = re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.bias")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.[^.]+){0,2}")
_HADA = re.compile(r"(.+)\.((?:hada|lokr)_[wt]\w+)\.(?!weight)[^.]+")  # PEFT, an adapter's name at the end
_PROCESSOR = re.compile(r"(.+)\.(?:processor\.)?(to_[qkv]|to_out)_lora\.(up|down)\.weight")
_LAYER = re.compile(r"(.+)\.(?:lora|lora_linear_layer)\.(up|down)\.weight")
_XLABS = re.compile(r"(.*double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])\.(up|down)\.weight")
_INDEXED = re.compile(r"([a-z_0-9]+:\d+):(up|down)")
_SVDIFF = re.compile(r"(.+)\.delta")

_WRAPPER = "base_model.model."  # what PEFT puts around a model
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Spelled:
    """module: up to the part, as the file has it.  part: a name in kohya's and LyCORIS' spelling."""

    module: str
    part: str
    dialect: str


def split(key: str) -> Spelled | None:
    """What a tensor's name says; None if no dialect has such a name."""
    if "." not in key.removesuffix(".weight") and ":" in key:
        indexed = _INDEXED.fullmatch(key)
        return Spelled(indexed[1], _SIDES[indexed[2]], CLONEOFSIMO) if indexed else None
    if match := _XLABS.fullmatch(key):
        stream = "img" if match[3] == "1" else "txt"
        return Spelled(f"{match[1]}.{stream}_attn.{match[2]}", _SIDES[match[4]], XLABS)
    if match := _PEFT.fullmatch(key):
        return Spelled(match[1], _SIDES[match[2]], _dotted_dialect(match[1]))
    if match := _PEFT_BIAS.fullmatch(key):
        return Spelled(match[1], "lora_up.bias", _dotted_dialect(match[1]))
    if match := _MAGNITUDE.fullmatch(key):
        return Spelled(match[1], "lora_magnitude_vector", _dotted_dialect(match[1]))
    if match := _PROCESSOR.fullmatch(key):
        return Spelled(f"{match[1]}.{_projection(match[1], match[2])}", _SIDES[match[3]], DIFFUSERS_OLD)
    if match := _LAYER.fullmatch(key):
        return Spelled(match[1], _SIDES[match[2]], DIFFUSERS_OLD)
    if match := _OWN_ENDING.fullmatch(key) or _HADA.fullmatch(key):
        return Spelled(match[1], match[2], _dotted_dialect(match[1]))
    if match := _SVDIFF.fullmatch(key):
        return Spelled(match[1], "delta", SVDIFF)
    if key.endswith(".weight"):  # IA3's, if on_input stands beside it
        module = key.removesuffix(".weight")
        return Spelled(module, "weight", _dotted_dialect(module))
    return None


def _projection(parent: str, name: str) -> str:
    """The layer that the oldest diffusers files name after their own class of attention."""
    if parent.endswith(".self_attn"):
        return _TEXT_PROJECTIONS[name]
    return "to_out.0" if name == "to_out" else name


def _dotted_dialect(module: str) -> str:
    if "." not in module:
        return LYCORIS if module.startswith("lycoris_") else KOHYA
    if _WRAPPER in module:
        return PEFT
    return COMFYUI if module.startswith(("diffusion_model.", "model.diffusion_model.")) else DIFFUSERS


# what may stand before a dotted path → the component
_DOTTED = (
    ("unet.", "unet"), ("transformer.", "unet"), ("model.diffusion_model.", "unet"), ("diffusion_model.", "unet"),
    ("text_encoder.", "te1"), ("text_encoder_2.", "te2"), ("text_encoder_3.", "te3"),
    ("cond_stage_model.transformer.", "te1"), ("cond_stage_model.model.", "te1"),
    ("conditioner.embedders.0.transformer.", "te1"), ("conditioner.embedders.1.model.", "te2"),
    ("text_encoders.clip_l.transformer.", "te1"), ("text_encoders.clip_g.transformer.", "te2"),
    ("text_encoders.t5xxl.transformer.", "te3"),
    ("clip_l.transformer.", "te1"), ("clip_g.transformer.", "te2"), ("t5xxl.transformer.", "te3"),
    ("clip_l.", "te1"), ("clip_g.", "te2"), ("t5xxl.", "te3"),
)  # fmt: skip
_DRESSED = re.compile(r"(?:lora|oft|lycoris)_(?:(unet|te\d?|transformer(?!_blocks_))_)?(.+)")
FOLDERS = {  # of a diffusers pipeline → component
    "unet": "unet", "transformer": "unet", "text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3",
}  # fmt: skip


def undress(module: str, component: str = "") -> str:
    """The name with underscores for dots, after its component where that is told by the name, else by the caller."""
    if ":" in module:  # a number
        return module
    if "." not in module and (match := _DRESSED.fullmatch(module)):
        said = "unet" if match[1] == "transformer" else match[1]
        return "_".join(filter(None, (said or component, match[2])))
    path = module.removeprefix(_WRAPPER).replace(".processor.", ".")
    if not path.startswith("transformer.resblocks."):  # open_clip's own, no component
        for prefix, said in _DOTTED:
            if path.startswith(prefix):
                return f"{said}_{path.removeprefix(prefix).removeprefix(_WRAPPER)}".replace(".", "_")
    return "_".join(filter(None, (component, path.replace(".", "_"))))
