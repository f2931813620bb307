"""The safetensors reader agrees with the safetensors library, and says why a broken file is broken."""

import errno
import json
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import FormatError, InputChangedError, SpecError
from lib_hypermerge.files.dtypes import ITEMSIZE, name_of, torch_dtype
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.files.safetensors import SafetensorsFile

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
WHOLE = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
IN_ONE_FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit: NaN and fp8 have no == of use."""
    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def random_tensor(shape, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    return (torch.randn(shape) * 20).to(dtype)


def build(header: object, data: bytes = b"", pad: bytes = b"") -> bytes:
    """A file by hand; header may be an object for JSON, or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text + pad).to_bytes(8, "little") + text + pad + data


def entry(dtype="F32", shape=(2,), start=0, stop=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", FLOATS + WHOLE, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (4, 0, 2), (1, 1, 1, 1), (7,)], ids=str)
def test_reads_what_the_library_wrote(tmp_path, dtype, shape):
    path = tmp_path / "m.safetensors"
    tensors = {"one": random_tensor(shape, dtype), "two": random_tensor((2, 3), torch.float16)}
    save_file(tensors, path)
    with open_tensors(path) as file:
        assert file.tensors.keys() == tensors.keys()
        assert file.tensors["one"].nbytes == math.prod(shape) * ITEMSIZE[name_of(dtype)]
        for name, tensor in tensors.items():
            assert same(file.read(file.tensors[name]), tensor)


def test_metadata_and_header_padding(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(2)}, path, {"who": "ünïcode", "what": ""})
    with open_tensors(path) as file:
        assert file.metadata == {"who": "ünïcode", "what": ""}
    path.write_bytes(build({"a": entry()}, bytes(8), pad=b" " * 1000))
    with open_tensors(path) as file:
        assert file.metadata == {}
        assert file.read(file.tensors["a"]).tolist() == [0, 0]


def test_rows_of_a_fused_weight(tmp_path):
    path = tmp_path / "m.safetensors"
    weight = torch.randn(9, 4)
    save_file({"in_proj": weight}, path)
    with open_tensors(path) as file:
        assert torch.equal(file.read(file.tensors["in_proj"].rows(3, 6)), weight[3:6])


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@IN_ONE_FOLDER
@given(table=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(FLOATS + WHOLE)), max_size=6))
def test_any_table_reads_as_the_library_reads_it(tmp_path, table):
    path = tmp_path / "m.safetensors"
    save_file({name: random_tensor(shape, dtype) for name, (shape, dtype) in table.items()}, path)
    expected = load_file(path)
    with open_tensors(path) as file:
        assert {n: (i.shape, torch_dtype(i.dtype)) for n, i in file.tensors.items()} == table
        assert all(same(file.read(info), expected[name]) for name, info in file.tensors.items())


