"""What a hyper-merge leaves behind to be read again: NAME.hypermerge.json, and the same in the hyper-model's header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import FormatError, SpecError

SUFFIX = ".hypermerge.json"
CONTAINER_SUFFIX = ".hypermerge"  # a safetensors file that no WebUI lists among its models

Multipliers = dict[str, dict[str, float]]  # model → LoRA → λ


@dataclass(frozen=True)
class Recipe:
    """hyper: the hyper-model's file name (the base's, where only LoRAs were written).  loras: stems in order.

    multipliers: of the UNet, and of text encoders too where te_multipliers is None.  models: label → relative error.
    These and residual_share are lacking in the hyper-model's header, which is written before they are measured.
    remainders: label → stem of its remainder file.  container: the container's file name, if there is one, and
    container_models its own relative errors, where models are those of LoRAs.
    """

    hyper: str
    loras: list[str]
    multipliers: Multipliers
    te_multipliers: Multipliers | None = None
    models: dict[str, float] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)
    residual_share: float | None = None
    remainders: dict[str, str] = field(default_factory=dict)
    container: str | None = None
    container_models: dict[str, float] | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    parents: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        own = asdict(self)
        if self.residual_share is None:  # not measured yet
            del own["residual_share"], own["models"], own["container_models"]
        return {"version": __version__, "job": "hyper", **own}

    def text(self) -> str:
        return json.dumps(self.to_json(), ensure_ascii=False, separators=(",", ":"))

    def prompt(self, model: str) -> str:
        """The line that brings a model back."""
        te = None if self.te_multipliers is None else self.te_multipliers[model]
        rest = self.remainders.get(model)
        return snippet(self.multipliers[model], te) + (f"<lora:{rest}:1>" if rest else "")


def snippet(weights: Mapping[str, float], te_weights: Mapping[str, float] | None = None) -> str:
    """`<lora:a:0.7><lora:b:-0.3:0.1>`: text encoders' weight first where the two differ, as A1111 reads it."""
    out = []
    for name, weight in weights.items():
        te = weight if te_weights is None else te_weights[name]
        numbers = [_short(te), _short(weight)]
        if any(number != "0" for number in numbers):
            out.append(f"<lora:{name}:{':'.join(dict.fromkeys(numbers))}>")
    return "".join(out)


def as_said(number: float) -> float:
    """A multiplier as rounded as a prompt says it."""
    return float(_short(number))


def _short(number: float) -> str:
    return f"{round(number, 6):g}" if abs(number) >= 5e-7 else "0"


def parse(text: str, where: str) -> Recipe:
    """A recipe from its JSON. FormatError if it is none."""
    try:
        table = json.loads(text)
        if table["job"] != "hyper":
            raise ValueError
        recipe = Recipe(**{key: table[key] for key in Recipe.__dataclass_fields__ if key in table})
        for weights in (recipe.multipliers, recipe.te_multipliers or {}):
            for row in weights.values():
                if set(row) != set(recipe.loras) or not all(math.isfinite(value) for value in row.values()):
                    raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(
            f"{where} holds no recipe of a hyper-merge.", hint="Choose the hyper-model or its .hypermerge.json."
        ) from None
    return recipe


def read(path: Path) -> Recipe:
    """The recipe in a .json file. SpecError if it cannot be read, FormatError if it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read.", f"{error}.") from None
    return parse(text, path.name)
