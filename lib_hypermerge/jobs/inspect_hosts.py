"""What the WebUIs will make of an adapter file: which tensors take effect, under what group and name it is listed;
and whether they can load a checkpoint.

Source: AUTOMATIC1111 modules/sd_models.py, sd_models_config.py and extensions-builtin/Lora; Forge backend/loader.py
and extensions-builtin/sd_forge_lora.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..layouts.module import Model
from . import inspect_a1111, inspect_forge
from .inspect_a1111 import Reach, Shapes
from .inspect_common import shown

CODES = "whole numbers of a quantisation, taken for factors"
DISAGREE = "parts that do not fit together"
_LISTED = (".safetensors", ".pt", ".ckpt")
_LISTED_CHECKPOINTS = (".safetensors", ".ckpt")
_UNET = "model.diffusion_model."
_FORGE_FLUX = ("flux-1-dev/lora", "https://github.com/black-forest-labs/flux")


def host_facts(
    path: Path, metadata: Mapping[str, str], tensors: Shapes, checkpoint: Shapes, architecture: str,
    resolved: Collection[str], misfits: Collection[str], damage: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    """JSON-ready, by host. tensors, checkpoint: shapes by name, of the file and of a model of its architecture.

    resolved: modules of the file, by their own names, that have a layer.  misfits: tensors of modules that have not
    the size of their layer.  damage: tensors of damaged modules → CODES or DISAGREE.
    """
    a1111 = inspect_a1111.reach(tensors, checkpoint, architecture, misfits, damage)
    forge = inspect_forge.reach(tensors, checkpoint, architecture, resolved)
    inspect_forge.stumble(forge, damage)
    is_listed = path.is_file() and path.suffix.lower() in _LISTED
    return {
        "a1111": _facts(inspect_a1111.TITLE, a1111, a1111_group(metadata), len(tensors), is_listed),
        "forge": _facts(inspect_forge.TITLE, forge, forge_group(metadata), len(tensors), is_listed),
    }


def _facts(title: str, reach: Reach, group: str, tensors: int, is_listed: bool) -> dict[str, Any]:
    if not is_listed:
        verdict, why = "not listed", f"It lists {', '.join(_LISTED)} files in its LoRA folder."
    elif reach.refused:
        verdict, why = "refused", reach.refused
    elif not reach.applied:
        unnamed = set(reach.ignored.values()) <= inspect_a1111.UNNAMED
        verdict, why = "nothing", "No tensor has a name that it knows." if unnamed else _reasons(reach)
    else:
        verdict, why = "all" if len(reach.applied) == tensors else "part", _reasons(reach)
    loads = verdict in ("all", "part")
    return {
        "title": title,
        "verdict": verdict,
        "why": why,
        "modules": reach.modules if loads else 0,
        "tensors": len(reach.applied) if loads else 0,
        "ignored": len(reach.ignored) if loads else tensors,
        "ignored_tensors": shown(sorted(reach.ignored)),
        "group": group,
    }


def _reasons(reach: Reach) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in Counter(reach.ignored.values()).most_common(5))


def a1111_group(metadata: Mapping[str, str]) -> str:
    """Its card is hidden while a checkpoint of another group is loaded (network.py detect_version)."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"


def forge_group(metadata: Mapping[str, str]) -> str:
    """The same of Forge, which hides nothing; it looks at the ModelSpec first."""
    architecture = metadata.get("modelspec.architecture", "")
    if architecture in _FORGE_FLUX or metadata.get("modelspec.implementation") in _FORGE_FLUX:
        return "Flux"
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "SDXL"
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "Unknown"


def alias(path: Path, metadata: Mapping[str, str]) -> str:
    """The name in a prompt: what the file calls itself, else its own name."""
    return metadata.get("ss_output_name") or (path.stem if path.is_file() else path.name)


def checkpoint_hosts(model: Model, path: Path, markers: Collection[str]) -> dict[str, Any]:
    """Whether they list and load a checkpoint, and what to see to; JSON-ready, by host."""
    is_listed = path.is_file() and path.suffix.lower() in _LISTED_CHECKPOINTS
    unlisted = "" if is_listed else f"It lists {' and '.join(_LISTED_CHECKPOINTS)} files."
    refusal = ""
    if model.architecture.id not in inspect_a1111.KNOWN:
        refusal = f"It does not know {model.architecture.title}."
    elif model.architecture.id == "sd3" and model.variant.startswith("3.5"):
        refusal = f"It builds every SD3 as medium, and does not know {model.title}."
    elif not any(name.startswith(_UNET) for name in model.file.tensors):
        refusal = f"It looks for the network under {_UNET} alone."
    missing = [table.title for table in model.architecture.components if table.id not in model.components]
    vae = [] if model.vae else ["VAE"]
    own, todo = _files_for([*missing, *vae]), _files_for([*missing, *vae])
    if missing and model.architecture.id == "sd3":
        own = [f"it fetches by itself: {', '.join(missing)} (T5 if its settings ask for it)", *_files_for(vae)]
    deaf = [f"it takes no notice of {' and '.join(markers)}: set that yourself"] if markers else []
    hosts = {
        "a1111": (inspect_a1111.TITLE, refusal, [*own, *deaf]),
        "forge": (inspect_forge.TITLE, "", todo),
    }
    return {
        host: {
            "title": title,
            "verdict": "not listed" if unlisted else "refused" if why else "loads",
            "why": unlisted or why,
            "notes": [] if unlisted or why else notes,
        }
        for host, (title, why, notes) in hosts.items()
    }


def _files_for(parts: list[str]) -> list[str]:
    return [f"choose a file for: {', '.join(parts)}"] if parts else []
