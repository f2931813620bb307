"""What a checkpoint's header tells: its kind, its components and their formats, and what else lies in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..files.source import TensorInfo
from ..layouts.module import Model
from .inspect_common import shown

# zero-dimensional keys by which trainers tell a host how to sample
MARKERS = {
    "v_pred": "v-prediction", "ztsnr": "zero terminal SNR", "edm_vpred.sigma_max": "EDM v-prediction",
    "edm_mean": "EDM",
}  # fmt: skip
_SCHEDULE = re.compile(
    r"(model_ema\.)?(betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|sqrt_recip(m1)?_alphas_cumprod|"
    r"log_one_minus_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|logvar|lvlb_weights|"
    r"denoiser\.(sigmas|log_sigmas))"
)


def checkpoint_facts(model: Model) -> dict[str, Any]:
    """JSON-ready, from the header alone."""
    names = model.file.tensors
    claimed: set[str] = set()
    components = {}
    for table in model.architecture.components:
        modules = model.components.get(table.id)
        infos = {
            info.name: names.get(info.name, info)  # a fused weight is seen as slices
            for module in (modules or {}).values()
            for info in (module.weight, module.bias)
            if info is not None
        }
        claimed |= infos.keys()
        components[table.id] = {
            "title": table.title, "present": modules is not None, "modules": len(modules or {}), **sums(infos.values())
        }  # fmt: skip
    vae = {info.name for info in model.vae.values()}
    components["vae"] = {"title": "VAE", "present": bool(vae), "modules": None, **sums(names[name] for name in vae)}
    rest = [name for name in names if name not in claimed and name not in vae]
    return {
        "kind": "checkpoint",
        "architecture": model.architecture.id,
        "title": model.title,
        "variant": model.variant,
        "prediction": _prediction(model),
        "markers": [marker for marker in MARKERS if marker in names],
        "components": components,
        "others": _others(rest),
    }


def sums(infos: Iterable[TensorInfo]) -> dict[str, Any]:
    """How many tensors, numbers and bytes, in which formats."""
    infos = list(infos)
    return {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dtype_counts(infos),
    }


def dtype_counts(infos: Iterable[TensorInfo]) -> dict[str, int]:
    """Number format → how many tensors have it, the commonest first."""
    return dict(Counter(info.dtype for info in infos).most_common())


def _prediction(model: Model) -> str | None:
    """What a network was trained to predict, where the file says it; no weight tells."""
    found = [MARKERS[marker] for marker in MARKERS if marker in model.file.tensors]
    return ", ".join(found) or model.file.metadata.get("modelspec.prediction_type")


def _others(names: list[str]) -> dict[str, dict[str, Any]]:
    """Tensors of no component, by what they are."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_kind(name), []).append(name)
    return {kind: {"tensors": len(members), "names": shown(sorted(members))} for kind, members in groups.items()}


def _kind(name: str) -> str:
    if name in MARKERS:
        return "markers"
    if _SCHEDULE.fullmatch(name):
        return "schedule buffers"
    if name.startswith("model_ema."):
        return "EMA copies"
    if name.startswith("control_model."):
        return "ControlNet"
    return "position ids" if name.endswith("position_ids") else "other tensors"
