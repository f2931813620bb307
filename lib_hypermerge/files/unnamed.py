"""A file that appears under its name in one step, once it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import BusyError, OutputError

_PART = ".hypermerge-part"
_STALE_SECONDS = 24 * 3600
_WINDOWS = os.name == "nt"


@dataclass(frozen=True)
class Written:
    """A finished file; data_sha256 is over the bytes behind the header (what WebUIs call the model hash)."""

    path: Path
    bytes: int
    sha256: str
    data_sha256: str


class UnnamedFile:
    """Use as a context: leaving it before publish() removes every trace.

    On Linux the file has no name until then, so not even a killed process leaves one behind; elsewhere it is a
    `.hypermerge-part` file beside the target.

    Subclasses write to it and have a seal(), which does all that takes time or finds a full disk; publish() then
    only gives the name.
    """

    def __init__(self, path: Path, overwrite: bool = False):
        self.path, self.overwrite = Path(path), overwrite
        self.sealed: Written | None = None
        self._inode: tuple[int, int] | None = None
        self._spare = self.path.with_name(f".{self.path.stem}-{secrets.token_hex(4)}{_PART}")
        self._part: Path | None = None
        _remove_stale_parts(self.path.parent)
        with self.explained():
            self._fd = self._open()

    @property
    def spare(self) -> Path:
        """The name beside the target that the file may have for a while, and after a killed process still has."""
        return self._spare

    def _open(self) -> int:
        if hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir():
            with contextlib.suppress(OSError):  # not every file system has nameless files
                return os.open(self.path.parent, os.O_TMPFILE | os.O_RDWR, 0o666)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(self._spare, flags, 0o666)
        self._part = self._spare
        return fd

    @contextlib.contextmanager
    def explained(self):
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

    def _write(self, view: memoryview) -> None:
        while len(view):
            view = view[os.write(self._fd, view) :]

    def _seal(self, nbytes: int, sha256: str, data_sha256: str) -> Written:
        """Flush to the disk; from now on nothing is written."""
        with self.explained():
            os.fsync(self._fd)
            stat = os.fstat(self._fd)
        self._inode = stat.st_dev, stat.st_ino
        self.sealed = Written(self.path, nbytes, sha256, data_sha256)
        return self.sealed

    @property
    def has_its_name(self) -> bool:
        """Whether what lies at the path is this file."""
        with contextlib.suppress(OSError):
            stat = self.path.stat()
            return (stat.st_dev, stat.st_ino) == self._inode
        return False

    def publish(self) -> Written:
        """Give the sealed file its name. BusyError if one appeared there meanwhile, and overwriting was not asked for;
        OutputError if the system refuses."""
        if self.sealed is None:
            raise ValueError("the file was not sealed")
        with self.explained():
            if self._part is None:
                self._link()
            os.close(self._fd)
            self._fd = -1
            if self._part is not None:
                self._rename_part(self._part)
                self._part = None
            sync_folder(self.path.parent)
        return self.sealed

    def _link(self) -> None:
        target = self._spare if self.overwrite else self.path
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            # a folder handle makes Python use linkat, the call that follows /proc's link to the open file
            os.link(f"/proc/self/fd/{self._fd}", target.name, dst_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            raise self._exists_now() from None
        finally:
            os.close(folder)
        self._part = target if self.overwrite else None

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

    def _exists_now(self) -> BusyError:
        return BusyError(
            f"{self.path.name} appeared while the job was running.",
            "Another program wrote it.",
            "It was left as it is. Choose another name.",
        )

    def abort(self) -> None:
        """Close and remove what was written; nothing happens after publish()."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._part is not None:
            self._part.unlink(missing_ok=True)
            self._part = None


class TextWriter(UnnamedFile):
    """A small text file, UTF-8 with the line ends it is given."""

    def __init__(self, path: Path, text: str, overwrite: bool = False):
        super().__init__(path, overwrite)
        self._text = text

    def seal(self) -> Written:
        """Write the text and flush it to the disk. OutputError if that fails."""
        raw = self._text.encode()
        with self.explained():
            self._write(memoryview(raw))
        digest = hashlib.sha256(raw).hexdigest()
        return self._seal(len(raw), digest, digest)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
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
