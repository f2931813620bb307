"""Flags of every kind of parameter, on a spec made for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from lib_hypermerge.errors import SpecError
from lib_hypermerge.flags import add_flags, values_of
from lib_hypermerge.jobs.spec import CHECKPOINT, FILES, FLAG, LORA, LORAS, TEXT, Spec, WeightedLora, param


@dataclass(frozen=True)
class Mixed(Spec):
    verb: ClassVar[str] = "mixed"

    files: tuple[str, ...] = param(FILES, "Files", "What to look at.")
    checkpoint: str = param(CHECKPOINT, "Checkpoint", "100 % of it.")
    loras: tuple[WeightedLora, ...] = param(LORAS, "LoRAs", "What to merge.", flag="lora")
    host_file: str = param(LORA, "Other", "One LoRA.", "", optional=True, flag="onto")
    note: str = param(TEXT, "Note", "Any words.", "none")
    against: tuple[str, ...] = param(FILES, "Against", "More files.", (), optional=True)
    models: tuple[str, ...] = param(FILES, "Models", "Named by a flag, as there are other files.", (), flag="model")
    deep: bool = param(FLAG, "Deep", "More of it.", False)
    by_layer: bool = param(FLAG, "By layer", "On unless it is turned off.", True)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SpecError(message)


def parse(*arguments: str) -> Mixed:
    parser = Parser(allow_abbrev=False)
    add_flags(parser, Mixed)
    values: dict[str, Any] = vars(parser.parse_args(["a.pt", "b", "--checkpoint", "c", *arguments]))
    return Mixed.from_json(values_of(Mixed, values))


def test_every_kind() -> None:
    spec = parse("--lora", "x", "--lora", "y", "-0.5", "--lora", "z", "1e-1", "2", "--onto", "o", "--note", "two words",
                 "--against", "d", "e", "--deep", "--model", "k", "l", "--model", "m")  # fmt: skip
    assert spec.files == ("a.pt", "b")
    assert spec.loras == (WeightedLora("x"), WeightedLora("y", -0.5), WeightedLora("z", 0.1, 2.0))
    assert (spec.host_file, spec.note, spec.against, spec.deep) == ("o", "two words", ("d", "e"), True)
    assert spec.models == ("k", "l", "m")
    assert parse("--lora", "x").note == "none"


def test_what_is_on_by_itself_can_be_turned_off() -> None:
    assert parse("--lora", "x").by_layer
    assert parse("--lora", "x", "--by-layer").by_layer
    assert not parse("--lora", "x", "--no-by-layer").by_layer
    parser = Parser()
    add_flags(parser, Mixed)
    assert "On unless it is turned off. (default: True)" in " ".join(parser.format_help().split())
    with pytest.raises(SpecError, match="--no-deep"):
        parse("--lora", "x", "--no-deep")


def test_block_weights_are_for_all_loras_or_for_each() -> None:
    both = ("--lora", "x", "--lora", "y", "2")
    assert parse(*both, "--blocks", "OUT=1").loras == (
        WeightedLora("x", blocks="OUT=1"), WeightedLora("y", 2.0, blocks="OUT=1"),
    )  # fmt: skip
    assert parse("--blocks", "A", *both, "--blocks=-1,0").loras == (
        WeightedLora("x", blocks="A"), WeightedLora("y", 2.0, blocks="-1,0"),
    )  # fmt: skip
    with pytest.raises(SpecError, match="--blocks was given 3 times for 2 LoRAs"):
        parse(*both, *(["--blocks", "A"] * 3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--lora", "x", "much"], "invalid number value: 'much'"), (["--lora", "x", "1", "2", "3"], "4 values"),
     (["--lora"], "expected at least one argument"), ([], "required: --lora"), (["--lora", "x", "1000"], "beyond"),
     (["--lora", "x", "nan"], "no number"), (["--lora", "x", "--loras", "y"], "unrecognized arguments: --loras")],
)  # fmt: skip
def test_what_is_refused(arguments: list[str], says: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(*arguments)
    assert says in str(error.value)


def test_help_shows_the_flags() -> None:
    parser = Parser(prog="mixed")
    add_flags(parser, Mixed)
    text = parser.format_help()
    assert "FILE [FILE ...]" in text
    assert "--lora LORA [WEIGHT [TE_WEIGHT] ...]" in text
    assert "100 % of it" in text
