"""Textual-inversion embeddings: vectors that stand for a word, in place of a token's.

Formats: A1111 modules/textual_inversion/textual_inversion.py (a pickle's `string_to_param`); a safetensors file with
the one tensor `emb_params`, or with `clip_l`, `clip_g`, `t5xxl` for models of several text encoders; diffusers'
learned_embeds, the one tensor of which is called as the word.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..files.dtypes import FLOATS
from ..files.source import TensorFile, TensorInfo

_PARAMS = "string_to_param."
_ENCODERS = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5xxl": "T5"}
# widths of all text encoders that a word is given to → the models that have these
_MODELS = {
    (768,): ("sd1", "Stable Diffusion 1"), (1024,): ("sd2", "Stable Diffusion 2"),
    (768, 1280): ("sdxl", "Stable Diffusion XL"), (768, 4096): ("flux", "Flux.1"),
    (768, 1280, 4096): ("sd3", "Stable Diffusion 3"),
}  # fmt: skip
_WIDTHS = frozenset(width for widths in _MODELS for width in widths)


@dataclass(frozen=True)
class Embedding:
    """An open file of an embedding. parts: (vectors, width) or (width,), by text encoder or the file's own name.

    architecture: the models that it is for by its widths, None if none has them.
    """

    file: TensorFile
    parts: dict[str, TensorInfo]

    @property
    def widths(self) -> dict[str, int]:
        return {name: info.shape[-1] for name, info in self.parts.items()}

    @property
    def vectors(self) -> dict[str, int]:
        return {name: info.shape[0] if len(info.shape) > 1 else 1 for name, info in self.parts.items()}

    @property
    def architecture(self) -> str | None:
        return _MODELS.get(tuple(sorted(set(self.widths.values()))), (None, ""))[0]

    @property
    def title(self) -> str:
        return _MODELS.get(tuple(sorted(set(self.widths.values()))), (None, "no model that is known here"))[1]


def recognise_embedding(file: TensorFile) -> Embedding | None:
    """The file as an embedding; None if it is none."""
    tensors = file.tensors
    if not tensors or any(i.dtype not in FLOATS or len(i.shape) not in (1, 2) or not i.numel for i in tensors.values()):
        return None
    if tensors.keys() <= _ENCODERS.keys():
        return Embedding(file, {_ENCODERS[name]: info for name, info in tensors.items()})
    if all(name.startswith(_PARAMS) for name in tensors):
        return Embedding(file, {name.removeprefix(_PARAMS): info for name, info in tensors.items()})
    if len(tensors) == 1:
        ((name, info),) = tensors.items()
        if name == "emb_params" or info.shape[-1] in _WIDTHS and "." not in name:
            return Embedding(file, {name: info})
    return None
