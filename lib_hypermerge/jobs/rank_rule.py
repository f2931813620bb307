"""How the rank of each layer is chosen: the rules, and what may be asked of them. Free of torch."""

from __future__ import annotations

from ..errors import SpecError

FIXED, SIZE = "fixed", "size"
RULES = (
    (FIXED, "the same rank everywhere"),
    ("ratio", "singular values of at least target × the largest"),
    ("energy", "the share target of the change's energy (squared norm) in every layer"),
    ("cumulative", "the share target of the sum of singular values in every layer"),
    (SIZE, "a file of target MiB, ranks allotted over all layers: least error of the weights, not of pictures"),
)
TARGET_HELP = (
    "ratio: 0…1 (or above 1: largest / smallest kept). energy, cumulative: 0…1. size: MiB. Unused by fixed."
)


def check_rule(rule: str, target: float | None) -> None:
    """SpecError if a rule lacks its target, or has one that it cannot use."""
    if rule == FIXED:
        if target is not None:
            raise SpecError("A target was given, but the rank rule is 'fixed'.", hint="Choose a rule that uses it.")
        return
    if target is None:
        raise SpecError(f"The rank rule {rule!r} needs a target.", hint=TARGET_HELP)
    shares = rule in ("energy", "cumulative")
    if target <= 0 or (shares and target > 1):
        upper = " and at most 1" if shares else ""
        raise SpecError(f"The target of {rule!r} must be above 0{upper}.", f"Got {target:g}.")
