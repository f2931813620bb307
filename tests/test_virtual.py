"""Several files of tensors as one: whatever is joined, turned or cut reads as torch would make it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib_hypermerge.errors import FormatError
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.files.virtual import Piece, VirtualFile


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Matrices of 0 to 4 rows and 3 columns in two files, a .safetensors and a .pt whose matrices are transposed."""
    folder = tmp_path_factory.mktemp("stored")
    plain = {f"p{rows}": torch.arange(100.0, 100 + 3 * rows).reshape(rows, 3) for rows in range(5)}
    turned = {f"t{rows}": torch.arange(3.0 * rows).reshape(3, rows).t() for rows in range(5)}
    save_file(plain, folder / "plain.safetensors", {"format": "pt", "only": "here"})
    torch.save(turned, folder / "turned.pt")
    files = open_tensors(folder / "plain.safetensors"), open_tensors(folder / "turned.pt")
    yield {**plain, **turned}, files
    for file in files:
        file.close()


def piece(files, name: str) -> Piece:
    file = files[name.startswith("t")]
    return Piece(file, file.tensors[name])


names = st.lists(st.sampled_from([f"p{rows}" for rows in range(5)]), min_size=1, max_size=4)


@settings(derandomize=True, deadline=None)
@given(tables=st.lists(st.tuples(names, st.booleans()), min_size=1, max_size=5))
def test_rows_of_several_tensors_in_one(stored, tables):
    tensors, files = stored
    whole, expected = VirtualFile(files[0].path, files), {}
    for index, (joined, turn) in enumerate(tables):
        key = f"k{index}"
        if turn:
            name = joined[0].replace("p", "t") if index % 2 else joined[0]
            whole.add_transposed(key, piece(files, name))
            expected[key] = tensors[name].t()
        else:
            whole.add(key, [piece(files, name) for name in joined])
            expected[key] = torch.cat([tensors[name] for name in joined])
    for key, value in expected.items():
        info = whole.tensors[key]
        assert info.name == key and info.shape == tuple(value.shape) and torch.equal(whole.read(info), value)
        for start in range(len(value) + 1):
            assert torch.equal(whole.read(info.rows(start, len(value))), value[start:])


def test_the_halves_of_the_rows_change_places(stored):
    tensors, files = stored
    whole = VirtualFile(files[0].path, files)
    source = piece(files, "p4")
    whole.add("swapped", [source.rows(2, 4), source.rows(0, 2)])
    assert torch.equal(whole.read(whole.tensors["swapped"]), tensors["p4"][[2, 3, 0, 1]])


def test_axes_of_size_one_are_added(stored):
    tensors, files = stored
    whole = VirtualFile(files[0].path, files)
    for name in ("p2", "t2"):
        whole.add(name, [piece(files, name)], (2, 3, 1, 1))
        assert torch.equal(whole.read(whole.tensors[name]), tensors[name][:, :, None, None])


def test_a_pickle_in_another_order_is_read_but_not_joined(stored):
    tensors, files = stored
    whole = VirtualFile(files[0].path, files)
    whole.add("one", [piece(files, "t3")])
    assert torch.equal(whole.read(whole.tensors["one"]), tensors["t3"])
    with pytest.raises(FormatError, match="unusual order"):
        whole.add("two", [piece(files, "p3"), piece(files, "t3")])


def test_what_all_parts_say_and_how_large_they_are(stored):
    _, files = stored
    assert VirtualFile(files[0].path, files[:1]).metadata == {"format": "pt", "only": "here"}
    both = VirtualFile(files[0].path, files)
    assert both.metadata == {} and both.size == sum(file.size for file in files) and both.parts == files


def test_reading_past_the_end(stored):
    _, files = stored
    whole = VirtualFile(files[0].path, files)
    whole.add("one", [piece(files, "p1")])
    with pytest.raises(FormatError, match="ends too early"):
        whole.read_into(whole.tensors["one"].offset, memoryview(bytearray(13)))
