"""A file that one process at a time holds; the system lets go of it when the process ends, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import BusyError

if os.name == "nt":
    import msvcrt

    def _take(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
else:
    import fcntl

    def _take(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """Held from the beginning until close(). BusyError, with `what` as the fact, if another process, or another Lock
    of this one, holds it. Raises OSError if the file cannot be made."""

    def __init__(self, path: Path, what: str):
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _take(self._fd)
            except (BlockingIOError, PermissionError):
                self.close()
                raise BusyError(what, hint="Wait for it to end.") from None
            except OSError:  # a file system without locks
                return
            if self._is_at(path):
                return
            self.close()  # whoever held it removed it meanwhile

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), path.stat())
        except FileNotFoundError:
            return False

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
