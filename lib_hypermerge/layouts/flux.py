"""Flux.1 dev and schnell, its tools included: double-stream blocks D00…D18, single-stream S00…S37, IN and OUT.

Layout: black-forest-labs/flux src/flux/model.py.
"""

from __future__ import annotations

import re

from ..files.metadata import BaseModel
from .clip_t5 import CLIP_L, T5
from .dialects import kohya
from .module import Architecture, ComponentTable, Lookup

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")

_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")
_ENTRIES = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")
# Chroma, Flux.2 and Hunyuan's models share names with Flux, but lack some of these
_MARKS = (
    "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "double_blocks.0.img_mod.lin.weight",
    "single_blocks.0.linear1.weight",
)  # fmt: skip
_TOOLS = {384: "Fill", 128: "Canny or Depth"}  # channels into img_in, 64 in the plain models


def describe(path: str) -> tuple[str, str]:
    """(block, group) of a path such as double_blocks.0.img_attn.qkv.

    A single block's linear1 and linear2 fuse attention with the MLP; they count as attention.
    """
    if match := _BLOCK.match(path):
        block = f"{match[1][0].upper()}{int(match[2]):02d}"
        if "mod" in path:
            return block, "embedding"
        return block, "feedforward" if "_mlp." in path else "attention"
    root = path.split(".")[0]
    is_embedding = root in ("time_in", "vector_in", "guidance_in")
    return "IN" if root in _ENTRIES else "OUT", "embedding" if is_embedding or "adaLN" in path else "inout"


def _variant(find: Lookup) -> str:
    first = find("img_in.weight")
    if first is not None and first.shape[1] in _TOOLS:
        return _TOOLS[first.shape[1]]
    return "" if find("guidance_in.in_layer.weight") else "schnell"


_IMPLEMENTATION = "https://github.com/black-forest-labs/flux"  # by this Forge lists a LoRA under Flux

FLUX = Architecture(
    id="flux",
    title="Flux.1",
    base=BaseModel("flux1", "flux-1-dev", 1024, implementation=_IMPLEMENTATION),
    bases={"schnell": BaseModel("flux1", "flux-1-schnell", 1024, implementation=_IMPLEMENTATION)},
    components=(
        ComponentTable(
            "unet", "transformer", TRANSFORMER_PREFIXES, "double_blocks.0.img_attn.qkv.weight", kohya.unet_path,
            describe, roots=(*_ENTRIES, "double_blocks", "single_blocks", "final_layer"),
        ),
        CLIP_L,
        T5,
    ),
    matches=lambda find: all(find(mark) is not None for mark in _MARKS),
    variant=_variant,
    alike=frozenset(("", "schnell")),
    vae_prefixes=("vae.", "first_stage_model."),
)  # fmt: skip
