"""What Forge makes of an adapter file, told from names (packages_3rdparty/comfyui_lora_collection/lora.py).

It makes a table of all names that a layer may go by and asks the file for each. What is left over is unmatched, and
more than twelve tensors of that keep the whole file from being loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ..layouts.dialects import kohya
from .inspect_a1111 import Reach, Shapes

TITLE = "Forge"
KNOWN = ("sd1", "sd2", "sdxl", "sd3", "flux")
MOST_UNMATCHED = 12

_UNET = "model.diffusion_model."
_DIFFUSERS_UNETS = ("sd1", "sd2", "sdxl")
_EXTRA = {
    "out.0": ("conv_norm_out",),
    "label_emb.0.0": ("class_embedding_linear_1", "add_embedding_linear_1"),
    "label_emb.0.2": ("class_embedding_linear_2", "add_embedding_linear_2"),
}
_CLIP_PARTS = r"(mlp[._]fc[12]|self_attn[._](?:[qkv]|out)_proj)"
_LAYERS = {"sd1": 12, "sd2": 24, "sdxl": 12, "sd3": 12, "flux": 12}
_LAYERS_OF_TE2 = {"sdxl": 32, "sd3": 32}
_T5 = re.compile(r"lora_te[123]_encoder_block_\d+_layer_\d+_\w+")
_PROJECTIONS = ("lora_te1_text_projection", "lora_te2_text_projection", "text_encoder.text_projection")

# part → what has to stand beside it, lest Forge stops with an error
_PAIRS = {
    ".lora_up.weight": (".lora_down.weight",), "_lora.up.weight": ("_lora.down.weight",),
    ".lora_B.weight": (".lora_A.weight",), ".lora.up.weight": (".lora.down.weight",),
    ".lora_linear_layer.up.weight": (".lora_linear_layer.down.weight",),
    ".hada_w1_a": (".hada_w1_b", ".hada_w2_a", ".hada_w2_b"), ".hada_t1": (".hada_t2",),
    ".a1.weight": (".a2.weight", ".b1.weight", ".b2.weight"),
}  # fmt: skip
_SINGLES = (
    ".alpha", ".dora_scale", ".lora_mid.weight", ".w_norm", ".b_norm", ".diff", ".diff_b", ".set_weight",
    ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2",
)  # fmt: skip
_PARTS = tuple(dict.fromkeys((*_PAIRS, *(part for others in _PAIRS.values() for part in others), *_SINGLES)))
_BESIDE = {  # counts only if the other is there
    ".b_norm": ".w_norm", ".lora_down.weight": ".lora_up.weight", ".lora_mid.weight": ".lora_up.weight",
    "_lora.down.weight": "_lora.up.weight", ".lora_A.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora.up.weight",
}  # fmt: skip


def reach(tensors: Shapes, checkpoint: Shapes, architecture: str, resolved: Collection[str] = ()) -> Reach:
    """Which tensors of an adapter file Forge loads. resolved: modules, by their own names, that have a layer."""
    if architecture not in KNOWN:
        return Reach(refused="It does not know this architecture.")
    names = _Names(checkpoint, architecture, frozenset(resolved))
    result = Reach()
    modules = set()
    for tensor in tensors:
        part = next((part for part in _PARTS if tensor.endswith(part)), "")
        stem = tensor[: len(tensor) - len(part)]
        if not part:
            result.ignored[tensor] = "not of a kind that it reads"
        elif not names.has(stem):
            result.ignored[tensor] = "no layer of that name"
        elif missing := [other for other in _PAIRS.get(part, ()) if stem + other not in tensors]:
            result.refused = f"{tensor} without {missing[0].lstrip('._')}: it stops with an error."
            return result
        elif part in _BESIDE and stem + _BESIDE[part] not in tensors:
            result.ignored[tensor] = f"no {_BESIDE[part].lstrip('._')} beside it"
        else:
            result.applied.append(tensor)
            modules.add(stem)
    result.modules = len(modules)
    if len(result.ignored) > MOST_UNMATCHED:
        unmatched = len(result.ignored)
        result.refused = f"{unmatched} tensors match nothing, and it refuses a file with over {MOST_UNMATCHED}."
    return result


def stumble(found: Reach, damage: Mapping[str, str]) -> None:
    """Take damaged modules out of what is loaded. damage: tensor → CODES or DISAGREE of inspect_hosts.

    Forge loads them, and parts that do not fit together then end every picture with an error
    (backend/patcher/lora.py).
    """
    bad = [tensor for tensor in found.applied if tensor in damage]
    first = next((tensor for tensor in bad if "fit" in damage[tensor]), None)
    if first is not None:
        found.refused = found.refused or f"{first}: {damage[first]}, at which it stops with an error."
    found.applied = [tensor for tensor in found.applied if tensor not in damage]
    found.modules -= len({_stem(tensor) for tensor in bad})
    found.ignored |= {tensor: damage[tensor] for tensor in bad}


def _stem(tensor: str) -> str:
    """A module's name, without the part."""
    return tensor.removesuffix(next((part for part in _PARTS if tensor.endswith(part)), ""))


class _Names:
    """All names by which the layers of a checkpoint may go."""

    def __init__(self, checkpoint: Iterable[str], architecture: str, resolved: frozenset[str]):
        paths = {
            key[len(_UNET) :].removesuffix(".weight")
            for key in checkpoint
            if key.startswith(_UNET) and key.endswith(".weight")
        }
        self._own = {f"lora_unet_{path.replace('.', '_')}" for path in paths} | {f"diffusion_model.{p}" for p in paths}
        self._diffusers: set[str] = set()
        if architecture in _DIFFUSERS_UNETS:
            self._diffusers = {kohya.unet_diffusers(path).removeprefix("lora_unet_") for path in paths}
            self._diffusers |= {name for path in paths for name in _EXTRA.get(path, ())}
        # Flux's diffusers names are those that the file was resolved by
        self._resolved = resolved if architecture == "flux" else frozenset()
        self._architecture = architecture

    def has(self, stem: str) -> bool:
        if stem in self._own or self._is_text(stem):
            return True
        if stem.startswith(("transformer.", "lora_transformer_", "lycoris_")) and stem in self._resolved:
            return True
        for prefix in ("lora_unet_", "lycoris_"):
            if stem.startswith(prefix) and stem.removeprefix(prefix) in self._diffusers:
                return True
        return "." in stem and self._is_dotted(stem.removeprefix("unet."))

    def _is_dotted(self, path: str) -> bool:
        """diffusers' dotted names: attention only in its oldest spelling, attn1.processor.to_q."""
        if ".to_" in path:
            match = re.fullmatch(r"(.+)\.processor\.to_([qkv]|out)", path)
            if match is None:
                return False
            path = f"{match[1]}.to_{match[2]}" + (".0" if match[2] == "out" else "")
        return path.replace(".", "_") in self._diffusers

    def _is_text(self, stem: str) -> bool:
        if self._architecture in ("sdxl", "sd3") and stem in _PROJECTIONS:
            return True
        if self._architecture in ("sd3", "flux") and _T5.fullmatch(stem):
            return True
        for layers, names in ((_LAYERS, "lora_te1?_|text_encoder\\."), (_LAYERS_OF_TE2, "lora_te2_|text_encoder_2\\.")):
            match = re.fullmatch(rf"(?:{names})text_model[._]encoder[._]layers[._](\d+)[._]{_CLIP_PARTS}", stem)
            if match and int(match[1]) < layers.get(self._architecture, 0):
                return True
        return False
