"""diffusers' names of the layers of Flux and Stable Diffusion 3, which keep apart what the checkpoints fuse.

Sources: huggingface/diffusers scripts/convert_flux_to_diffusers.py and convert_sd3_to_diffusers.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FLUX_ROOT = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
}  # fmt: skip
FLUX_DOUBLE = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
}  # fmt: skip
FLUX_SINGLE = {"linear2": "proj_out", "modulation.lin": "norm.linear"}

SD3_ROOT = {
    "x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder", "final_layer.linear": "proj_out",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
}  # fmt: skip
SD3_JOINT = {
    "x_block.attn.proj": "attn.to_out.0", "context_block.attn.proj": "attn.to_add_out",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj", "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj", "context_block.mlp.fc2": "ff_context.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear", "context_block.adaLN_modulation.1": "norm1_context.linear",
}  # fmt: skip

NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q", "img_attn.norm.key_norm.scale": "attn.norm_k",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q", "txt_attn.norm.key_norm.scale": "attn.norm_added_k",
    "norm.query_norm.scale": "attn.norm_q", "norm.key_norm.scale": "attn.norm_k",
    "x_block.attn.ln_q": "attn.norm_q", "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q", "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k",
}  # fmt: skip
_PLAIN, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
FUSED = {
    "img_attn.qkv": ("attn", _PLAIN), "txt_attn.qkv": ("attn", _ADDED),
    "x_block.attn.qkv": ("attn", _PLAIN), "context_block.attn.qkv": ("attn", _ADDED),
    "x_block.attn2.qkv": ("attn2", _PLAIN),
}  # fmt: skip
_DOUBLE = re.compile(r"double_blocks\.(\d+)\.(.+)")
_SINGLE = re.compile(r"single_blocks\.(\d+)\.(.+)")
_JOINT = re.compile(r"joint_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """A layer as diffusers has it: rows start…stop of the checkpoint's layer.

    swapped: diffusers keeps the two halves of the rows in the other order.
    """

    path: str
    start: int
    stop: int
    swapped: bool = False


def flux(path: str, rows: int, columns: int) -> list[Piece]:
    """rows, columns: of the checkpoint's weight; a single block's linear1 is q, k, v (columns each) and the MLP."""
    if path in FLUX_ROOT:
        return [Piece(FLUX_ROOT[path], 0, rows)]
    if path == "final_layer.adaLN_modulation.1":  # shift, scale; diffusers: scale, shift
        return [Piece("norm_out.linear", 0, rows, swapped=True)]
    if match := _DOUBLE.fullmatch(path):
        return _block(f"transformer_blocks.{match[1]}", match[2], rows, FLUX_DOUBLE)
    if match := _SINGLE.fullmatch(path):
        block = f"single_transformer_blocks.{match[1]}"
        if match[2] == "linear1":
            edges = (0, columns, 2 * columns, 3 * columns, rows)
            inner = (*(f"attn.{name}" for name in _PLAIN), "proj_mlp")
            return [Piece(f"{block}.{inner[i]}", edges[i], edges[i + 1]) for i in range(4)]
        return _block(block, match[2], rows, FLUX_SINGLE)
    return []


def sd3(path: str, rows: int, columns: int) -> list[Piece]:
    """rows, columns: of the checkpoint's weight."""
    if path in SD3_ROOT:
        return [Piece(SD3_ROOT[path], 0, rows)]
    if path == "final_layer.adaLN_modulation.1":
        return [Piece("norm_out.linear", 0, rows, swapped=True)]
    if match := _JOINT.fullmatch(path):
        found = _block(f"transformer_blocks.{match[1]}", match[2], rows, SD3_JOINT)
        if match[2] == "context_block.adaLN_modulation.1" and rows == 2 * columns:
            # the last block's text stream ends with a shift and a scale alone, which diffusers swaps as in norm_out
            return [Piece(piece.path, 0, rows, swapped=True) for piece in found]
        return found
    return []


def _block(block: str, inner: str, rows: int, table: dict[str, str]) -> list[Piece]:
    name = table.get(inner) or NORMS.get(inner)
    if name:
        return [Piece(f"{block}.{name}", 0, rows)]
    if inner in FUSED:
        parent, names = FUSED[inner]
        third = rows // 3
        return [Piece(f"{block}.{parent}.{name}", i * third, (i + 1) * third) for i, name in enumerate(names)]
    return []
