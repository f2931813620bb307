"""Which layer of the source is which of the target: by their place, or where blocks are missing, by similarity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...layouts.module import LORA_KINDS, Module
from .tree import Block

PLACE, SIMILARITY, GUESS = "place", "similarity", "order"

_COMPARED = 6  # layers of a block that are compared, the smallest


@dataclass(frozen=True)
class Partner:
    """how: by place, by similarity, or by order alone, where sizes let nothing be compared."""

    source: Module
    target: Module
    how: str


@dataclass(frozen=True)
class Choice:
    """Two lists of blocks of different length, in their order."""

    where: str
    source: Sequence[tuple[int, Block]]
    target: Sequence[tuple[int, Block]]


@dataclass(frozen=True)
class Chosen:
    """For each target block the place of its source block in the list, None for none."""

    places: Sequence[int | None]
    how: str


def lay(
    source: Block, target: Block, choose: Callable[[Choice], Chosen], where: str, how: str = PLACE
) -> Iterator[Partner]:
    """Every layer of the target with the source's layer that it corresponds to, where there is one.

    Lists of as many blocks correspond one to one. choose: asked about all others, from outside inwards.
    """
    for name, module in target.leaves.items():
        if name in source.leaves:
            yield Partner(source.leaves[name], module, how)
    for name, blocks in target.lists.items():
        choice = Choice(f"{where}.{name}", sorted(source.lists.get(name, {}).items()), sorted(blocks.items()))
        if len(choice.source) == len(choice.target) or not choice.source:
            chosen = Chosen(range(len(choice.source)), how)
        else:
            chosen = choose(choice)
            chosen = Chosen(chosen.places, GUESS if GUESS in (how, chosen.how) else chosen.how)
        for (number, block), place in zip(choice.target, chosen.places, strict=False):
            if place is not None:
                yield from lay(choice.source[place][1], block, choose, f"{where}.{name}.{number}", chosen.how)


def numel(choice: Choice, name: str) -> int:
    """Numbers in a layer of all blocks."""
    return sum(math.prod(block.leaves[name].matrix_shape) for _, block in (*choice.source, *choice.target))


def comparable(choice: Choice) -> list[str]:
    """The layers by which blocks can be compared: in all of them, of one size on one side at least. Maybe none."""
    blocks = [block for _, block in (*choice.source, *choice.target)]
    sizes: dict[str, int] = {}
    for name, module in choice.target[0][1].leaves.items():
        if module.kind not in LORA_KINDS or not all(name in block.leaves for block in blocks):
            continue
        shapes = [block.leaves[name].matrix_shape for block in blocks]
        if any(len({shape[side] for shape in shapes}) == 1 and shapes[0][side] > 1 for side in (0, 1)):
            sizes[name] = sum(n * k for n, k in shapes)
    return sorted(sizes, key=lambda name: (sizes[name], name))[:_COMPARED]
