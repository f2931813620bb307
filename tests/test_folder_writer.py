"""A folder that appears under its name only when it is complete, and replaces only what it may."""

import time
from pathlib import Path

import pytest
from models import listing

from lib_hypermerge.errors import BusyError, OutputError, SpecError
from lib_hypermerge.files import folder_writer
from lib_hypermerge.files.folder_writer import FolderWriter, check_folder_target

MARKS = ("unet",)


def names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def fill(writer: FolderWriter, content: str = "new") -> None:
    writer.folder("unet")
    writer.text("unet/config.json", content)


def old_folder(target: Path) -> Path:
    (target / "unet").mkdir(parents=True)
    (target / "unet" / "config.json").write_text("old")
    (target / "more").write_text("old too")
    return target


def test_nothing_has_the_name_until_commit(tmp_path):
    target = tmp_path / "o"
    with FolderWriter(target) as writer:
        fill(writer)
        assert not target.exists()
        assert writer.commit() == target
    assert listing(tmp_path) == {"o/unet/config.json": b"new"}
    assert names(tmp_path) == ["o"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError])
def test_leaving_without_commit_removes_every_trace(tmp_path, error):
    with pytest.raises(error), FolderWriter(tmp_path / "o") as writer:
        fill(writer)
        raise error("stop")
    assert names(tmp_path) == []


def test_an_old_folder_is_replaced_as_a_whole_when_asked(tmp_path):
    target = old_folder(tmp_path / "o")
    with FolderWriter(target, overwrite=True) as writer:
        fill(writer)
        assert (target / "more").exists()
        writer.commit()
    assert listing(tmp_path) == {"o/unet/config.json": b"new"}
    assert names(tmp_path) == ["o"]


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "o")
    before = listing(tmp_path)
    rename, calls = Path.rename, []

    def fails_the_second_time(self, goal):
        calls.append(goal)
        if len(calls) == 2:
            raise PermissionError(13, "Permission denied")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fails_the_second_time)
    with pytest.raises(OutputError), FolderWriter(target, overwrite=True) as writer:
        fill(writer)
        writer.commit()
    assert len(calls) == 3
    assert listing(tmp_path) == before


def test_a_folder_that_appeared_meanwhile_is_left_alone(tmp_path):
    target = tmp_path / "o"
    with pytest.raises(BusyError), FolderWriter(target) as writer:
        fill(writer)
        old_folder(target)
        writer.commit()
    assert listing(tmp_path) == {"o/unet/config.json": b"old", "o/more": b"old too"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_appeared_meanwhile_is_left_alone(tmp_path, overwrite):
    target = tmp_path / "o"
    with pytest.raises(BusyError), FolderWriter(target, overwrite) as writer:
        fill(writer)
        target.write_text("mine")
        writer.commit()
    assert listing(tmp_path) == {"o": b"mine"}


def test_what_a_killed_process_left_goes_after_a_day(tmp_path, monkeypatch):
    writer = FolderWriter(tmp_path / "o")
    fill(writer)
    FolderWriter(tmp_path / "p").abort()
    assert writer.part.exists()
    now = time.time()
    monkeypatch.setattr(folder_writer.time, "time", lambda: now + 25 * 3600)
    FolderWriter(tmp_path / "p").abort()
    assert names(tmp_path) == []


def test_targets_are_checked_before_anything_is_computed(tmp_path):
    check_folder_target(tmp_path / "o", 1000, False, MARKS)
    target = old_folder(tmp_path / "o")
    with pytest.raises(SpecError, match="exists already"):
        check_folder_target(target, 1000, False, MARKS)
    check_folder_target(target, 1000, True, MARKS)
    with pytest.raises(SpecError, match="no folder"):
        check_folder_target(tmp_path / "none" / "o", 1000, True, MARKS)
    with pytest.raises(OutputError, match="too full"):
        check_folder_target(target, 1 << 62, True, MARKS)


@pytest.mark.parametrize("name", ["thesis.txt", "unets"])
def test_a_folder_of_somebody_elses_files_is_never_replaced(tmp_path, name):
    (tmp_path / "o").mkdir()
    check_folder_target(tmp_path / "o", 1000, True, MARKS)  # an empty one
    (tmp_path / "o" / name).write_text("mine")
    with pytest.raises(SpecError, match="other files"):
        check_folder_target(tmp_path / "o", 1000, True, MARKS)


def test_a_file_or_a_link_is_never_replaced_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    old_folder(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        with pytest.raises(SpecError, match="is no folder"):
            check_folder_target(tmp_path / name, 1000, True, MARKS)
