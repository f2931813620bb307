"""Several files that appear under their names all, or none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import OutputError
from .unnamed import TextWriter, UnnamedFile, Written, sync_folder

_OLD = ".hypermerge-old"
_WINDOWS = os.name == "nt"


@dataclass(frozen=True)
class _Output:
    """spare: a name that the new file may have for a while.  aside: where the file that it replaces is kept until
    all are there; None if it replaces none."""

    path: str
    spare: str
    aside: str | None
    bytes: int
    sha256: str

    @property
    def is_there(self) -> bool:
        path = Path(self.path)
        try:
            return path.stat().st_size == self.bytes and _sha256(path) == self.sha256
        except OSError:
            return False


def publish_together(files: Sequence[UnnamedFile], journal: Path | None = None) -> list[Written]:
    """Give sealed files their names, one right after another; if one cannot have it, none has.

    Files that are replaced are kept aside until all are there. journal: a file that outlives a killed process, from
    which recover() undoes what was begun. Raises what a publish() raises, after the others were taken back;
    OutputError if that fails; ValueError if a file is not sealed.
    """
    outputs = [_planned(file) for file in files]
    if journal is not None:
        _write_journal(journal, outputs)
    try:
        for file, output in zip(files, outputs, strict=True):
            if output.aside is not None:
                with file.explained():
                    _set_aside(file.path, Path(output.aside))
            file.publish()
    except BaseException as error:
        published = {output.path for file, output in zip(files, outputs, strict=True) if file.has_its_name}
        for file in files:
            with contextlib.suppress(OSError):
                file.abort()
        _undo(outputs, published, error)
        _remove(journal)
        raise
    _finish(outputs)
    _remove(journal)
    return [file.sealed for file in files if file.sealed is not None]


def recover(journal: Path) -> bool | None:
    """After a killed process: True if all its files are there as they should be, False if those that were have been
    taken away again and what they replaced is back; None if it had not begun. Whoever calls it sees to it that nobody
    is publishing. OutputError if a file cannot be taken away or put back.
    """
    try:
        outputs = [_Output(**entry) for entry in json.loads(journal.read_text(encoding="utf-8"))["outputs"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    published = {output.path for output in outputs if output.is_there}
    complete = len(published) == len(outputs)
    if complete:
        _finish(outputs)
    else:
        _undo(outputs, published, None)
    _remove(journal)
    return complete


def _planned(file: UnnamedFile) -> _Output:
    if file.sealed is None:
        raise ValueError(f"{file.path.name} was not sealed")
    path, aside = file.path.absolute(), None
    if file.overwrite and os.path.lexists(path):
        aside = str(path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{_OLD}"))
    return _Output(str(path), str(file.spare.absolute()), aside, file.sealed.bytes, file.sealed.sha256)


def _write_journal(journal: Path, outputs: list[_Output]) -> None:
    text = json.dumps({"outputs": [asdict(output) for output in outputs]}, ensure_ascii=False, indent=1)
    with TextWriter(journal, text, overwrite=True) as file:
        file.seal()
        file.publish()


def _set_aside(path: Path, aside: Path) -> None:
    """By a second name, so that the file is at no moment without its own; Windows could not remove that one again
    while a program has the file open."""
    if not _WINDOWS:
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(path, aside)
            return
    path.rename(aside)


def _undo(outputs: list[_Output], published: set[str], error: BaseException | None) -> None:
    failed: dict[str, str] = {}
    for output in reversed(outputs):
        try:
            _undo_one(output, output.path in published)
        except OSError as problem:
            failed[output.path] = problem.strerror or str(problem)
    for folder in {Path(output.path).parent for output in outputs}:
        sync_folder(folder)
    if failed:
        raise OutputError(
            f"{', '.join(Path(path).name for path in failed)} could not be put back as before.",
            f"{next(iter(failed.values()))}." + (f" It was to be, because: {error}" if error is not None else ""),
            "The next run with this name tries again. Close programs that have these files open.",
        ) from error


def _undo_one(output: _Output, published: bool) -> None:
    path, aside = Path(output.path), None if output.aside is None else Path(output.aside)
    if published:
        if aside is not None and os.path.lexists(aside):
            aside.replace(path)
        else:
            path.unlink(missing_ok=True)
    elif aside is not None and os.path.lexists(aside):
        if os.path.lexists(path):  # the old file by its second name, or what somebody put there since
            aside.unlink()
        else:
            aside.rename(path)
    Path(output.spare).unlink(missing_ok=True)


def _finish(outputs: list[_Output]) -> None:
    for output in outputs:
        for name in (output.aside, output.spare):
            if name is not None:
                with contextlib.suppress(OSError):
                    Path(name).unlink()


def _remove(journal: Path | None) -> None:
    if journal is not None:
        with contextlib.suppress(OSError):
            journal.unlink()
        sync_folder(journal.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
