"""PEFT's adapter_config.json: where alphas and ranks stand in files that hold factors alone.

A module's own r and alpha come from rank_pattern and alpha_pattern, whose keys are regular expressions for the end of
its path; its scale is alpha / r, or alpha / √r with use_rslora.
Sources: huggingface/peft src/peft/tuners/lora/{config,model,layer}.py, utils/other.py get_pattern_key;
huggingface/diffusers loaders/lora_base.py for `lora_adapter_metadata`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import FormatError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_METADATA = "lora_adapter_metadata"

KINDS = ("LORA", "LOHA", "LOKR")

_STARTS = ("pissa", "olora", "corda")
_NESTED = re.compile(r"\)[*+{]")  # a repeated group could match for ever

_PLAIN_PATH = re.compile(r"\w[\w.]*")


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what the tensors mean."""

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    kind: str = "LORA"
    start: str = ""  # pissa, olora …: factors that begin as a part of the weights, which the base then lacks

    def rank_of(self, path: str) -> int:
        """What the configuration says of the rank of a module, by its path in the model."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float | None:
        """The alpha whose alpha / rank is the module's scale; None for a scale of 1."""
        if self.kind == "LOKR":  # PEFT multiplies its products by nothing, whatever alpha is
            return None
        alpha = _by_pattern(self.alpha_pattern, path, self.alpha)
        return alpha * math.sqrt(self.rank_of(path)) if self.use_rslora else alpha


def _by_pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    if path in patterns:
        return patterns[path]
    for pattern, value in patterns.items():
        if _may_match(pattern, path) and re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return default


def _may_match(pattern: str, path: str) -> bool:
    """Quickly, of patterns that are plain paths: a folder of hundreds of ranks has as many of them."""
    if not _PLAIN_PATH.fullmatch(pattern):
        return True
    before = len(path) - len(pattern)
    return before >= 0 and path[before] == pattern[0] and (before == 0 or path[before - 1] == ".")


def read_config(text: str, source: str) -> PeftConfig:
    """A configuration from its JSON. FormatError names source if it is none that can be used."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise _broken(source, "It is not JSON.") from None
    if not isinstance(values, dict):
        raise _broken(source, "It is not a JSON object.")
    return from_values(values, source)


def from_values(values: dict[str, Any], source: str) -> PeftConfig:
    """A configuration from its fields."""
    kind = str(values.get("peft_type") or "LORA").upper()
    if kind not in KINDS:
        raise FormatError(f"{source} is an adapter of PEFT's type {kind}.", "Hypermerge reads LORA, LOHA and LOKR.")
    r = values.get("r", 8)
    alpha = values.get("lora_alpha", values.get("alpha", 8))
    ranks, alphas = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise _broken(source, "A pattern is no table.")
    for number in (r, *ranks.values()):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise _broken(source, f"It gives {number!r} as a rank.")
    for number in (alpha, *alphas.values()):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise _broken(source, f"It gives {number!r} as an alpha.")
    for pattern in (*ranks, *alphas):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise _broken(source, f"{pattern[:80]!r} is no regular expression.") from None
        if _NESTED.search(pattern):
            raise _broken(source, f"{pattern[:80]!r} is no name of modules.")
    return PeftConfig(
        r, float(alpha), ranks, {k: float(v) for k, v in alphas.items()},
        values.get("use_rslora") is True, values.get("use_dora") is True, kind, _start(values.get("init_lora_weights")),
    )  # fmt: skip


def _start(init: Any) -> str:
    known = isinstance(init, str) and init.lower().startswith(_STARTS)
    return init.lower() if known else ""


def _broken(source: str, why: str) -> FormatError:
    return FormatError(f"{source} is no usable PEFT configuration.", why, "Save the adapter again.")


def from_metadata(metadata: Mapping[str, str], source: str) -> dict[str, PeftConfig]:
    """The configurations that diffusers ≥ 0.34 writes into a file's header, by component as it spells them."""
    if DIFFUSERS_METADATA not in metadata:
        return {}
    try:
        values = json.loads(metadata[DIFFUSERS_METADATA])
        by_component: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            component, _, name = key.partition(".")
            by_component.setdefault(component, {})[name] = value
    except (ValueError, AttributeError, RecursionError):
        raise _broken(f"{DIFFUSERS_METADATA} in {source}", "It is not a JSON object.") from None
    return {component: from_values(v, source) for component, v in by_component.items() if "r" in v}


def config(
    modules: Mapping[str, tuple[int, float]], *, use_dora: bool = False, base_model: str | None = None
) -> dict[str, Any]:
    """adapter_config.json for a LoRA of these modules: path in the model → (rank, alpha).

    r and lora_alpha are the most frequent ones, the others stand as patterns. PEFT takes every name for the end of a
    path too. Where one module's path is the end of another's (Flux' proj_out), its numbers are the common ones, so that
    no pattern is needed that would reach both, and the targets are one regular expression.
    """
    short = [path for path in modules if "." not in path and path.startswith("proj_")]
    counted = [modules[short[0]]] if short else list(modules.values())
    r = Counter(rank for rank, _ in counted).most_common(1)[0][0]
    alpha = Counter(alpha for _, alpha in counted).most_common(1)[0][0]
    targets = sorted(modules)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": r,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {path: own for path, (own, _) in sorted(modules.items()) if own != r},
        "alpha_pattern": {path: _plain(own) for path, (_, own) in sorted(modules.items()) if own != alpha},
        "target_modules": "|".join(map(re.escape, targets)) if short else targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": use_dora,
    }


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
