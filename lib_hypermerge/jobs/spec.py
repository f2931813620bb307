"""One definition of a job's parameters, from which panel, flags, schema and validation all come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from ..errors import SpecError

S = TypeVar("S", bound="Spec")

# kinds of parameters; lora and checkpoint are a model's name, loras a list of WeightedLora, lora files names of LoRAs,
# files names of either, prompt a text that names LoRAs with weights, integers several numbers
CHECKPOINT, LORA, LORAS, LORA_FILES, FILES, PROMPT, OUTPUT, TEXT, INTEGER, INTEGERS, NUMBER, CHOICE, CHOICES, FLAG = (
    "checkpoint", "lora", "loras", "lora files", "files", "prompt", "output", "text", "integer", "integers", "number",
    "choice", "choices", "flag",
)  # fmt: skip
NAME_LISTS = (FILES, LORA_FILES)

PREVIEW = "preview"  # the field of a verb that can be computed and measured without writing


@dataclass(frozen=True)
class WeightedLora:
    """A LoRA as a prompt would use it.

    te_weight: strength in text encoders, None for the same.  blocks: block weights, see block_weights.py.
    """

    lora: str
    weight: float = 1.0
    te_weight: float | None = None
    blocks: str = ""

    @classmethod
    def from_json(cls, value: Any) -> WeightedLora:
        """From a name alone or an object with these fields. SpecError says what is wrong."""
        if isinstance(value, WeightedLora):
            return value
        if isinstance(value, str):
            value = {"lora": value}
        known = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or set(value) - set(known) or not isinstance(value.get("lora"), str):
            raise SpecError("A LoRA must be a name, or an object with lora and, if you like, "
                            "weight, te_weight and blocks.", f"Got {_shown(value)}.")  # fmt: skip
        if not value["lora"]:
            raise SpecError("A LoRA has no name.", hint="Choose one, or leave its row out.")
        numbers = [value.get("weight", 1.0), value.get("te_weight") or 0.0]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not _is_finite(number):
                raise SpecError(f"A weight of {value['lora']!r} is no number.", f"Got {_shown(number)}.")
            if abs(number) > MOST_WEIGHT:
                raise SpecError(f"A weight of {value['lora']!r} is beyond ±{MOST_WEIGHT:g}.", f"Got {number:g}.")
        if not isinstance(value.get("blocks", ""), str):
            raise SpecError(f"The block weights of {value['lora']!r} must be a text.")
        return cls(**value)


MOST_WEIGHT = 100.0


@dataclass(frozen=True)
class Param:
    """What every front end needs to know of a parameter. bounds are inclusive; None means open."""

    kind: str
    label: str
    help: str
    bounds: tuple[float | None, float | None] = (None, None)
    choices: tuple[tuple[str, str], ...] = ()  # (value, what it means)
    advanced: bool = False
    optional: bool = False
    placeholder: str = ""
    target: str = "lora"  # what an output is: lora, checkpoint, or folder
    paths_only: bool = False  # of use only where names are paths: on the command line
    flag: str = ""  # the command line's name for it, where that is not the field's
    fewest: int = 1  # of a list of files: a page says nothing of fewer
    chooses: bool = False  # a text that names models, as a list of them does


def param(kind: str, label: str, help: str, default: Any = dataclasses.MISSING, **more) -> Any:
    """A dataclass field that carries its Param."""
    return dataclasses.field(default=default, metadata={"param": Param(kind, label, help, **more)})


@dataclass(frozen=True)
class Spec:
    """Base of all job specs; subclasses are frozen dataclasses whose fields are made by param()."""

    verb: ClassVar[str] = ""

    @classmethod
    def params(cls) -> dict[str, Param]:
        return {field.name: field.metadata["param"] for field in fields(cls)}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        return {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields(cls)}

    @classmethod
    def from_json(cls: type[S], values: Any) -> S:
        """A checked spec. SpecError on anything unknown, missing, ill-typed or out of bounds."""
        if not isinstance(values, dict):
            raise SpecError("The parameters must be an object.", f"Got {type(values).__name__}.")
        known = cls.params()
        unknown = [name for name in values if name not in known]
        if unknown:
            raise SpecError(f"Unknown parameter {unknown[0]!r}.", hint=f"{cls.verb} knows: {', '.join(known)}.")
        checked = {}
        for field in fields(cls):
            value = values.get(field.name)
            if value is None or value == "" or (known[field.name].optional and value in ([], ())):
                if field.default is dataclasses.MISSING:
                    raise SpecError(f"{field.name!r} is missing.", hint=known[field.name].help)
                if field.name in values and not known[field.name].optional:
                    raise SpecError(f"{field.name!r} is empty.", hint=known[field.name].help)
                continue
            checked[field.name] = _checked(field.name, known[field.name], value)
        spec = cls(**checked)
        spec.check()
        return spec

    def check(self) -> None:
        """Rules over several fields; raises SpecError."""

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """A JSON Schema of the parameters."""
        required = [f.name for f in fields(cls) if f.default is dataclasses.MISSING]
        properties = {f.name: _schema(f.metadata["param"], f.default) for f in fields(cls)}
        return {"type": "object", "title": cls.verb, "properties": properties, "required": required,
                "additionalProperties": False}  # fmt: skip


def has_preview(spec: type[Spec]) -> bool:
    """Whether the job can compute and measure everything without writing; pages offer that as a button."""
    return PREVIEW in spec.params()


def read_text(param: Param, text: str) -> Any:
    """A parameter's value from what a person typed; None if that is nothing. ValueError if it is no number."""
    text = text.strip()
    if not text:
        return None
    if param.kind == INTEGER:
        return int(text)
    if param.kind == NUMBER:
        return float(text)
    if param.kind == INTEGERS:
        return [int(item) for item in text.split(",") if item.strip()]
    return [item.strip() for item in text.split(",")] if param.kind == CHOICES else text


