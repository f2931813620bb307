"""Without a WebUI: files by path for the command line, files by name in two folders for the page."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import SpecError
from ..jobs.host import Context
from .folders import checkpoint_names, lora_names, matching, matching_paths

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


class PathHost:
    """The command line: names are paths."""

    def __init__(self, threads: int = 0):
        self._threads = threads

    def checkpoints(self) -> list[str]:
        return []

    def resolve_checkpoint(self, name: str) -> Path:
        return Path(name)

    def loras(self) -> list[str]:
        return []

    def resolve_lora(self, name: str) -> Path:
        return Path(name)

    def find_loras(self, pattern: str) -> dict[str, Path]:
        return matching_paths(pattern)

    def lora_output(self, name: str) -> Path:
        path = Path(name)
        if name.endswith(("/", "\\")):
            raise SpecError(f"{name} names a folder.", hint=f"Give the file a name too: {name}my-style.")
        file_stem(path.name)
        return path.with_name(_SUFFIX.sub("", path.name) + ".safetensors")

    def checkpoint_output(self, name: str) -> Path:
        return self.lora_output(name)

    def loaded_checkpoint(self) -> Path | None:
        return None

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
        return list(checkpoint_names(self.checkpoint_dir))

    def resolve_checkpoint(self, name: str) -> Path:
        return _listed(checkpoint_names(self.checkpoint_dir), name, "checkpoint")

    def loras(self) -> list[str]:
        return list(lora_names(self.lora_dir))

    def resolve_lora(self, name: str) -> Path:
        return _listed(lora_names(self.lora_dir), name, "LoRA")

    def find_loras(self, pattern: str) -> dict[str, Path]:
        return matching(lora_names(self.lora_dir), pattern)

    def lora_output(self, name: str) -> Path:
        return self.lora_dir / f"{file_stem(name)}.safetensors"

    def checkpoint_output(self, name: str) -> Path:
        return self.checkpoint_dir / f"{file_stem(name)}.safetensors"

    @contextlib.contextmanager
    def running(self, job_id: str, on_wait: Callable[[], None]) -> Iterator[Context]:
        if not self._turn.acquire(blocking=False):
            on_wait()
            self._turn.acquire()
        try:
            yield Context()
        finally:
            self._turn.release()


def _listed(names: dict[str, Path], name: str, what: str) -> Path:
    """SpecError if the name is not of the list: a page must not reach other files."""
    if name not in names:
        raise SpecError(f"There is no {what} {name!r}.", hint="Refresh the list and choose one of it.")
    return names[name]
