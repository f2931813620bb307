"""Pair the blocks of a pruned model with those of the other by the likeness of their layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...algebra.transfer.order import in_order, spread
from ...algebra.transfer.subspace import COMPARED, Directions, directions, similarity
from ...layouts.module import Model, Module
from .layers import read_weight
from .pairing import GUESS, SIMILARITY, Choice, Chosen, comparable, numel
from .plan import TransferPlan

# (function, items) → results in order, computed in parallel
Map = Callable[[Callable[..., Any], list[Any]], Iterator[Any]]


class Matcher:
    """Its choose() is what pairing.lay() asks. told: what was chosen, for the report."""

    def __init__(self, plan: TransferPlan, in_parallel: Map, on_layer: Callable[[int, str], None]):
        self.plan, self._map, self._on_layer = plan, in_parallel, on_layer
        self.told: list[dict[str, Any]] = []

    def choose(self, choice: Choice) -> Chosen:
        """The pairing, in order, whose blocks are the most alike on the whole."""
        names = comparable(choice)
        table = [[0.0] * len(choice.source) for _ in choice.target]
        counts = [[0] * len(choice.source) for _ in choice.target]
        for name, own in zip(names, self._map(lambda name: self._compare(choice, name), names), strict=True):
            self._on_layer(numel(choice, name), choice.where)
            for t, row in enumerate(own):
                for s, value in enumerate(row):
                    if value is not None:
                        table[t][s] += value
                        counts[t][s] += 1
        if any(0 in row for row in counts):
            chosen = Chosen(spread(len(choice.target), len(choice.source)), GUESS)
        else:
            means = [[v / c for v, c in zip(*rows, strict=True)] for rows in zip(table, counts, strict=True)]
            chosen = Chosen(in_order(means), SIMILARITY)
            table = means
        self.told.append(_told(choice, chosen, table))
        return chosen

    def _compare(self, choice: Choice, name: str) -> list[list[float | None]]:
        """Similarities of one layer, of each target block (rows) with each source block."""
        source = [_leading(self.plan.source, block.leaves[name]) for _, block in choice.source]
        target = [_leading(self.plan.target, block.leaves[name]) for _, block in choice.target]
        return [[similarity(s, t) for s in source] for t in target]


def _leading(model: Model, module: Module) -> Directions:
    return directions(read_weight(model, module).flatten(1), COMPARED)


def _told(choice: Choice, chosen: Chosen, means: list[list[float]]) -> dict[str, Any]:
    pairs = [
        {
            "target": number,
            "source": None if place is None else choice.source[place][0],
            "similarity": None if place is None or chosen.how == GUESS else round(row[place], 4),
        }
        for (number, _), place, row in zip(choice.target, chosen.places, means, strict=True)
    ]
    return {"list": choice.where, "how": chosen.how, "source_blocks": len(choice.source), "pairs": pairs}
