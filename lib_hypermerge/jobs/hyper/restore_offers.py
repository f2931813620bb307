"""Which models a hyper-model can give back, for a page to offer them."""

from __future__ import annotations

from typing import Any

from ...errors import HypermergeError
from ...files.opening import open_tensors
from ..host import Host
from .finding import find_recipe


def offers(values: dict[str, Any], host: Host) -> dict[str, list[str]]:
    """The parameter model → the models of the recipe that belongs to what is chosen; none where that is none."""
    if not values.get("hyper"):
        return {}
    try:
        with open_tensors(host.resolve_checkpoint(values["hyper"])) as file:
            recipe = find_recipe(values.get("recipe") or None, file, host).recipe
    except (HypermergeError, OSError):  # the plan says what is wrong
        return {}
    return {"model": list(recipe.models or recipe.multipliers)}
