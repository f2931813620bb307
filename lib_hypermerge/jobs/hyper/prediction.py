"""What a model was trained to predict, noise (epsilon) or velocity (v), as far as files tell.

Weights do not show it. Sources of knowledge: the tensor `v_pred`, an empty mark that ComfyUI and Forge read; the
Stability ModelSpec's `modelspec.prediction_type`; AUTOMATIC1111's configuration beside the file, NAME.yaml; a
pipeline's scheduler_config.json; of LoRAs kohya's `ss_base_model_version`, which ends in _v for velocity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from ...layouts.module import Model

V, EPSILON = "v", "epsilon"
MARK = "v_pred"
UNTOLD = frozenset(("sd2",))  # architectures of which both kinds go without a mark
USUALLY_EPSILON = frozenset(("sd1", "sdxl"))  # where hosts take a file without a mark for epsilon
_PARAMETERIZATION = re.compile(r"""^\s*parameterization:\s*["']?(\w+)""", re.MULTILINE)
_MOST = 1 << 20  # bytes of a configuration


def of_model(model: Model) -> str:
    """V, EPSILON, or "" where nothing says it or it is neither."""
    if model.architecture.id not in UNTOLD | USUALLY_EPSILON:
        return ""
    if MARK in model.file.tensors:
        return V
    path = model.file.path
    told = _spoken(model.file.metadata.get("modelspec.prediction_type", ""))
    return told or (_of_pipeline(path) if path.is_dir() else _of_configuration(path.with_suffix(".yaml")))


def of_lora(metadata: Mapping[str, str]) -> str:
    """What the model that a LoRA was trained on predicts by its metadata, "" where they do not say."""
    told = _spoken(metadata.get("modelspec.prediction_type", ""))
    return told or (V if re.fullmatch(r"sd_v[12]_v", metadata.get("ss_base_model_version", "")) else "")


def _spoken(text: str) -> str:
    return {"v": V, "v_prediction": V, "epsilon": EPSILON, "eps": EPSILON}.get(text.strip().lower(), "")


def _of_pipeline(folder: Path) -> str:
    try:
        config = json.loads(_read(folder / "scheduler" / "scheduler_config.json"))
    except (ValueError, RecursionError):
        return ""
    return _spoken(str(config.get("prediction_type", ""))) if isinstance(config, dict) else ""


def _of_configuration(path: Path) -> str:
    """CompVis' and Stability's configurations name the parameterization where it is not epsilon."""
    text = _read(path)
    if "linear_start" not in text and "parameterization" not in text:
        return ""
    found = _PARAMETERIZATION.search(text)
    return EPSILON if found is None else _spoken(found[1])


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(_MOST)
    except (OSError, UnicodeDecodeError):
        return ""
