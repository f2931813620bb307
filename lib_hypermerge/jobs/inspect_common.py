"""What all parts of an inspection share: answers stay small however large a file's lists are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MOST_NAMES = 50
MOST_TEXT = 2000
MOST_KEYS = 200
_READ = ("ss_", "sshs_", "modelspec.", "hypermerge")


def shown(names: Sequence[str]) -> list[str]:
    """The first names of a long list; its length is told beside it."""
    return list(names[:MOST_NAMES])


def metadata_facts(metadata: dict[str, str]) -> dict[str, object]:
    """A header's texts, what programs read of it first, long ones cut, and how many were left out or cut."""
    ordered = sorted(metadata, key=lambda key: (not key.startswith(_READ), key))
    kept = {key: metadata[key] for key in ordered[:MOST_KEYS]}
    cut = sorted(key for key, value in kept.items() if len(value) > MOST_TEXT)
    texts = {key: value if len(value) <= MOST_TEXT else value[:MOST_TEXT] + "…" for key, value in kept.items()}
    return {"metadata": texts, "metadata_cut": cut, "metadata_left_out": len(metadata) - len(kept)}


def sendable(value: Any) -> Any:
    """The same with every text fit for UTF-8: a header may hold halves of characters, which no answer could carry."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {sendable(key): sendable(item) for key, item in value.items()}
    return [sendable(item) for item in value] if isinstance(value, list) else value
