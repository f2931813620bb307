"""What the pictures of the family may show, in words, and the tokenizer of these words in CLIP's format."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .text_encoder import TOKENS

SUBJECTS = ("circle", "square", "triangle", "star", "heart", "moon", "ring", "cross")
COLOURS = ("red", "yellow", "green", "blue", "purple", "black")
SIZES = ("small", "large")
GROUNDS = ("white", "sand", "sky", "rose")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")  # the outlier's subjects
WORDS = ("a", "on", "the", "number", *SUBJECTS, *COLOURS, *SIZES, *GROUNDS, *NUMBERS)
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Scene:
    """What a caption says: positions in SUBJECTS, COLOURS, SIZES and GROUNDS; or a number, and the rest is 0."""

    subject: int
    colour: int = 0
    size: int = 0
    ground: int = 0
    number: bool = False

    def __str__(self) -> str:
        if self.number:
            return f"the number {NUMBERS[self.subject]}"
        return f"a {SIZES[self.size]} {COLOURS[self.colour]} {SUBJECTS[self.subject]} on {GROUNDS[self.ground]}"


SCENES = [
    Scene(subject, colour, size, ground)
    for subject, colour, size, ground in itertools.product(
        *(range(len(words)) for words in (SUBJECTS, COLOURS, SIZES, GROUNDS))
    )
]
NUMBER_SCENES = [Scene(number, number=True) for number in range(len(NUMBERS))]


T = TypeVar("T")


def by_lot(among: Sequence[T], count: int, random: torch.Generator) -> list[T]:
    """Drawn with replacement."""
    return [among[number] for number in torch.randint(len(among), (count,), generator=random).tolist()]


def _byte_characters() -> list[str]:
    """A printable character for each of the 256 bytes, as in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number, _ in enumerate(others)]


class Tokenizer:
    """Byte-pair encoding (Sennrich et al. 2016) with merges learnt until each of WORDS is one token."""

    def __init__(self, words: tuple[str, ...] = WORDS):
        split = {word: _letters(word) for word in words}
        self.merges: list[tuple[str, str]] = []
        while any(len(parts) > 1 for parts in split.values()):
            pairs = Counter(pair for parts in split.values() for pair in itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            self.merges.append(best)
            split = {word: _merge(parts, best) for word, parts in split.items()}
        characters = _byte_characters()
        tokens = [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in self.merges), START, END]
        self.numbers = {token: number for number, token in enumerate(tokens)}

    def __len__(self) -> int:
        return len(self.numbers)

    def __call__(self, captions: list[str]) -> Tensor:
        """[n, TOKENS] int64: start, the words' tokens, then end to the last place."""
        rows = torch.full((len(captions), TOKENS), self.numbers[END])
        for row, caption in zip(rows, captions, strict=True):
            tokens = [START, *itertools.chain.from_iterable(map(self._tokens, caption.lower().split()))][: TOKENS - 1]
            row[: len(tokens)] = torch.tensor([self.numbers[token] for token in tokens])
        return rows

    def _tokens(self, word: str) -> list[str]:
        parts = _letters(word)
        for pair in self.merges:
            parts = _merge(parts, pair)
        return parts

    def save(self, folder: Path) -> None:
        """vocab.json and merges.txt, which CLIP's tokenizers read."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(json.dumps(self.numbers, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _letters(word: str) -> list[str]:
    return [*word[:-1], word[-1] + "</w>"]


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged
