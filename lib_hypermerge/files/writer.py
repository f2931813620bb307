"""Stream tensors into a .safetensors file that appears under its name only when it is complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BusyError, OutputError, SpecError
from .dtypes import name_of

if TYPE_CHECKING:
    import torch

_PART = ".hypermerge-part"
_STALE_SECONDS = 24 * 3600
_WINDOWS = os.name == "nt"
_SAMPLE_START, _SAMPLE_SIZE = 0x100000, 0x10000  # what old WebUIs hash


@dataclass(frozen=True)
class Written:
    """A finished file; data_sha256 is over the bytes behind the header (what WebUIs call the model hash)."""

    path: Path
    bytes: int
    sha256: str
    data_sha256: str


def check_target(path: Path, needed_bytes: int, overwrite: bool) -> None:
    """Refuse before anything is computed: target exists, folder missing or read-only, disk too small."""
    folder = path.parent
    if path.suffix != ".safetensors":
        raise SpecError(f"The output {path.name!r} must end in .safetensors.")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a folder that may not be entered
        raise SpecError(f"{path} cannot be written.", f"{error.strerror}.", "Choose another name.") from None
    if not folder.is_dir():
        raise SpecError(f"There is no folder {folder}.", hint="Create it, or choose another output.")
    if path.is_dir():
        raise SpecError(f"{path} is a folder.", hint="Name a file.")
    if path.exists() and not overwrite:
        raise SpecError(f"{path.name} exists already.", hint="Choose another name, or allow overwriting.")
    check_room(folder, path.name, needed_bytes)


def check_room(folder: Path, name: str, needed_bytes: int) -> None:
    """OutputError if a folder cannot be written to or its disk is too small for what is to be called `name`."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {folder} cannot be written to.", "It is read-only for this user.")
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutputError(
            f"The disk is too full for {name}.",
            f"It needs about {needed_bytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free in {folder}.",
            "Free some space, or choose another folder.",
        )


def header_bytes(entries: dict[str, dict], metadata: dict[str, str]) -> bytes:
    """The JSON of a safetensors header, metadata first."""
    table = {"__metadata__": metadata, **entries}
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


class SafetensorsWriter:
    """Use as a context: leaving it without commit() removes every trace.

    The data is streamed behind a reserved header, so tensors are written as they come, and hashes are
    over the final bytes. On Linux the file has no name until commit, so not even a killed process leaves
    one behind; elsewhere it is a `.hypermerge-part` file beside the target.

    header_reserve: bytes kept for the header; unused ones become spaces, which the format allows.
    """

    def __init__(self, path: Path, header_reserve: int, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self._entries: dict[str, dict] = {}
        self._data_size = 0
        self._data_hash = hashlib.sha256()
        self._start = 8 + (header_reserve + 7) // 8 * 8
        self._part: Path | None = None
        _remove_stale_parts(self.path.parent)
        with self._explained():
            self._fd = self._open()
            os.lseek(self._fd, self._start, os.SEEK_SET)

    def _open(self) -> int:
        if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
            with contextlib.suppress(OSError):  # not every file system has nameless files
                return os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        self._part = self._part_name()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        return os.open(self._part, flags, 0o666)

    @contextlib.contextmanager
    def _explained(self):
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OutputError(
                f"{self.path.name} could not be written.",
                "The disk is full." if full else f"{error.strerror}.",
                "Nothing was left behind. " + ("Free some space." if full else "Choose another folder."),
            ) from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.abort()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, in its own dtype. Names must be new."""
        import torch

        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._append(name, name_of(tensor.dtype), tensor.shape, raw.nbytes)
        self._put(raw)

    def _append(self, name: str, dtype: str, shape: Iterable[int], nbytes: int) -> None:
        """Enter the next tensor in the header; its bytes follow by _put()."""
        if name in self._entries:
            raise ValueError(f"the tensor {name} was written twice")
        stop = self._data_size + nbytes
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._data_size, stop]}
        self._data_size = stop

    def _put(self, raw: memoryview) -> None:
        with self._explained():
            self._write(raw)
        self._data_hash.update(raw)

    def _write(self, view: memoryview) -> None:
        while len(view):
            view = view[os.write(self._fd, view) :]

    def commit(self, metadata: Callable[[str, str], dict[str, str]]) -> Written:
        """Write the header, flush to the disk, and give the file its name.

        metadata(data_sha256, legacy_hash) makes the header's texts. legacy_hash is what old WebUIs
        compute: the first 8 hex digits of the SHA-256 of 64 KiB from 1 MiB on. It is "" if the header reaches
        that far: a hash cannot stand within what it is of.
        """
        with self._explained():
            digest = self._data_hash.hexdigest()
            header = header_bytes(self._entries, metadata(digest, self._legacy_hash()))
            room = self._start - 8
            if len(header) > room:
                raise ValueError(f"the header needs {len(header)} bytes and {room} were reserved")
            head = room.to_bytes(8, "little") + header.ljust(room, b" ")
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write(memoryview(head))
            os.fsync(self._fd)
            whole = hashlib.sha256(head)
            os.lseek(self._fd, self._start, os.SEEK_SET)
            while block := os.read(self._fd, 1 << 22):
                whole.update(block)
            self._publish()
        return Written(self.path, self._start + self._data_size, whole.hexdigest(), digest)

    def _legacy_hash(self) -> str:
        if self._start > _SAMPLE_START:
            return ""
        os.lseek(self._fd, _SAMPLE_START, os.SEEK_SET)
        return hashlib.sha256(os.read(self._fd, _SAMPLE_SIZE)).hexdigest()[:8]

    def _publish(self) -> None:
        if self._part is None:
            target = self._part_name() if self.overwrite else self.path
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                # a folder handle makes Python use linkat, the call that follows /proc's link to the open file
                os.link(f"/proc/self/fd/{self._fd}", target.name, dst_dir_fd=folder, follow_symlinks=True)
            except FileExistsError:
                raise self._exists_now() from None
            finally:
                os.close(folder)
            self._part = target if self.overwrite else None
        os.close(self._fd)
        self._fd = -1
        if self._part is not None:
            self._rename_part(self._part)
            self._part = None
        sync_folder(self.path.parent)

    def _rename_part(self, part: Path) -> None:
        if self.overwrite:
            self._replace_target(part)
        elif _WINDOWS:
            try:
                part.rename(self.path)  # unlike elsewhere, never replaces
            except FileExistsError:
                raise self._exists_now() from None
        else:
            try:
                os.link(part, self.path)  # unlike a rename, never replaces
            except FileExistsError:
                raise self._exists_now() from None
            except OSError:  # a file system without hard links
                if self.path.exists():
                    raise self._exists_now() from None
                part.rename(self.path)
                return
            part.unlink()

    def _replace_target(self, part: Path) -> None:
        try:
            part.replace(self.path)
        except PermissionError:
            if not _WINDOWS:
                raise
            raise OutputError(
                f"{self.path.name} could not be replaced: it is in use.",
                "Windows keeps a file that a program has open, as a WebUI may a LoRA that it has loaded.",
                "It was left as it is. Close that program, or choose another name.",
            ) from None

    def _part_name(self) -> Path:
        return self.path.with_name(f".{self.path.stem}-{secrets.token_hex(4)}{_PART}")

    def _exists_now(self) -> BusyError:
        return BusyError(
            f"{self.path.name} appeared while the job was running.",
            "Another program wrote it.",
            "It was left as it is. Choose another name.",
        )

    def abort(self) -> None:
        """Close and remove what was written; nothing happens after commit()."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


def sync_folder(folder: Path) -> None:
    if _WINDOWS:
        return
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_stale_parts(folder: Path) -> None:
    """Parts that a killed process left on systems without nameless files; a day old, so nobody writes them."""
    with contextlib.suppress(OSError):
        for part in folder.glob(f".*{_PART}"):
            if time.time() - part.stat().st_mtime > _STALE_SECONDS:
                part.unlink(missing_ok=True)
