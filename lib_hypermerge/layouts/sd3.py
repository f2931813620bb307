"""Stable Diffusion 3 and 3.5: joint blocks J00…J23 (J37 in 3.5 large), an image and a text stream in each.

Layout: Stability-AI/sd3.5 mmditx.py; names in metadata: kohya-ss/sd-scripts library/sai_model_spec.py, sd3_utils.py.
"""

from __future__ import annotations

import re

from ..files.metadata import BaseModel
from .clip_t5 import CLIP_G, CLIP_L, T5
from .dialects import kohya
from .flux import TRANSFORMER_PREFIXES
from .module import Architecture, ComponentTable, Lookup

_BLOCK = re.compile(r"joint_blocks\.(\d+)\.")
_ENTRIES = ("x_embedder", "pos_embed", "context_embedder", "t_embedder", "y_embedder")
_MARKS = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight", "final_layer.linear.weight")


def describe(path: str) -> tuple[str, str]:
    """(block, group) of a path such as joint_blocks.0.x_block.attn.qkv."""
    if match := _BLOCK.match(path):
        block = f"J{int(match[1]):02d}"
        if "adaLN" in path:
            return block, "embedding"
        return block, "feedforward" if ".mlp." in path else "attention"
    root = path.split(".")[0]
    is_embedding = root in ("t_embedder", "y_embedder") or "adaLN" in path
    return "IN" if root in _ENTRIES else "OUT", "embedding" if is_embedding else "inout"


def _variant(find: Lookup) -> str:
    if find("joint_blocks.0.x_block.attn.ln_q.weight") is None:
        return "medium"
    return "3.5-medium" if find("joint_blocks.0.x_block.attn2.qkv.weight") else "3.5-large"


SD3 = Architecture(
    id="sd3",
    title="Stable Diffusion 3",
    base=BaseModel("medium", "stable-diffusion-3-medium", 1024),
    bases={
        "3.5-medium": BaseModel("5-medium", "stable-diffusion-3-5-medium", 1024),
        "3.5-large": BaseModel("5-large", "stable-diffusion-3-5-large", 1024),
    },
    titles={"3.5-medium": "Stable Diffusion 3.5 medium", "3.5-large": "Stable Diffusion 3.5 large"},
    components=(
        ComponentTable(
            "unet", "transformer", TRANSFORMER_PREFIXES, "joint_blocks.0.x_block.attn.qkv.weight", kohya.unet_path,
            describe, roots=(*_ENTRIES, "joint_blocks", "final_layer"),
        ),
        CLIP_L,
        CLIP_G,
        T5,
    ),
    matches=lambda find: all(find(mark) is not None for mark in _MARKS),
    variant=_variant,
    vae_prefixes=("first_stage_model.", "vae."),
)  # fmt: skip
