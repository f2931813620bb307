"""Open a checkpoint, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

from ..files.opening import open_tensors
from .detect import recognise
from .module import Model


def open_checkpoint(path: str | Path) -> Model:
    """The checkpoint at a path, open and recognised; close it by `model.file.close()`.

    This is the one door for every job: what a checkpoint may be is decided behind it.
    Raises SpecError (nothing there), FormatError (broken) or LayoutError (no known model).
    """
    file = open_tensors(path)
    try:
        return recognise(file)
    except BaseException:
        file.close()
        raise
