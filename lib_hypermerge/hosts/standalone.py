"""Without a WebUI: files by path for the command line, files by name in two folders for the page."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import SpecError
from ..files.opening import CHECKPOINT_SUFFIXES
from ..jobs.host import Context

_FORBIDDEN = set('/\\:*?"<>|\0')
_SUFFIX = re.compile(r"\.safetensors$", re.IGNORECASE)
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(1, 10))}


def file_stem(name: str) -> str:
    """A file name without its suffix. SpecError if it is no plain name (a folder in it, a reserved sign)."""
    stem = _SUFFIX.sub("", name.strip())
    try:
        too_long = len(stem.encode("utf-8")) > 200  # file systems count bytes
    except UnicodeEncodeError:  # half a character: no metadata or answer could spell it
        raise SpecError(f"{name!r} cannot be a file name.", "It is no valid text.", "Give a plain name.") from None
    on_windows = stem.split(".")[0].upper() in _DEVICES or stem.endswith((".", " "))
    bad = any(c in _FORBIDDEN or ord(c) < 32 for c in stem)
    if not stem or stem.startswith(".") or too_long or on_windows or bad:
        raise SpecError(
            f"{name!r} cannot be a file name.",
            "It is empty, too long, starts with a dot, or holds a folder or a reserved sign.",
            "Give a plain name such as my-style.",
        )
    return stem


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files beneath a folder, linked folders too, but no link back to where it comes from."""
    try:
        real, entries = folder.resolve(), list(folder.iterdir())
    except (OSError, RuntimeError):  # it vanished, is not ours to read, or is a link to itself
        return
    if real in above:
        return
    for entry in entries:
        if entry.is_dir():
            yield from _files(entry, above | {real})
        elif entry.is_file():
            yield entry


class PathHost:
    """The command line: names are paths."""

    def __init__(self, threads: int = 0):
        self._threads = threads

    def checkpoints(self) -> list[str]:
        return []

    def resolve_checkpoint(self, name: str) -> Path:
        return Path(name)

    def lora_output(self, name: str) -> Path:
        path = Path(name)
        file_stem(path.name)
        return path.with_name(_SUFFIX.sub("", path.name) + ".safetensors")

    def refresh(self) -> None:
        pass

    def forget(self, job_id: str) -> None:
        pass

    def device(self) -> str:
        return "auto"

    def threads(self) -> int:
        return self._threads

    @contextlib.contextmanager
    def running(self, job_id: str, on_wait: Callable[[], None]) -> Iterator[Context]:
        yield Context()


class FolderHost(PathHost):
    """The standalone page: names in a folder of checkpoints and a folder of LoRAs."""

    def __init__(self, checkpoint_dir: Path, lora_dir: Path, threads: int = 0):
        super().__init__(threads)
        self.checkpoint_dir, self.lora_dir = checkpoint_dir, lora_dir
        self._turn = threading.Lock()

    def checkpoints(self) -> list[str]:
        found = (p for p in _files(self.checkpoint_dir) if p.suffix.lower() in CHECKPOINT_SUFFIXES)
        return sorted(p.relative_to(self.checkpoint_dir).as_posix() for p in found)

    def resolve_checkpoint(self, name: str) -> Path:
        if name not in self.checkpoints():
            raise SpecError(f"There is no checkpoint {name!r}.", hint="Refresh the list and choose one of it.")
        return self.checkpoint_dir / name

    def lora_output(self, name: str) -> Path:
        return self.lora_dir / f"{file_stem(name)}.safetensors"

    @contextlib.contextmanager
    def running(self, job_id: str, on_wait: Callable[[], None]) -> Iterator[Context]:
        if not self._turn.acquire(blocking=False):
            on_wait()
            self._turn.acquire()
        try:
            yield Context()
        finally:
            self._turn.release()