BROKEN = {
    "empty": (b"", "empty"),
    "three_bytes": (b"abc", "shorter than a header"),
    "garbage": (bytes(range(256)) * 8, "claims a length"),
    "header_of_2_60": ((1 << 60).to_bytes(8, "little") + b"{}", "claims a length"),
    "header_over_the_limit": ((100_000_001).to_bytes(8, "little") + b"{}", "claims a length"),
    "header_of_0": (bytes(8), "claims a length"),
    "header_behind_the_end": ((500).to_bytes(8, "little") + b'{"a":', "truncated"),
    "web_page": (b"<!DOCTYPE html><html>not found</html>", "claims a length"),
    "not_json": (build(b"{not json}"), "not JSON"),
    "not_utf8": (build(b'{"\xff": 1}'), "not JSON"),
    "nested_deeply": (build(b'{"a":' + b"[" * 500_000), "not JSON"),
    "number_of_5000_digits": (build(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "json_list": (build([1, 2]), "not a JSON object"),
    "entry_no_object": (build({"a": 1}), "malformed"),
    "entry_incomplete": (build({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "malformed"),
    "shape_no_list": (build({"a": entry() | {"shape": 2}}, bytes(8)), "malformed"),
    "shape_of_texts": (build({"a": entry(shape="22")}, bytes(8)), "malformed"),
    "shape_negative": (build({"a": entry(shape=(-1, -2))}, bytes(8)), "malformed"),
    "shape_true": (build({"a": entry(shape=(True, 2))}, bytes(8)), "malformed"),
    "shape_fraction": (build({"a": entry(shape=(2.0,))}, bytes(8)), "malformed"),
    "shape_beyond_torch": (build({"a": entry(shape=(0, 1 << 62, 1 << 62), stop=0)}), "malformed"),
    "shape_of_100_axes": (build({"a": entry(shape=(1,) * 100, stop=4)}, bytes(4)), "malformed"),
    "three_offsets": (build({"a": entry() | {"data_offsets": [0, 8, 9]}}, bytes(8)), "malformed"),
    "offsets_backwards": (build({"a": entry(start=8, stop=0)}, bytes(8)), "does not fit"),
    "offset_negative": (build({"a": entry(start=-8, stop=0)}, bytes(8)), "malformed"),
    "dtype_no_text": (build({"a": entry(dtype=["F32"])}, bytes(8)), "malformed"),
    "dtype_unknown": (build({"a": entry(dtype="F7")}, bytes(8)), "unknown number format 'F7'"),
    "size_mismatch": (build({"a": entry(shape=(3,))}, bytes(8)), "does not fit its shape"),
    "overlap": (build({"a": entry(), "b": entry(start=4, stop=12)}, bytes(12)), "overlaps"),
    "gap": (build({"a": entry(), "b": entry(start=12, stop=20)}, bytes(20)), "gap"),
    "gap_at_start": (build({"a": entry(start=4, stop=12)}, bytes(12)), "gap"),
    "truncated": (build({"a": entry()}, bytes(7)), "truncated"),
    "trailing": (build({"a": entry()}, bytes(9)), "1 bytes follow"),
    "metadata_number": (build({"__metadata__": {"n": 1}, "a": entry()}, bytes(8)), "metadata"),
    "metadata_list": (build({"__metadata__": [], "a": entry()}, bytes(8)), "metadata"),
    "metadata_text": (build({"__metadata__": "", "a": entry()}, bytes(8)), "metadata"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_the_reason(tmp_path, case):
    content, why = BROKEN[case]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_tensors(path)
    assert "broken.safetensors" in caught.value.what
    assert why in caught.value.why
    assert caught.value.hint


def test_a_missing_file_and_a_folder_are_the_requests_fault(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(SpecError, match=path.name):
            open_tensors(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "m.safetensors"
    tensors = {"unet.weight": torch.randn(4, 6), "unet.bias": torch.ones(4).half(), "empty": torch.zeros(0, 3)}
    save_file(tensors, path, {"format": "pt"})
    return path.read_bytes()


@settings(IN_ONE_FOLDER, max_examples=400)
@given(data=st.data())
def test_damage_gives_a_format_error_or_a_reading(tmp_path, sound, data):
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except FormatError as error:
        assert "damaged.safetensors" in str(error)
        return
    with file:
        for info in file.tensors.values():
            assert file.read(info).shape == info.shape
    with safe_open(path, "pt") as library:  # what we accept, the library accepts
        assert set(library.keys()) == set(file.tensors)


def test_a_file_cut_off_after_opening_is_told_as_changed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(1000)}, path)
    with open_tensors(path) as file:
        os.truncate(path, 1000)
        with pytest.raises(InputChangedError, match="m.safetensors"):
            file.read(file.tensors["a"])


def test_a_failing_disk_is_told(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.randn(4)}, path)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with open_tensors(path) as file:
        monkeypatch.setattr(SafetensorsFile, "_read_some", fail)
        with pytest.raises(FormatError, match=r"m\.safetensors cannot be read\. Input/output error"):
            file.read(file.tensors["a"])


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.3, torch.float64), (0.3, torch.float32), (0.3, torch.float16), (0.3, torch.bfloat16), (-2.5, torch.bfloat16),
        (0.5, torch.float8_e4m3fn), (-7, torch.int64), (-7, torch.int32), (-7, torch.int16), (-7, torch.int8),
        (200, torch.uint8), (True, torch.bool),
    ],
)  # fmt: skip
def test_one_number_is_what_the_tensor_holds(tmp_path, value, dtype):
    for shape in ((), (1,), (1, 1)):
        tensor = torch.tensor(value).to(dtype).reshape(shape)
        save_file({"before": torch.ones(3), "one": tensor.contiguous()}, tmp_path / "m.safetensors")
        with SafetensorsFile(tmp_path / "m.safetensors") as file:
            assert file.number(file.tensors["one"]) == float(tensor.double().item())
