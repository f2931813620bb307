"""New styles in the table of styles that the WebUIs keep: a CSV file with the columns name, prompt, negative_prompt.

Rows are added behind those that are there, which stay byte for byte: the WebUI's own way of saving writes all of the
file anew, and drops comments, rows that it could not read, and a style that two files name alike.
"""

from __future__ import annotations

import csv
import io
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FormatError, OutputError, SpecError

_FIELDS = ["name", "prompt", "negative_prompt"]
_TURN = threading.Lock()


def add_styles(database: Any, prompts: Mapping[str, str]) -> list[str]:
    """Add a style for each name → prompt to a host's StyleDatabase; returns the names that they have now.

    A name that is taken by another prompt gets a number; one that has this very prompt stays as it is.  SpecError if
    the host has no file for styles, FormatError if that is no such table, OutputError if it cannot be written to; then
    it is as it was.
    """
    with _TURN:
        path = _file(database)
        database.reload()  # somebody may have edited the files
        named = _named(database.styles, prompts)
        new = {name: prompt for name, prompt in named.items() if name not in database.styles}
        if new:
            _append(path, new, database)
        return list(named)


def _file(database: Any) -> Path:
    """Where the host puts a style of no other file; hosts differ in what they call it."""
    for name in ("default_path", "path"):
        path = str(getattr(database, name, None) or "")
        if path and not set("*?") & set(path):
            return Path(path)
    raise SpecError("This WebUI has no file for styles.", hint="Copy the prompts instead.")


def _named(styles: Mapping[str, Any], prompts: Mapping[str, str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for wish, prompt in prompts.items():
        name, number = wish, 1
        while name in named or (name in styles and styles[name].prompt != prompt):
            number += 1
            name = f"{wish} ({number})"
        named[name] = prompt
    return named


def _append(path: Path, new: Mapping[str, str], database: Any) -> None:
    before = path.stat().st_size if path.exists() else None
    rows = _rows(path.read_bytes() if before is not None else b"", new, path.name)
    try:
        with path.open("ab") as file:
            file.write(rows)
            file.flush()
            os.fsync(file.fileno())
        database.reload()
        if any(name not in database.styles or database.styles[name].prompt != new[name] for name in new):
            raise FormatError(f"The WebUI could not read the new styles in {path.name}.", "The file may be damaged.")
    except BaseException as error:
        _restore(path, before)
        database.reload()
        if isinstance(error, OSError):
            raise OutputError(f"{path.name} cannot be written.", f"{error}.", "Copy the prompts instead.") from None
        raise


def _restore(path: Path, size: int | None) -> None:
    if size is None:
        path.unlink(missing_ok=True)
    else:
        os.truncate(path, size)


def _rows(content: bytes, new: Mapping[str, str], where: str) -> bytes:
    """What to add: with a heading if there is none, in the columns that are there; old tables call a prompt text."""
    table = io.StringIO(newline="")
    try:
        text = content.decode("utf-8-sig")
        fields = next(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True), _FIELDS)
    except (UnicodeDecodeError, csv.Error):
        text, fields = "?", []
    column = next((name for name in ("prompt", "text") if name in fields), None)
    if column is None or "name" not in fields:
        raise FormatError(f"{where} is no table of styles.", "It has no columns name and prompt.")
    writer = csv.DictWriter(table, fields)
    if text:
        start = b"" if text.endswith(("\n", "\r")) else b"\r\n"
    else:
        start = b"" if content else "\ufeff".encode()
        writer.writeheader()
    for name, prompt in new.items():
        writer.writerow({"name": name, column: prompt})
    return start + table.getvalue().encode()
