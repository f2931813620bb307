"""The writer: a sound file with true hashes under its name, or nothing at all."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import listing
from safetensors import safe_open
from safetensors.torch import load_file

from lib_hypermerge.errors import BusyError, OutputError, SpecError
from lib_hypermerge.files import unnamed
from lib_hypermerge.files.metadata import with_hashes
from lib_hypermerge.files.writer import SafetensorsWriter, check_target

TENSORS = {
    "half": torch.randn(5, 7).half(), "bf16": torch.randn(3, 1, 2).bfloat16(),
    "fp8": torch.ones(4).to(torch.float8_e5m2), "scalar": torch.tensor(4.0), "empty": torch.zeros(0, 3),
    "whole": torch.arange(6).reshape(2, 3),
    "flags": torch.tensor([True, False]), "transposed": torch.randn(4, 6).t(),
}  # fmt: skip


@pytest.fixture(params=["nameless", "part"])
def kind(request, monkeypatch) -> str:
    """Linux's nameless file, and the .hypermerge-part file of other systems."""
    if request.param == "part":
        monkeypatch.delattr(os, "O_TMPFILE")
    return request.param


def write(path: Path, tensors=TENSORS, reserve: int = 4096, overwrite: bool = False, metadata=lambda *_: {}):
    with SafetensorsWriter(path, reserve, overwrite) as opened:
        for name, tensor in tensors.items():
            opened.add(name, tensor)
        return opened.commit(metadata)


def data_section(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_the_library_reads_what_was_written(tmp_path, kind):
    path = tmp_path / "out.safetensors"
    written = write(path, metadata=lambda *_: {"who": "ünïcode"})
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"who": "ünïcode"}
    assert written.path == path
    assert written.bytes == path.stat().st_size
    assert listing(tmp_path).keys() == {"out.safetensors"}


@pytest.mark.parametrize("reserve", [1500, 1501, 1507, 100_000])
def test_the_header_fills_what_was_reserved(tmp_path, reserve):
    path = tmp_path / "out.safetensors"
    write(path, reserve=reserve)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    assert reserve <= length < reserve + 8
    assert content[8:9] == b"{"
    assert json.loads(content[8 : 8 + length]).keys() == {"__metadata__", *TENSORS}
    assert load_file(path).keys() == TENSORS.keys()


@pytest.mark.parametrize("numbers", [10, 300_000, 900_000], ids=["tiny", "behind_1_mib", "sample_is_full"])
def test_hashes_are_those_of_the_final_file(tmp_path, kind, numbers):
    path = tmp_path / "out.safetensors"
    written = write(path, {"a": torch.randn(numbers)}, metadata=lambda data, legacy: with_hashes({}, data, legacy))
    content = path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["sshs_model_hash"] == hashlib.sha256(data_section(content)).hexdigest() == written.data_sha256
    sample = content[0x100000 : 0x100000 + 0x10000]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(sample).hexdigest()[:8]
    assert written.sha256 == hashlib.sha256(content).hexdigest()


def test_a_header_that_reaches_into_the_legacy_sample_leaves_its_hash_out(tmp_path, kind):
    seen = []
    for reserve in (0x100000 - 8, 0x100000 + 8):
        target = tmp_path / f"{reserve}.safetensors"
        write(target, reserve=reserve, metadata=lambda data, legacy: seen.append(legacy) or {})
        assert load_file(target).keys() == TENSORS.keys()
    assert len(seen[0]) == 8 and seen[1] == ""


def test_equal_input_gives_equal_bytes(tmp_path):
    assert write(tmp_path / "a.safetensors").sha256 == write(tmp_path / "b.safetensors").sha256


def test_a_header_beyond_the_reserve_leaves_nothing(tmp_path, kind):
    with pytest.raises(ValueError, match="reserved"):
        write(tmp_path / "out.safetensors", reserve=100)
    assert listing(tmp_path) == {}


def test_a_name_twice_leaves_nothing(tmp_path, kind):
    with SafetensorsWriter(tmp_path / "out.safetensors", 1000) as writer:
        writer.add("a", torch.ones(2))
        with pytest.raises(ValueError, match="twice"):
            writer.add("a", torch.ones(2))
    assert listing(tmp_path) == {}


def test_before_commit_the_folder_shows_no_file_of_that_name(tmp_path, kind):
    with SafetensorsWriter(tmp_path / "out.safetensors", 1000) as writer:
        writer.add("a", torch.ones(1000))
        names = list(listing(tmp_path))
        assert len(names) == (0 if kind == "nameless" else 1)
        assert all(name.startswith(".") and name.endswith(".hypermerge-part") for name in names)
    assert listing(tmp_path) == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_the_folder_as_it_was(tmp_path, kind, overwrite):
    target = tmp_path / "out.safetensors"
    if overwrite:
        target.write_bytes(b"older")
    before = listing(tmp_path)

    def failing(*_):
        raise RuntimeError("no metadata")

    with pytest.raises(RuntimeError):
        write(target, overwrite=overwrite, metadata=failing)
    assert listing(tmp_path) == before


def test_a_failing_rename_keeps_the_older_file(tmp_path, kind, monkeypatch):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"older")

    def failing(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OutputError, match="Permission denied"):
        write(target, overwrite=True)
    assert listing(tmp_path) == {"out.safetensors": b"older"}


def test_overwriting_replaces_when_asked(tmp_path, kind):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"older")
    write(target, overwrite=True)
    assert load_file(target).keys() == TENSORS.keys()
    assert listing(tmp_path).keys() == {"out.safetensors"}


