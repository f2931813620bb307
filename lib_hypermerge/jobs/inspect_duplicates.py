"""Files of the same data: told apart by size first, so that only files that could be equal are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import FormatError, SpecError
from ..files.hashes import Hashes, data_size, hash_file
from .host import Host

Size = tuple[str, int]


class HashBook:
    """Hashes of files, each read once. on_bytes: told how many bytes were read since; may raise to stop."""

    def __init__(self, on_bytes: Callable[[int], None]):
        self._on_bytes = on_bytes
        self._known: dict[Path, Hashes] = {}

    def of(self, path: Path) -> Hashes:
        if path not in self._known:
            self._known[path] = hash_file(path, self._on_bytes)
        return self._known[path]


def listed(host: Host) -> dict[Path, str]:
    """Every file of the host's lists → its name there."""
    found: dict[Path, str] = {}
    for names, resolve in ((host.checkpoints(), host.resolve_checkpoint), (host.loras(), host.resolve_lora)):
        for name in names:
            try:
                found.setdefault(resolve(name), name)
            except SpecError:  # gone since it was listed
                continue
    return found


def size_of(path: Path) -> Size | None:
    """What two files must have in common to hold the same data; None for a folder and what cannot be read."""
    try:
        if not path.is_file():
            return None
        data = data_size(path)
        return ("file", path.stat().st_size) if data is None else ("data", data)
    except OSError:
        return None


def candidates(given: Iterable[Path], others: Iterable[Path]) -> dict[Path, list[Path]]:
    """Each given file → those that could be equal to it."""
    groups: dict[Size, list[Path]] = {}
    given = list(dict.fromkeys(given))
    for path in dict.fromkeys((*given, *others)):
        size = size_of(path)
        if size is not None:
            groups.setdefault(size, []).append(path)
    out = {}
    for group in groups.values():
        for path in group:
            alike = [other for other in group if other != path and not path.samefile(other)]
            if path in given and alike:
                out[path] = alike
    return out


def duplicates(pairs: dict[Path, list[Path]], names: dict[Path, str], book: HashBook) -> list[dict[str, Any]]:
    """JSON-ready: of each given file those equal to it. same: "file" bit for bit, or "data" behind the header."""
    out = []
    for path, others in pairs.items():
        for other in others:
            try:
                a, b = book.of(path), book.of(other)
            except FormatError:  # it went away meanwhile
                continue
            if a.sha256 == b.sha256 or (a.data_sha256 is not None and a.data_sha256 == b.data_sha256):
                out.append({
                    "file": path.name, "equals": names.get(other, other.name), "path": str(other),
                    "same": "file" if a.sha256 == b.sha256 else "data",
                })  # fmt: skip
    return out
