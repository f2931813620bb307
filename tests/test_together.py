"""Several files appear all or none, and after a kill as well once the next run has looked."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from killing import die, killed
from models import listing
from safetensors.torch import load_file

from lib_hypermerge.errors import BusyError, OutputError
from lib_hypermerge.files import together, unnamed
from lib_hypermerge.files.checkpoint_writer import CheckpointWriter, TensorPlan
from lib_hypermerge.files.together import publish_together, recover
from lib_hypermerge.files.unnamed import TextWriter, UnnamedFile
from lib_hypermerge.files.writer import SafetensorsWriter

NAMES = ("model.safetensors", "model-1.safetensors", "model.hypermerge.json")


@pytest.fixture(params=["nameless", "part", "no_hard_links", "windows"])
def kind(request, monkeypatch) -> str:
    """Linux's nameless file, the part file of other systems, and a file system or a system without hard links."""
    if request.param != "nameless":
        monkeypatch.delattr(os, "O_TMPFILE")
    if request.param in ("no_hard_links", "windows"):

        def refuse(*_, **__):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    if request.param == "windows":
        monkeypatch.setattr(unnamed, "_WINDOWS", True)
        monkeypatch.setattr(together, "_WINDOWS", True)
        monkeypatch.setattr(Path, "rename", renaming_as_windows)
    return request.param


def renaming_as_windows(path: Path, target: Path) -> Path:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(target))
    return path.replace(target)


def sealed(folder: Path, overwrite: bool = False) -> list[UnnamedFile]:
    """A checkpoint, a LoRA and a recipe, complete but for their names."""
    tensor = torch.arange(6.0)
    checkpoint = CheckpointWriter(folder / NAMES[0], {"a": TensorPlan("F32", (6,))}, {}, overwrite)
    checkpoint.add("a", tensor)
    checkpoint.seal()
    lora = SafetensorsWriter(folder / NAMES[1], 500, overwrite)
    lora.add("a", tensor)
    lora.seal(lambda *_: {})
    text = TextWriter(folder / NAMES[2], "{“ä”}\n", overwrite)
    text.seal()
    return [checkpoint, lora, text]


def close(files):
    for file in files:
        file.abort()


def old_ones(folder: Path, names=NAMES) -> dict[str, bytes]:
    for name in names:
        (folder / name).write_bytes(b"old " + name.encode())
    return listing(folder)


def check_new(folder: Path) -> None:
    assert listing(folder).keys() == set(NAMES)
    assert all(torch.equal(load_file(folder / name)["a"], torch.arange(6.0)) for name in NAMES[:2])
    assert (folder / NAMES[2]).read_bytes() == "{“ä”}\n".encode()


@pytest.mark.parametrize("older", [(), NAMES[1:2], NAMES])
def test_all_appear(tmp_path, kind, older):
    old_ones(tmp_path, older)
    files = sealed(tmp_path, overwrite=bool(older))
    written = publish_together(files, tmp_path / "journal")
    check_new(tmp_path)
    for one in written:
        content = one.path.read_bytes()
        assert (one.bytes, one.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    close(files)
    check_new(tmp_path)
    assert recover(tmp_path / "journal") is None


def test_a_file_that_was_not_sealed(tmp_path, kind):
    with TextWriter(tmp_path / "a.txt", "x") as file:
        for publish in (file.publish, lambda: publish_together([file], tmp_path / "journal")):
            with pytest.raises(ValueError, match="sealed"):
                publish()
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("last", range(3))
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["os", "stop"])
def test_one_that_fails_takes_all_back(tmp_path, kind, last, error, monkeypatch):
    before = old_ones(tmp_path, NAMES[::2])
    files = sealed(tmp_path, overwrite=True)

    def fail(*_):
        raise error

    monkeypatch.setattr(files[last], "_replace_target", fail)
    with pytest.raises((OutputError, KeyboardInterrupt)):
        publish_together(files, tmp_path / "journal")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("last", range(3))
def test_a_name_that_is_taken_meanwhile(tmp_path, kind, last):
    files = sealed(tmp_path)
    (tmp_path / NAMES[last]).write_bytes(b"somebody else's")
    with pytest.raises(BusyError, match="appeared"):
        publish_together(files)
    assert listing(tmp_path) == {NAMES[last]: b"somebody else's"}


def test_an_interruption_just_after_the_name_was_given(tmp_path, kind, monkeypatch):
    before = old_ones(tmp_path)
    files = sealed(tmp_path, overwrite=True)

    def stop(folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(unnamed, "sync_folder", stop)
        publish_together(files)
    assert listing(tmp_path) == before


def test_what_cannot_be_put_back_is_told_and_tried_again(tmp_path, kind, monkeypatch):
    before = old_ones(tmp_path)
    files = sealed(tmp_path, overwrite=True)
    journal = tmp_path / "journal"

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="could not be put back") as caught:
        patch.setattr(files[2], "_replace_target", fail)
        patch.setattr(together, "_undo_one", fail)
        publish_together(files, journal)
    assert "model" in str(caught.value) and "Input/output error" in str(caught.value)
    assert recover(journal) is False
    assert listing(tmp_path) == before


# --- kills ------------------------------------------------------------------------------------------------


def killed_at(folder: Path, overwrite: bool, at: int) -> bool:
    """Publish in a process of its own, killed before its at-th change of the folder; whether it came to that."""
    steps = [0]

    def counted(function):
        def call(*arguments, **options):
            if steps[0] == at:
                die()
            steps[0] += 1
            return function(*arguments, **options)

        return call

    def publish():
        files = sealed(folder, overwrite)
        for owner, name in ((os, "link"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
            setattr(owner, name, counted(getattr(owner, name)))
        publish_together(files, folder / "journal")

    return killed(publish)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_kill_at_any_step_is_undone_or_complete(tmp_path, kind, overwrite):
    seen = set()
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        before = old_ones(folder, NAMES[:2]) if overwrite else {}
        if not killed_at(folder, overwrite, step):
            check_new(folder)
            break
        complete = recover(folder / "journal")
        if complete or complete is None and (folder / NAMES[2]).exists():
            check_new(folder)
        elif complete is None:  # killed before the journal was there: what lies about goes a day later
            left = {name: content for name, content in listing(folder).items() if not name.endswith("-part")}
            assert left == before
        else:
            assert listing(folder) == before
        assert recover(folder / "journal") is None
        seen.add(complete)
    assert seen == {None, False, True} and step >= 5


def test_what_somebody_wrote_since_is_kept(tmp_path):
    assert killed_at(tmp_path, False, 4)
    assert set(NAMES) > listing(tmp_path).keys() - {"journal"} > set()
    (tmp_path / NAMES[1]).write_bytes(b"somebody else's, since")
    assert recover(tmp_path / "journal") is False
    assert listing(tmp_path) == {NAMES[1]: b"somebody else's, since"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"outputs": [{"path": "x"}]}', "\udcff"])
def test_a_journal_that_says_nothing(tmp_path, content):
    (tmp_path / "journal").write_text(content, errors="surrogateescape")
    assert recover(tmp_path / "journal") is None
