"""Open a checkpoint, whatever it is stored as."""

from __future__ import annotations

from pathlib import Path

from ..errors import SpecError
from ..files.opening import open_tensors
from ..files.source import TensorFile
from . import diffusers_folder
from .detect import recognise
from .module import Model


def open_checkpoint(path: str | Path) -> Model:
    """The checkpoint at a path, open and recognised; close it by `model.file.close()`.

    This is the one door for every job: a file of any kind, shards by their index, a folder as diffusers saves it
    (or its model_index.json, or the denoiser's folder or file alone); all come under single-file names.
    Raises SpecError (nothing there), FormatError (broken) or LayoutError (no known model).
    """
    path = Path(path)
    folder = path.parent if path.name == diffusers_folder.PIPELINE else path
    try:
        file = diffusers_folder.open_folder(folder) if diffusers_folder.is_folder(folder) else None
    except OSError as error:
        raise SpecError(f"{path} cannot be read.", f"{error.strerror}.") from None
    if file is None:
        file = open_tensors(path)
        if diffusers_folder.is_denoiser(file.tensors):
            file = _presented(file)
    try:
        return recognise(file)
    except BaseException:
        file.close()
        raise


def _presented(file: TensorFile) -> TensorFile:
    try:
        return diffusers_folder.present_file(file)
    except BaseException:
        file.close()
        raise
