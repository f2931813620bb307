"""Files of tensors that are neither checkpoint nor adapter: embeddings, VAEs alone, and what is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HypermergeError
from ..files.opening import CHECKPOINT_SUFFIXES, open_tensors
from ..files.source import TensorFile, TensorInfo
from ..layouts.embedding import Embedding, recognise_embedding
from ..layouts.vae import Vae, recognise_vae
from .inspect_checkpoint import sums
from .inspect_common import shown

_LATENTS = {4: "Stable Diffusion 1, 2 and XL", 16: "Stable Diffusion 3 and Flux.1"}


@dataclass(frozen=True)
class Tensors:
    """An open file of tensors that is no model known here. why: what is the matter, or what it looks like."""

    file: TensorFile
    why: str


Other = Embedding | Vae | Tensors


def open_other(path: Path, why: HypermergeError) -> Other | None:
    """What else a file of tensors is, open; None if it holds none. why: what was found wrong with it as a model.

    A folder is taken for the one file of weights in it. Raises SpecError or FormatError.
    """
    if path.is_dir():
        inside = [p for p in sorted(path.iterdir()) if p.suffix in CHECKPOINT_SUFFIXES and p.is_file()]
        if len(inside) != 1:
            return None
        path = inside[0]
    file = open_tensors(path)
    if not file.tensors:
        file.close()
        return None
    unknown = Tensors(file, " ".join(filter(None, (why.what, why.why))))
    return recognise_embedding(file) or recognise_vae(file) or unknown


def other_facts(content: Other) -> dict[str, Any]:
    """JSON-ready, from the header alone."""
    facts = {**_sums(content.file.tensors), "names": shown(list(content.file.tensors))}
    if isinstance(content, Embedding):
        return {
            "kind": "embedding", "architecture": content.architecture, "title": content.title, **facts,
            "vectors": content.vectors, "widths": content.widths,
        }  # fmt: skip
    if isinstance(content, Vae):
        channels = content.latent_channels
        return {
            "kind": "VAE", "title": "VAE", **facts, **_sums(content.tensors), "layout": content.layout,
            "latent_channels": channels, "latents_of": _LATENTS.get(channels) if channels else None,
            "others": len(content.file.tensors) - len(content.tensors),
        }  # fmt: skip
    return {"kind": "tensors", "title": "no model that is known here", **facts, "why": content.why}


def _sums(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Of the tensors; beside it, the bytes of a file include its header."""
    found = sums(tensors.values())
    return found | {"bytes_of_tensors": found.pop("bytes")}


def counted_as(content: Other) -> dict[str, str]:
    """Tensor → what its numbers are counted as."""
    if isinstance(content, Embedding):
        return {info.name: name for name, info in content.parts.items()}
    if isinstance(content, Vae):
        return dict.fromkeys(content.tensors, "VAE")
    return dict.fromkeys(content.file.tensors, "all tensors")
