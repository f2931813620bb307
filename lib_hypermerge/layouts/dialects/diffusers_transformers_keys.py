"""The other way round: where each tensor of diffusers' Flux and SD3 transformers lies in a single file.

Inverse of diffusers_transformers.py, whose tables it turns.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import diffusers_transformers as transformers
from .spots import Spot, Tensors, inverse

_SINGLE_PARTS = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}


def _fused(start: tuple[str, ...]) -> dict[str, tuple[str, int]]:
    """diffusers' path in a block → (ours, which third)."""
    return {
        f"{parent}.{name}": (ours, index)
        for ours, (parent, names) in transformers.FUSED.items()
        if ours.startswith(start)
        for index, name in enumerate(names)
    }


def _norms(start: tuple[str, ...]) -> dict[str, str]:
    return inverse({ours: theirs for ours, theirs in transformers.NORMS.items() if ours.startswith(start)})


_IMAGE_AND_TEXT, _BLOCKS = ("img_", "txt_"), ("x_block.", "context_block.")
_FLUX_DOUBLE = inverse(transformers.FLUX_DOUBLE) | _norms(_IMAGE_AND_TEXT), _fused(_IMAGE_AND_TEXT)
_FLUX_SINGLE = inverse(transformers.FLUX_SINGLE) | _norms(("norm.",))
_SD3_JOINT = inverse(transformers.SD3_JOINT) | _norms(_BLOCKS), _fused(_BLOCKS)
_FLUX_ROOT, _SD3_ROOT = inverse(transformers.FLUX_ROOT), inverse(transformers.SD3_ROOT)
_LAST = Spot("final_layer.adaLN_modulation.1", swapped=True)
_AT = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def flux(tensors: Tensors) -> dict[str, Spot]:
    """Spots of a FluxTransformer2DModel's tensors."""
    return _spots(tensors, _flux_stem)


def _flux_stem(stem: str) -> Spot | None:
    if stem in _FLUX_ROOT:
        return Spot(_FLUX_ROOT[stem])
    if stem == "norm_out.linear":
        return _LAST
    match = _AT.fullmatch(stem)
    if match is None:
        return None
    if not match[1]:
        return _in_block(f"double_blocks.{match[2]}.", match[3], *_FLUX_DOUBLE)
    if match[3] in _SINGLE_PARTS:
        return Spot(f"single_blocks.{match[2]}.linear1", _SINGLE_PARTS[match[3]], 4)
    return _in_block(f"single_blocks.{match[2]}.", match[3], _FLUX_SINGLE, {})


def sd3(tensors: Tensors) -> dict[str, Spot]:
    """Spots of an SD3Transformer2DModel's tensors."""
    spots = _spots(tensors, _sd3_stem)
    for name, info in tensors.items():
        # the last block's text stream ends with a shift and a scale alone, which diffusers has the other way round
        if name.endswith(".norm1_context.linear.weight") and info.shape[0] == 2 * info.shape[-1]:
            for own in (name, name.removesuffix("weight") + "bias"):
                if own in spots:
                    spots[own] = Spot(spots[own].key, swapped=True)
    if "pos_embed.pos_embed" in tensors:
        spots["pos_embed.pos_embed"] = Spot("pos_embed")
    return spots


def _sd3_stem(stem: str) -> Spot | None:
    if stem in _SD3_ROOT:
        return Spot(_SD3_ROOT[stem])
    if stem == "norm_out.linear":
        return _LAST
    match = _AT.fullmatch(stem)
    return _in_block(f"joint_blocks.{match[2]}.", match[3], *_SD3_JOINT) if match and not match[1] else None


def _in_block(at: str, inner: str, whole: dict[str, str], fused: dict[str, tuple[str, int]]) -> Spot | None:
    if inner in fused:
        ours, part = fused[inner]
        return Spot(at + ours, part, 3)
    return Spot(at + whole[inner]) if inner in whole else None


def _spots(tensors: Tensors, place: Callable[[str], Spot | None]) -> dict[str, Spot]:
    out = {}
    for name in tensors:
        stem, _, end = name.rpartition(".")
        spot = place(stem)
        if spot is not None:
            key = spot.key if spot.key.endswith(".scale") else f"{spot.key}.{end}"  # Flux calls a norm's weight so
            out[name] = Spot(key, spot.part, spot.parts, spot.swapped)
    return out
