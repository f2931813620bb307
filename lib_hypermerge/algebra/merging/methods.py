"""The table of methods by which several changes of one layer become one; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

FACTORED, DENSE = "factored", "dense"
DENSITY, SEED, ENERGY = "density", "seed", "energy"


@dataclass(frozen=True)
class Method:
    """What a person, a plan and a page need to know of a method.

    id: as written in requests.  title: for people.  source: the paper.  kind: FACTORED never forms n×k and keeps
    low rank; DENSE works on whole matrices, and its result has to be cut to a rank afterwards.  uses: which of
    DENSITY, SEED and ENERGY it heeds.  advice: when it is a good idea or a bad one.
    rank: of the result: "sum" of all ranks, "largest" of them, that of the "first", or "full".
    is_exact: whether the result is Σ w·Δ itself.  symmetric: whether the order of the terms does not matter.
    """

    id: str
    title: str
    source: str
    kind: str
    advice: str
    uses: tuple[str, ...] = ()
    rank: str = "sum"
    is_exact: bool = False
    symmetric: bool = True


_ALL = (
    Method(
        "linear",
        "Weighted sum",
        "",
        FACTORED,
        "Exact: the host would get the same from all LoRAs together, each with its weight.",
        is_exact=True,
    ),
)
METHODS: dict[str, Method] = {method.id: method for method in _ALL}
