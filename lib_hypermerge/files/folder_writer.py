"""Write a folder of files that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from pathlib import Path

from ..errors import BusyError, OutputError, SpecError
from .unnamed import sync_folder
from .writer import check_room

_PART = ".hypermerge-part"
_OLD = ".hypermerge-old"
_STALE_SECONDS = 24 * 3600


def check_folder_target(path: Path, needed_bytes: int, overwrite: bool, marks: tuple[str, ...]) -> None:
    """Refuse before anything is computed: target exists, parent missing or read-only, disk too small.

    marks: names of which a folder holds one if it may be replaced at all; any other folder is somebody's own.
    """
    parent = path.parent
    if not parent.is_dir():
        raise SpecError(f"There is no folder {parent}.", hint="Create it, or choose another output.")
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise SpecError(f"{path.name} exists already.", hint="Choose another name, or allow overwriting.")
        if path.is_symlink() or not path.is_dir():
            raise SpecError(f"{path.name} is no folder, and a folder is to be written.", hint="Choose another name.")
        entries = [entry.name for entry in path.iterdir()]
        if entries and not any(entry in marks for entry in entries):
            raise SpecError(
                f"The folder {path.name} holds other files.",
                "Only a folder of the same kind is replaced.",
                "Choose another name.",
            )
    check_room(parent, path.name, needed_bytes)


class FolderWriter:
    """Use as a context: leaving it without commit() removes every trace.

    Files are written below `part`, a folder beside the target whose name begins with a dot; each file's writer
    flushes it to the disk. commit() gives the folder its name in one step. An old folder is moved aside first
    and removed last, and moved back if the new one cannot take its place.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        _remove_stale(self.path.parent)
        self.part = self.path.with_name(f".{self.path.name[:40]}-{secrets.token_hex(4)}{_PART}")
        with self._explained():
            self.part.mkdir()

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path.name} could not be written.", f"{error.strerror}.",
                "Nothing was left behind. Choose another folder.",
            ) from None  # fmt: skip

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, *_) -> None:
        self.abort()

    def folder(self, name: str) -> Path:
        """A new folder within; "" is the folder itself."""
        made = self.part / name
        with self._explained():
            made.mkdir(exist_ok=True)
        return made

    def text(self, name: str, content: str) -> Path:
        """Write a small text file, flushed to the disk; returns where it will be."""
        target = self.part / name
        with self._explained(), target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return self.path / name

    def commit(self) -> Path:
        """Give the folder its name. BusyError if one appeared there meanwhile, and overwriting was not asked for."""
        for folder in sorted(self.part.rglob("*")):
            if folder.is_dir():
                sync_folder(folder)
        sync_folder(self.part)
        with self._explained():
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
                raise self._exists_now()
            if not self.path.exists():
                self._rename()
            elif self.overwrite:
                self._replace()
            else:
                raise self._exists_now()
        sync_folder(self.path.parent)
        return self.path

    def _rename(self) -> None:
        try:
            self.part.rename(self.path)  # a folder replaces only an empty folder, and on Windows none
        except FileExistsError:
            raise self._exists_now() from None

    def _replace(self) -> None:
        old = self.path.with_name(f".{self.path.name[:40]}-{secrets.token_hex(4)}{_OLD}")
        self.path.rename(old)
        try:
            self._rename()
        except BaseException:
            old.rename(self.path)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _exists_now(self) -> BusyError:
        return BusyError(
            f"{self.path.name} appeared while the job was running.",
            "Another program wrote it.",
            "It was left as it is. Choose another name.",
        )

    def abort(self) -> None:
        """Remove what was written; nothing happens after commit()."""
        if self.part.exists():
            shutil.rmtree(self.part, ignore_errors=True)


def _remove_stale(folder: Path) -> None:
    """Parts that a killed process left; a day old, so nobody writes them."""
    with contextlib.suppress(OSError):
        for part in folder.glob(f".*{_PART}"):
            if part.is_dir() and time.time() - part.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(part, ignore_errors=True)
