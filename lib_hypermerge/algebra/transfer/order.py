"""Which blocks of one network are which of another that has more or fewer of them."""

from __future__ import annotations

from collections.abc import Sequence


def in_order(table: Sequence[Sequence[float]]) -> list[int | None]:
    """For each target block its source block, None for those left over. table[t][s]: how alike the two are.

    Of all pairings that keep the order and use no block twice, and that pair as many as there are of the fewer, the
    one whose likenesses sum up to the most. Of equals, the earlier source blocks.
    """
    targets, sources = len(table), len(table[0]) if table else 0
    if targets > sources:
        back = in_order([list(row) for row in zip(*table, strict=True)]) if sources else []
        found: list[int | None] = [None] * targets
        for s, t in enumerate(back):
            if t is not None:
                found[t] = s
        return found
    # best[t][s]: the most that targets t… get from sources s…
    best = [[float("-inf")] * (sources + 1) for _ in range(targets)] + [[0.0] * (sources + 1)]
    for t in reversed(range(targets)):
        for s in reversed(range(sources)):
            best[t][s] = max(best[t][s + 1], table[t][s] + best[t + 1][s + 1])
    out: list[int | None] = []
    s = 0
    for t in range(targets):
        while table[t][s] + best[t + 1][s + 1] < best[t][s]:
            s += 1
        out.append(s)
        s += 1
    return out


def spread(targets: int, sources: int) -> list[int | None]:
    """The same where nothing tells how alike blocks are: evenly, the first to the first and the last to the last."""
    if targets > sources:
        found: list[int | None] = [None] * targets
        for s, t in enumerate(spread(sources, targets)):
            assert t is not None
            found[t] = s
        return found
    return [round(t * (sources - 1) / (targets - 1)) if targets > 1 else 0 for t in range(targets)]
