"""Make virtual environments and keep them in step with their requirement files.

An environment counts as ready when it holds a stamp with the digest of what
was to be installed. The stamp is written last, so an environment whose making
was interrupted has none and is made anew.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAMP_NAME = "hypermerge-stamp"


class SetupError(Exception):
    """Something could not be set up; the message tells the user what."""


def venv_python(folder: Path) -> Path:
    """Return where an environment's interpreter lies."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def requirement_lines(file: Path) -> Iterator[str]:
    """Yield the lines that matter of a requirement file and of those it includes."""
    for raw in file.read_text(encoding="utf-8").splitlines():
        line = raw.split("#", 1)[0].strip()
        if line.startswith("-r "):
            yield from requirement_lines(file.parent / line[3:].strip())
        elif line:
            yield line


def digest(requirements: Path, version: tuple[int, int] = sys.version_info[:2]) -> str:
    """Return a digest of what an environment holds: its pins and its Python's version.

    Comments and the pins' order do not count, so that editing them rebuilds nothing.
    """
    lines = [f"python {version[0]}.{version[1]}", *sorted(requirement_lines(requirements))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def is_ready(folder: Path, wanted: str) -> bool:
    """Tell whether an environment was completely made from these requirements."""
    stamp = folder / STAMP_NAME
    # The interpreter is a link that dangles once the Python it came from is gone.
    return stamp.is_file() and stamp.read_text(encoding="utf-8").strip() == wanted and venv_python(folder).exists()


def ensure(folder: Path, requirements: Path) -> Path:
    """Make the environment unless it is ready, and return its interpreter."""
    wanted = digest(requirements)
    with locked(folder.with_name(folder.name + ".lock")):
        if not is_ready(folder, wanted):
            _make(folder, requirements)
            (folder / STAMP_NAME).write_text(wanted + "\n", encoding="utf-8")
    return venv_python(folder)


def _make(folder: Path, requirements: Path) -> None:
    print(f"Making {folder.name} from requirements/{requirements.name}; this takes a few minutes.", flush=True)
    started = time.monotonic()
    if folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise SetupError(f"{folder} is to be made anew but cannot be removed: {error}") from error
    _call([sys.executable, "-m", "venv", str(folder)], "making the virtual environment")
    # A progress bar helps a person waiting for PyTorch and floods a log file.
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    pip = [str(venv_python(folder)), "-m", "pip", "--disable-pip-version-check", "install", *quiet]
    _call([*pip, "-r", str(requirements)], "installing its packages")
    print(f"Made {folder.name} in {time.monotonic() - started:.0f} s.", flush=True)


def _call(command: list[str], what: str) -> None:
    status = subprocess.call(command)
    if status:
        raise SetupError(f"{what} failed (exit status {status}); the reason stands above")


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock on a file, waiting for another process that holds it.

    The operating system drops the lock when its holder ends, however it ends,
    so a killed start leaves nothing to clean up.
    """
    with file.open("a+") as handle:
        told = False
        while not _try_lock(handle.fileno()):
            if not told:
                print(f"Waiting for another start that is at work ({file.name}).", flush=True)
                told = True
            time.sleep(0.2)
        yield


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            os.lseek(descriptor, 0, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