def _checked(name: str, param: Param, value: Any) -> Any:
    def wrong(why: str) -> SpecError:
        return SpecError(f"{name!r} {why}", f"Got {_shown(value)}.", param.help)

    if param.kind == LORAS:
        if not isinstance(value, (list, tuple)) or not value:
            raise wrong("must list one or more LoRAs.")
        return tuple(WeightedLora.from_json(item) for item in value)
    if param.kind in NAME_LISTS:
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v for v in value):
            raise wrong("must list one or more names.")
        return tuple(value)
    if param.kind in (CHECKPOINT, LORA, PROMPT, OUTPUT, TEXT):
        if not isinstance(value, str):
            raise wrong("must be a text.")
        return value
    if param.kind == FLAG:
        if not isinstance(value, bool):
            raise wrong("must be true or false.")
        return value
    if param.kind == CHOICE:
        allowed = [choice for choice, _ in param.choices]
        if value not in allowed:
            raise wrong(f"must be one of {', '.join(allowed)}.")
        return value
    if param.kind == CHOICES:
        allowed = [choice for choice, _ in param.choices]
        if not isinstance(value, (list, tuple)) or not value or any(item not in allowed for item in value):
            raise wrong(f"must list one or more of {', '.join(allowed)}.")
        return tuple(dict.fromkeys(value))
    if param.kind == INTEGERS:
        if not isinstance(value, (list, tuple)) or not value:
            raise wrong("must list one or more whole numbers.")
        return tuple(_number(param, item, wrong) for item in value)
    return _number(param, value, wrong)


def _number(param: Param, value: Any, wrong: Callable[[str], SpecError]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise wrong("must be a number.")
    if param.kind in (INTEGER, INTEGERS):
        if value != int(value):
            raise wrong("must be a whole number.")
        value = int(value)
    low, high = param.bounds
    if (low is not None and value < low) or (high is not None and value > high):
        raise wrong(f"must be {_span(low, high)}.")
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out whole numbers of thousands of digits
        return "a number of very many digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _span(low: float | None, high: float | None) -> str:
    if low is None:
        return f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"


_JSON_TYPES = {INTEGER: "integer", NUMBER: "number", FLAG: "boolean"} | dict.fromkeys(
    (INTEGERS, CHOICES, LORAS, *NAME_LISTS), "array"
)
_LORA_SCHEMA = {
    "oneOf": [
        {"type": "string"},
        {
            "type": "object", "required": ["lora"], "additionalProperties": False,
            "properties": {"lora": {"type": "string"}, "weight": {"type": "number"},
                           "te_weight": {"type": ["number", "null"]}, "blocks": {"type": "string"}},
        },
    ]
}  # fmt: skip


def _schema(param: Param, default: Any) -> dict[str, Any]:
    kind = _JSON_TYPES.get(param.kind, "string")
    out: dict[str, Any] = {"type": [kind, "null"] if param.optional else kind, "title": param.label,
                           "description": param.help}  # fmt: skip
    allowed = [choice for choice, _ in param.choices]
    if param.kind == CHOICES:
        out["items"] = {"type": "string", "enum": allowed}
    elif param.kind == LORAS:
        out["items"] = _LORA_SCHEMA
    elif param.kind in NAME_LISTS:
        out["items"] = {"type": "string"}
    elif param.kind == INTEGERS:
        out["items"] = {"type": "integer"}
    elif allowed:
        out["enum"] = allowed
    for key, bound in zip(("minimum", "maximum"), param.bounds, strict=True):
        if bound is not None:
            holder: dict[str, Any] = out["items"] if param.kind == INTEGERS else out
            holder[key] = bound
    if default is not dataclasses.MISSING:
        out["default"] = list(default) if isinstance(default, tuple) else default
    return out