@pytest.mark.parametrize("links", [True, False], ids=["hard_links", "no_hard_links"])
def test_a_target_that_appears_meanwhile_is_kept(tmp_path, kind, links, monkeypatch):
    target = tmp_path / "out.safetensors"
    if not links and kind == "part":

        def refuse(*_, **__):
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(BusyError, match=r"out\.safetensors appeared"), SafetensorsWriter(target, 1000) as writer:
        writer.add("a", torch.ones(2))
        target.write_bytes(b"somebody else's")
        writer.commit(lambda *_: {})
    assert listing(tmp_path) == {"out.safetensors": b"somebody else's"}


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "out.safetensors")
    assert listing(tmp_path).keys() == {"out.safetensors"}


def test_a_file_system_without_nameless_files(tmp_path, monkeypatch):
    real_open = os.open

    def refusing(path, flags, *more, **options):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    with SafetensorsWriter(tmp_path / "out.safetensors", 1000) as writer:
        assert len(listing(tmp_path)) == 1
        writer.add("a", torch.ones(2))
        writer.commit(lambda *_: {})
    assert listing(tmp_path).keys() == {"out.safetensors"}


def test_stale_parts_go_and_fresh_ones_stay(tmp_path):
    stale, fresh, other = (tmp_path / n for n in (".a-1.hypermerge-part", ".b-2.hypermerge-part", ".c.part"))
    for path in (stale, fresh, other):
        path.write_bytes(b"x")
    two_days_ago = time.time() - 2 * 24 * 3600
    for path in (stale, other):
        os.utime(path, (two_days_ago, two_days_ago))
    write(tmp_path / "out.safetensors")
    assert listing(tmp_path).keys() == {"out.safetensors", fresh.name, other.name}


@pytest.mark.parametrize("room", [0, 1000, 50_000])
def test_a_full_disk_leaves_nothing(tmp_path, kind, monkeypatch, room):
    real_write, left = os.write, [room]

    def filling(fd, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = min(len(data), left[0])
        left[0] -= count
        return real_write(fd, data[:count])

    monkeypatch.setattr(os, "write", filling)
    with pytest.raises(OutputError) as caught:
        write(tmp_path / "out.safetensors", {"a": torch.randn(12_000)})  # 48,000 bytes, then the header
    assert "The disk is full" in str(caught.value)
    assert "out.safetensors" in str(caught.value)
    assert listing(tmp_path) == {}


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:7]))
    write(tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["half"], TENSORS["half"])


@pytest.fixture
def read_only_folder():
    """A folder this process may enter and not write to, even where the tests run as root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.setresuid(65534, 65534, 0)
        try:
            yield folder
        finally:
            if is_root:
                os.setresuid(0, 0, 0)
            folder.chmod(0o755)


def test_a_read_only_folder_is_told_before_and_while_writing(read_only_folder):
    target = read_only_folder / "out.safetensors"
    with pytest.raises(OutputError, match="cannot be written to"):
        check_target(target, 0, False)
    with pytest.raises(OutputError, match="Permission denied"):
        SafetensorsWriter(target, 100)
    assert list(read_only_folder.iterdir()) == []


def test_targets_that_are_refused_beforehand(tmp_path):
    (tmp_path / "there.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    for name, why in [
        ("out.ckpt", "must end in"),
        ("absent/out.safetensors", "There is no folder"),
        ("folder.safetensors", "is a folder"),
        ("there.safetensors", "exists already"),
        ("there.safetensors/out.safetensors", "There is no folder"),
    ]:
        with pytest.raises(SpecError, match=why):
            check_target(tmp_path / name, 0, False)
    check_target(tmp_path / "there.safetensors", 0, True)


def test_too_little_space_is_told_beforehand(tmp_path):
    with pytest.raises(OutputError) as caught:
        check_target(tmp_path / "out.safetensors", 1 << 60, False)
    assert "1,099,511,627,776 MiB" in str(caught.value)
    assert "are free" in str(caught.value)


def test_a_folder_on_no_disk(tmp_path, monkeypatch):
    """As /proc is, which tells of no space at all; a disk that tells nothing may take files all the same."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=0, used=0, free=0))
    check_target(tmp_path / "out.safetensors", 1 << 20, False)
    assert list(tmp_path.iterdir()) == []

    def refuse(**_):
        raise OSError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        check_target(tmp_path / "out.safetensors", 1 << 20, False)
    assert "too full" not in str(caught.value)


# --- Windows, whose renames neither replace a file nor touch one that is open --------------------------------


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    monkeypatch.setattr(unnamed, "_WINDOWS", True)


def test_on_windows_a_target_that_appears_meanwhile_is_kept(tmp_path, windows, monkeypatch):
    target = tmp_path / "out.safetensors"

    def rename(_part, to):
        raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", str(to))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(BusyError, match=r"out\.safetensors appeared"), SafetensorsWriter(target, 1000) as opened:
        opened.add("a", torch.ones(2))
        target.write_bytes(b"somebody else's")
        opened.commit(lambda *_: {})
    assert listing(tmp_path) == {"out.safetensors": b"somebody else's"}


def test_on_windows_a_target_in_use_is_said_to_be(tmp_path, windows, monkeypatch):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"older")

    def replace(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="in use") as caught:
        write(target, overwrite=True)
    assert "loaded" in caught.value.why and "folder" not in caught.value.hint
    assert listing(tmp_path) == {"out.safetensors": b"older"}


def test_on_windows_the_file_appears_under_its_name(tmp_path, windows):
    for _ in range(2):
        write(tmp_path / "out.safetensors", overwrite=True)
    write(tmp_path / "new.safetensors")
    assert listing(tmp_path).keys() == {"out.safetensors", "new.safetensors"}
