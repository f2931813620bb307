"""Which block and layer group a path belongs to."""

from __future__ import annotations

import re

_UNET_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.")
_TEXT_BLOCK = re.compile(r"(?:encoder\.layers|transformer\.resblocks|encoder\.block)\.(\d+)\.")


def unet(path: str) -> tuple[str, str]:
    """(block, group) of a CompVis UNet path: IN00…, MID, OUT00…, TIME, LABEL, OUT."""
    if match := _UNET_BLOCK.match(path):
        block = f"{'IN' if match[1] == 'input_blocks' else 'OUT'}{int(match[2]):02d}"
    elif path.startswith("middle_block."):
        block = "MID"
    else:
        block = {"time_embed": "TIME", "label_emb": "LABEL"}.get(path.split(".")[0], "OUT")
    return block, _unet_group(path)


def _unet_group(path: str) -> str:
    if ".attn1." in path or ".attn2." in path:
        return "attention"
    if ".ff." in path:
        return "feedforward"
    if path.endswith((".proj_in", ".proj_out")):
        return "projection"
    if "emb_layers" in path or path.startswith(("time_embed.", "label_emb.")):
        return "embedding"
    if path in ("input_blocks.0.0", "out.2"):
        return "inout"
    if path.endswith((".op", ".conv")):
        return "sampling"
    return "resnet"


def text_encoder(path: str) -> tuple[str, str]:
    """(block, group) of a CLIP, open_clip or T5 path: L00… or EMB."""
    match = _TEXT_BLOCK.match(path)
    block = f"L{int(match[1]):02d}" if match else "EMB"
    return block, "feedforward" if ".mlp." in path or ".DenseReluDense." in path else "attention"
