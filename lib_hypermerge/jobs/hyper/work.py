"""The work folder of a hyper-merge: what survives when the process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...errors import FormatError, HypermergeError, OutputError
from ...files.dtypes import name_of
from ...files.lock import Lock
from ...files.safetensors import SafetensorsFile
from ...files.together import recover
from ...files.unnamed import TextWriter
from ...files.writer import header_bytes

_SUFFIX = ".hypermerge-work"
_JOB, _LOCK, _JOURNAL = "job.json", "lock", "outputs.json"
_STALE_SECONDS = 7 * 24 * 3600


def work_folder(target: Path) -> Path:
    """Where the work on a hyper-model is kept, beside it."""
    return target.with_name(f".{target.stem[:50]}{_SUFFIX}")


def mend(folder: Path) -> None:
    """Undo the outputs of a run that was killed while it gave them their names; nothing if somebody works there.

    For before it is asked whether the outputs exist. OutputError if that is not possible.
    """
    if (folder / _JOURNAL).exists():
        with contextlib.suppress(OSError), _held(folder) as lock:
            if lock is not None and recover(folder / _JOURNAL):
                _remove(folder, lock)  # all were there: nothing is left to do


@contextlib.contextmanager
def _held(folder: Path):
    """The folder's lock while in the context; None if another has it."""
    try:
        lock = _lock(folder)
    except HypermergeError:
        yield None
        return
    try:
        yield lock
    finally:
        lock.close()


def _lock(folder: Path) -> Lock:
    return Lock(folder / _LOCK, "Another run of Hyper-Merge is at work under this name.")


class Work:
    """Tensors by number, each set in a file of its own. Thread-safe but for open, close and discard.

    A killed process leaves them, and the next one with the same fingerprint goes on from them. Whoever ends in
    order, well or not, calls discard().  resumed: something was found.  bytes: of all tensors that are kept.
    """

    def __init__(self, folder: Path, lock: Lock):
        self.folder, self._own_lock = folder, lock
        self._parents: list[Path] = []  # folders that were made for it, inmost first
        self._sizes: dict[int, int] = {}
        self._unchecked: set[int] = set()
        self._lock = threading.Lock()
        self.resumed = False

    @classmethod
    def open(cls, folder: Path, fingerprint: Mapping[str, Any] | str) -> Work:
        """Take the folder, make it if need be, and empty it if it is of another job or of another version.

        Raises BusyError (another run has it) or OutputError (it cannot be made).
        """
        remove_stale(folder.parent)
        parents = [parent for parent in folder.parents if not parent.exists()]
        job = json.dumps({"version": __version__, "job": fingerprint}, sort_keys=True, ensure_ascii=False)
        with _explained(folder):
            lock = _take(folder)
        try:
            work = cls(folder, lock)
            work._parents = parents
            with _explained(folder):
                work._begin(job)
        except BaseException:
            lock.close()
            raise
        return work

    def _begin(self, job: str) -> None:
        recover(self.journal)
        if _text(self.folder / _JOB) != job:
            _empty(self.folder)
            with TextWriter(self.folder / _JOB, job, overwrite=True) as file:
                file.seal()
                file.publish()
        for path in self.folder.iterdir():
            if path.suffix == ".part":
                path.unlink()
            elif path.suffix == ".safetensors" and path.stem.isdigit():
                self._sizes[int(path.stem)] = path.stat().st_size
        self._unchecked = set(self._sizes)
        self.resumed = bool(self._sizes)

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def journal(self) -> Path:
        """Of publish_together()."""
        return self.folder / _JOURNAL

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def has(self, index: int) -> bool:
        """Whether these tensors are here, and whole: those of an earlier run are read once to see."""
        with self._lock:
            if index not in self._sizes:
                return False
            unchecked = index in self._unchecked
        if unchecked:
            try:
                self._read(index)
            except (OSError, HypermergeError):
                with self._lock:
                    self._sizes.pop(index, None)
                    self._unchecked.discard(index)
                return False
            with self._lock:
                self._unchecked.discard(index)
        return True

    def save(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors, of any number format and device, under a number; replaces what was there. OutputError."""
        entries, raws, end, check = {}, [], 0, 0
        for name, tensor in tensors.items():
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            start, end = end, end + raw.nbytes
            entries[name] = {"dtype": name_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
            check = zlib.crc32(raw, check)
            raws.append(raw)
        header = header_bytes(entries, {"crc32": str(check)})
        header = header.ljust((len(header) + 7) // 8 * 8, b" ")
        path = self._path(index)
        part = path.with_suffix(f".{threading.get_ident()}.part")
        with _explained(self.folder):
            with part.open("wb", buffering=0) as file:
                for raw in (len(header).to_bytes(8, "little"), header, *raws):
                    _write(file, memoryview(raw))
            part.replace(path)
        with self._lock:
            self._sizes[index] = 8 + len(header) + end
            self._unchecked.discard(index)

    def load(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a number, in fresh memory. KeyError if it has none; OutputError if they were damaged."""
        with self._lock:
            if index not in self._sizes:
                raise KeyError(index)
        try:
            return self._read(index)
        except (OSError, HypermergeError) as error:
            raise OutputError(
                f"What was kept in {self.folder} is damaged.", str(error), "Run the job again: it begins anew."
            ) from None

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        with SafetensorsFile(self._path(index)) as file:
            tensors = {name: file.read(info) for name, info in file.tensors.items()}
            check = 0
            for name in sorted(tensors, key=lambda name: file.tensors[name].offset):
                check = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, check)
            if file.metadata.get("crc32") != str(check):
                raise FormatError(f"{file.path.name} is damaged.", "Its checksum is another.")
        return tensors

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def close(self) -> None:
        """Let others have the folder; what was saved stays."""
        self._own_lock.close()

    def discard(self) -> None:
        """Remove everything; what cannot be removed now goes with a later run."""
        _remove(self.folder, self._own_lock)
        for parent in self._parents:
            with contextlib.suppress(OSError):  # not if something is in it by now
                parent.rmdir()


def remove_stale(parent: Path) -> None:
    """Work folders in a folder that nobody used for a week; outputs that one was about to give names are undone."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f".*{_SUFFIX}"):
            with contextlib.suppress(OSError, HypermergeError):
                if time.time() - folder.stat().st_mtime > _STALE_SECONDS:
                    with _held(folder) as lock:
                        if lock is not None:
                            recover(folder / _JOURNAL)
                            _remove(folder, lock)


def _take(folder: Path) -> Lock:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody removed it just now
            return _lock(folder)


def _remove(folder: Path, lock: Lock) -> None:
    """As far as possible; the job's description first, without which nobody goes on from the rest."""
    with contextlib.suppress(OSError):
        (folder / _JOB).unlink()
    if os.name == "nt":  # it keeps a file that is open
        lock.close()
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _empty(folder: Path) -> None:
    (folder / _JOB).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _write(file, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]


@contextlib.contextmanager
def _explained(folder: Path):
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"The work folder {folder} could not be written.", f"{error.strerror}.", "Free some space, or choose "
            "another folder.",
        ) from None  # fmt: skip
