"""A verb's flags on the command line, made from its spec, and the parameters that they amount to."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .errors import SpecError
from .jobs.spec import CHOICE, CHOICES, FLAG, INTEGER, INTEGERS, LORAS, NAME_LISTS, NUMBER, Param, Spec, read_text

_BLOCKS = "blocks"
_BLOCKS_HELP = (
    "Block weights of the LoRAs: a preset, 12, 17, 20, 26 or (Flux) 61 numbers, or ranges such as IN00-IN05=0.5,OUT=1. "
    "Once for all LoRAs, or once for each, in their order."
)


def add_flags(parser: argparse.ArgumentParser, spec: type[Spec]) -> None:
    """Give a parser all of a spec's parameters."""
    defaults, required = spec.defaults(), spec.schema()["required"]
    for name, param in spec.params().items():
        _add(parser, name, param, name in required, defaults[name])
    if _has_blocks(spec):
        parser.add_argument(
            f"--{_BLOCKS}", metavar="TEXT", action="append", default=argparse.SUPPRESS, help=_BLOCKS_HELP
        )


def values_of(spec: type[Spec], values: dict[str, Any]) -> dict[str, Any]:
    """What was parsed, as the spec's JSON. SpecError if block weights and LoRAs do not go together."""
    if not _has_blocks(spec):
        return values
    values = dict(values)
    blocks = values.pop(_BLOCKS, [])
    for name, param in spec.params().items():
        loras = values.get(name)
        if param.kind == LORAS and loras and blocks:
            if len(blocks) not in (1, len(loras)):
                raise SpecError(
                    f"--{_BLOCKS} was given {len(blocks)} times for {len(loras)} LoRAs.",
                    hint="Give it once for all LoRAs, or once for each.",
                )
            texts = blocks * len(loras) if len(blocks) == 1 else blocks
            values[name] = [{**lora, "blocks": text} for lora, text in zip(loras, texts, strict=True)]
    return values


def flag_of(name: str, param: Param) -> str:
    return "--" + (param.flag or name).replace("_", "-")


def is_positional(param: Param, required: bool) -> bool:
    """What a verb is about needs no flag, unless it is given one."""
    return param.kind in NAME_LISTS and required and not param.flag


def _has_blocks(spec: type[Spec]) -> bool:
    params = spec.params()
    return _BLOCKS not in params and any(param.kind == LORAS for param in params.values())


def _add(parser: argparse.ArgumentParser, name: str, param: Param, required: bool, default: Any) -> None:
    text = f"{param.label}. {param.help}".replace("%", "%%")
    if default not in (None, "", ()) and not required and (param.kind != FLAG or default):
        text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    flag = flag_of(name, param)
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text, "required": required}
    if param.kind == FLAG:
        if default:  # --no-… turns it off
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag, action="store_const", const=True, **options)
    elif is_positional(param, required):
        parser.add_argument(name, metavar="FILE", nargs="+", help=text)
    elif param.kind in NAME_LISTS:  # several behind one flag, or the flag again for each
        parser.add_argument(flag, metavar="FILE", nargs="+", action="extend", **options)
    elif param.kind == INTEGERS:  # by commas, or the flag again for each
        parser.add_argument(flag, type=_reader(param), metavar="N", nargs=1, action=_ExtendNumbers, **options)
    elif param.kind == LORAS:
        parser.add_argument(flag, metavar=("LORA", "WEIGHT [TE_WEIGHT]"), nargs="+", action=_AppendLora, **options)
    else:
        parser.add_argument(flag, type=_reader(param), metavar=_metavar(flag, param), **options)


def _metavar(flag: str, param: Param) -> str:
    if param.kind in (CHOICE, CHOICES):
        separator = "|" if param.kind == CHOICE else ","
        return separator.join(value for value, _ in param.choices)
    return {INTEGER: "N", NUMBER: "X"}.get(param.kind, flag[2:].replace("-", "_").upper())


def _reader(param: Param) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return read_text(param, text)

    names = {INTEGER: "whole number", INTEGERS: "whole number", NUMBER: "number"}
    read.__name__ = names.get(param.kind, "text")  # argparse's message shows it
    return read


class _ExtendNumbers(argparse.Action):
    """--rank 64 --rank 32, or --rank 64,32."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        held = list(getattr(namespace, self.dest, None) or ())
        setattr(namespace, self.dest, held + [number for numbers in values for number in numbers or ()])


class _AppendLora(argparse.Action):
    """--lora NAME [WEIGHT [TE_WEIGHT]], again for each LoRA."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        name, *numbers = values
        if len(numbers) > 2:
            raise argparse.ArgumentError(self, "takes a LoRA, its weight, and its weight in text encoders; "
                                               f"{len(values)} values were given")  # fmt: skip
        lora: dict[str, Any] = {"lora": name}
        for key, text in zip(("weight", "te_weight"), numbers, strict=False):
            try:
                lora[key] = float(text)
            except ValueError:
                raise argparse.ArgumentError(self, f"invalid number value: {text!r}") from None
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), lora])
