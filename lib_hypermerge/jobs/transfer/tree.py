"""A component as nested lists of blocks, so that networks with more or fewer of them can be laid beside each other.

Blocks of a UNet are listed by their side and resolution: input_blocks.4 and .5 are the list "input.1" of SD1.5. That
holds for pruned models too, however they number what is left: a resolution ends where the layer is that halves it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from ...layouts.module import Module

_UNET = re.compile(r"(input|output)_blocks\.(\d+)\.(.+)")
_HALVES, _DOUBLES = "0.op", (".conv", "conv")
_DOWN = re.compile(r"input_blocks\.(\d+)\.0\.op")
_UP = re.compile(r"output_blocks\.(\d+)\.[12]\.conv")
_INNER = re.compile(r"(.*?transformer_blocks)\.(\d+)\.(.+)")
# of text encoders and transformers: encoder.layers, transformer.resblocks, encoder.block, double_blocks …
_LISTED = re.compile(r"(.*?(?:layers|blocks|\bblock))\.(\d+)\.(.+)")


@dataclass
class Block:
    """leaves: its layers, by what follows its own path.  lists: blocks within it, by list and number."""

    leaves: dict[str, Module] = field(default_factory=dict)
    lists: dict[str, dict[int, Block]] = field(default_factory=dict)


def tree(modules: Mapping[str, Module]) -> Block:
    """A component's modules by path, as one block that holds the others."""
    root = Block()
    for path, module in modules.items():
        steps, leaf = place(path, modules)
        block = root
        for name, number in steps:
            block = block.lists.setdefault(name, {}).setdefault(number, Block())
        block.leaves[leaf] = module
    return root


def place(path: str, paths: Collection[str]) -> tuple[list[tuple[str, int]], str]:
    """(list, number) of each block that a layer lies in, from outside, and what the innermost calls it.

    paths: of all layers of the component.
    """
    if path in ("input_blocks.0.0",) or path.startswith("middle_block."):
        match = _INNER.fullmatch(path)
        return ([(match[1], int(match[2]))], match[3]) if match else ([], path)
    if match := _UNET.fullmatch(path):
        side, number, leaf = match[1], int(match[2]), match[3]
        at = f"{side}.{_resolution(side, number, paths)}"
        if _DOWN.fullmatch(path) or _UP.fullmatch(path):  # belongs to its resolution, wherever it stands
            return [], f"{at}.{leaf.rpartition('.')[2]}"
        inner = _INNER.fullmatch(leaf)
        if inner:
            return [(at, number), (inner[1], int(inner[2]))], inner[3]
        return [(at, number)], leaf
    match = _LISTED.fullmatch(path)
    return ([(match[1], int(match[2]))], match[3]) if match else ([], path)


def _resolution(side: str, number: int, paths: Collection[str]) -> int:
    """How often the image was halved where a block stands: 0 outside."""
    if side == "input":
        return sum(int(match[1]) < number for match in map(_DOWN.fullmatch, paths) if match)
    return sum(int(match[1]) >= number for match in map(_UP.fullmatch, paths) if match)
