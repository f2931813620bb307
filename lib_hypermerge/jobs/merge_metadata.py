"""What a merged checkpoint says of itself: all that its source said, and what it was made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .. import __version__
from ..files.source import TensorFile
from ..layouts.module import Model
from .adapter_inputs import LoraInput
from .merge_spec import MergeSpec
from .outputs import RECIPE, STALE, read_recipe


def merged_metadata(spec: MergeSpec, model: Model, loras: list[LoraInput], name: str) -> dict[str, str]:
    """The header's texts. sd_merge_recipe is where AUTOMATIC1111's own merger writes, modelspec.* the Stability
    ModelSpec; no date, so equal inputs give equal files."""
    metadata = {key: text for key, text in model.file.metadata.items() if key not in STALE}
    metadata.setdefault("format", "pt")
    parents = [_parent("checkpoint", model.file), *(_parent("lora", lora.file.file) for lora in loras)]
    # names only: where somebody's files lie is nobody else's business
    parameters = {key: value for key, value in spec.to_json().items() if key not in ("checkpoint", "out", "overwrite")}
    parameters["loras"] = [
        {**asdict(item), "lora": lora.path.name} for item, lora in zip(spec.loras, loras, strict=True)
    ]
    recipe = {"version": __version__, "job": "merge", "parameters": parameters, "parents": parents}
    if "modelspec.title" in metadata:
        metadata["modelspec.title"] = name
    metadata["modelspec.merged_from"] = ", ".join(str(parent["name"]) for parent in parents)
    metadata["sd_merge_recipe"] = json.dumps({"type": "hypermerge", **recipe}, ensure_ascii=False)
    metadata[RECIPE] = json.dumps(recipe, ensure_ascii=False)
    return metadata


def _parent(role: str, file: TensorFile) -> dict[str, Any]:
    """A file that went in: what it is called, what it says of its data, and how it was made if it says so."""
    parent: dict[str, Any] = {"role": role, "name": file.path.name, "bytes": file.size}
    if digest := file.metadata.get("sshs_model_hash"):
        parent["sshs_model_hash"] = digest
    if made := read_recipe(file.metadata):
        parent["made"] = made
    return parent
