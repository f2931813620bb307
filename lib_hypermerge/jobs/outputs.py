"""What is asked of every output made from other files, and what it says of where it came from."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import SpecError
from ..files.source import TensorFile
from .host import Host
from .spec import Spec

RECIPE = "hypermerge"
_FEW = 8
# of another file, once a number or the order has changed
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")


def refuse_inputs(output: Path, inputs: list[Path], host: Host) -> None:
    """SpecError if the output is one of the inputs, or the checkpoint that a WebUI has in memory."""
    if any(is_same(output, path) for path in inputs):
        raise SpecError(f"{output.name} would replace the file that it is made from.", hint="Choose another name.")
    loaded = host.loaded_checkpoint()
    if loaded is not None and is_same(output, loaded):
        raise SpecError(
            f"{output.name} is the checkpoint that is loaded at the moment.",
            "The WebUI would go on with the old one in memory, and Windows cannot replace it.",
            "Choose another name, or load another checkpoint first.",
        )


def is_same(a: Path, b: Path) -> bool:
    """Whether both are one file or folder; False if one is not there."""
    try:
        return a.samefile(b)
    except OSError:
        return False


def left_behind(file: TensorFile) -> list[str]:
    """The warning of what a pickle holds besides its state dict, which is never kept; none without."""
    names = file.besides
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return [f"Left out, as only the state dict is kept: {', '.join(names[:_FEW])}{more}."] if names else []


def recipe(spec: Spec, parents: dict[str, TensorFile], without: Collection[str] = (), **more: Any) -> str:
    """The text under `hypermerge`: job, parameters, parents with the recipes that they carry themselves.

    without: parameters that are left out, as what the parents are called is, and where the result goes.
    """
    names = {*parents, "out", "overwrite", *without}
    parameters = {key: value for key, value in spec.to_json().items() if key not in names and value is not None}
    table = {
        "version": __version__, "job": spec.verb, "parameters": parameters,
        "parents": {role: parent(file) for role, file in parents.items()}, **more,
    }  # fmt: skip
    return json.dumps(table, ensure_ascii=False, separators=(",", ":"))


def read_recipe(metadata: dict[str, str]) -> dict[str, Any]:
    """The recipe in a file's metadata; empty where there is none that can be read."""
    try:
        table = json.loads(metadata.get(RECIPE, "{}"))
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


def parent(file: TensorFile) -> dict[str, Any]:
    """A file that went in: what it is called, what it says of its data, and how it was made if it says so."""
    own = {"name": file.path.name, "bytes": file.size}
    if digest := file.metadata.get("sshs_model_hash"):
        own["sshs_model_hash"] = digest
    earlier = {key: value for key, value in read_recipe(file.metadata).items() if key != "restore"}
    return own | ({"recipe": earlier} if earlier else {})
