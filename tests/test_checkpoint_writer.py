"""A checkpoint whose header is written first: whole, hashed as it lies on the disk, or not there at all."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import BusyError, OutputError
from lib_hypermerge.files import checkpoint_writer
from lib_hypermerge.files.checkpoint_writer import CheckpointWriter, TensorPlan
from lib_hypermerge.files.opening import open_tensors

PLANS = {"a": TensorPlan("F16", (3, 4)), "b": TensorPlan("I64", (2,)), "empty": TensorPlan("F32", (0, 5))}


@pytest.fixture
def source(tmp_path):
    tensors = {"a": torch.randn(3, 4).half(), "b": torch.tensor([1, 2]), "empty": torch.zeros(0, 5)}
    path = tmp_path / "source.safetensors"
    save_file(tensors, path)
    return path, tensors


def fill(writer, path):
    with open_tensors(path) as file:
        for name in PLANS:
            writer.copy(name, file, file.tensors[name])


def test_it_is_what_the_library_reads_and_its_hash(tmp_path, source):
    path, tensors = source
    target = tmp_path / "out.safetensors"
    with CheckpointWriter(target, PLANS, {"note": "ä" * 5}, overwrite=False) as writer:
        fill(writer, path)
        written = writer.commit()
    content = target.read_bytes()
    assert (written.bytes, written.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    loaded = load_file(target)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with open_tensors(target) as file:
        assert list(file.tensors) == list(PLANS) and file.metadata == {"note": "ä" * 5}
        assert min(info.offset for info in file.tensors.values()) % 8 == 0


def test_large_tensors_are_copied_in_pieces_and_strided_ones_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_writer, "_PIECE", 7)
    monkeypatch.setattr(checkpoint_writer, "_FLUSH_EVERY", 50)
    strided = torch.arange(12.0).reshape(3, 4).t()
    torch.save({"a": torch.arange(100), "s": strided}, tmp_path / "m.ckpt")
    plans = {"a": TensorPlan("I64", (100,)), "s": TensorPlan("F32", (4, 3))}
    target = tmp_path / "o.safetensors"
    with open_tensors(tmp_path / "m.ckpt") as file, CheckpointWriter(target, plans, {}, overwrite=False) as writer:
        for name in plans:
            writer.copy(name, file, file.tensors[name])
        written = writer.commit()
    loaded = load_file(target)
    assert torch.equal(loaded["a"], torch.arange(100)) and torch.equal(loaded["s"], strided)
    assert written.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()


@pytest.mark.parametrize("wrong", ["missing", "order", "shape", "format"])
def test_what_differs_from_the_header_is_never_published(tmp_path, wrong):
    target = tmp_path / "out.safetensors"
    tensors = {"a": torch.zeros(3, 4).half(), "b": torch.tensor([1, 2]), "empty": torch.zeros(0, 5)}
    if wrong == "missing":
        del tensors["empty"]
    elif wrong == "order":
        tensors = dict(reversed(tensors.items()))
    elif wrong == "shape":
        tensors["a"] = torch.zeros(4, 3).half()
    else:
        tensors["a"] = torch.zeros(3, 4).bfloat16()
    with pytest.raises(ValueError, match="header"), CheckpointWriter(target, PLANS, {}, overwrite=False) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.commit()
    assert list(tmp_path.iterdir()) == []


def test_leaving_early_leaves_nothing(tmp_path, source):
    before = set(tmp_path.iterdir())
    target = tmp_path / "out.safetensors"
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(target, PLANS, {}, overwrite=False) as writer:
        writer.add("a", torch.zeros(3, 4).half())
        raise KeyboardInterrupt
    assert set(tmp_path.iterdir()) == before


def test_a_file_that_appeared_meanwhile_stays(tmp_path, source):
    target = tmp_path / "out.safetensors"
    with pytest.raises(BusyError), CheckpointWriter(target, PLANS, {}, overwrite=False) as writer:
        fill(writer, source[0])
        target.write_bytes(b"somebody else's")
        writer.commit()
    assert target.read_bytes() == b"somebody else's"


def test_a_full_disk_is_told(tmp_path, source, monkeypatch):
    def full(_fd, _data):
        raise OSError(28, "No space left on device")

    target = tmp_path / "out.safetensors"
    with pytest.raises(OutputError, match="full"), CheckpointWriter(target, PLANS, {}, overwrite=False) as writer:
        monkeypatch.setattr(checkpoint_writer.os, "write", full)
        fill(writer, source[0])
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_failing_hash_fails_the_file(tmp_path, source):
    with pytest.raises(TypeError), CheckpointWriter(tmp_path / "o.safetensors", PLANS, {}, overwrite=False) as writer:
        writer._whole = None  # noqa: SLF001 - whatever goes wrong in the thread must be heard
        fill(writer, source[0])
        try:
            writer.commit()
        except AttributeError as error:
            raise TypeError from error
    assert not (tmp_path / "o.safetensors").exists()
