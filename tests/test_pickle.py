"""torch's pickles are read as torch reads them; one that names anything else is refused and never run."""

import builtins
import collections
import functools
import io
import os
import pathlib
import pickle
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import torch_saves

from lib_hypermerge.errors import FormatError
from lib_hypermerge.files import unpickle
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.files.pickle import PickleFile

NEW, OLD = {}, {"_use_new_zipfile_serialization": False}
BOTH = pytest.mark.parametrize("options", [NEW, OLD], ids=["zip", "legacy"])


def read_all(path: pathlib.Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.read(info) for name, info in file.tensors.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.detach().double()), name


def views() -> dict[str, torch.Tensor]:
    """Tensors that are laid out in every way a checkpoint may hold them."""
    whole = torch.arange(120.0).reshape(2, 3, 4, 5)
    return {
        "plain": whole[0].clone(), "transposed": whole[0, 0].t(), "permuted": whole.permute(3, 1, 0, 2),
        "strided": whole.flatten()[3:100:7], "offset_view": whole[1, 2], "expanded": torch.ones(3, 1).expand(3, 4),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "shares_storage": whole[:, 1],
        "same_again": whole[:, 1], "last_column": whole[..., 4:], "ones": torch.ones(1, 7, 1).transpose(0, 2),
    }  # fmt: skip


@BOTH
def test_layouts_in_memory(tmp_path, options):
    torch.save(views(), tmp_path / "m.ckpt", **options)
    assert_same(read_all(tmp_path / "m.ckpt"), views())


@BOTH
@pytest.mark.parametrize(
    "dtype",
    [dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16,
     torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
     if torch_saves(dtype)],
    ids=str,
)  # fmt: skip
def test_number_formats(tmp_path, options, dtype):
    tensors = {"a": torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 8.0]]).to(dtype), "b": torch.ones(2)}
    torch.save(tensors, tmp_path / "m.pt", **options)
    assert_same(read_all(tmp_path / "m.pt"), tensors)


@BOTH
def test_a_module_s_own_state_dict(tmp_path, options):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "m.pt", **options)
    assert_same(read_all(tmp_path / "m.pt"), dict(module.state_dict()))


@BOTH
def test_parameters_and_tensors_with_attributes(tmp_path, options):
    marked = torch.ones(2)
    marked.note = "mine"
    tensors = {"parameter": torch.nn.Parameter(torch.randn(2, 3)), "marked": marked}
    torch.save(tensors, tmp_path / "m.pt", **options)
    assert_same(read_all(tmp_path / "m.pt"), tensors)


@BOTH
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_what_training_leaves_beside_the_weights_is_looked_past(tmp_path, options, key):
    weights = {f"layer.{i}.weight": torch.randn(2, 2) for i in range(4)}
    beside = {
        "epoch": 3, "global_step": 10**12, "pytorch-lightning_version": "1.4.2", "lr": 1e-4, "flag": None,
        "hyper_parameters": {"betas": (0.9, 0.99), "where": pathlib.PosixPath("a/b"), "dtype": torch.float16},
        "optimizer_states": [{"state": collections.defaultdict(dict, {0: {"step": torch.ones(1)}}), "groups": []}],
        "milestones": collections.Counter([1, 2, 2]), "tags": {"a", "b"}, "frozen": frozenset((1,)), "bytes": b"\0\xff",
        "device": torch.device("cpu"), "size": torch.Size((1, 2)), "span": range(3), "i": 2j,
    }  # fmt: skip
    torch.save({key: weights, **beside}, tmp_path / "m.ckpt", **options)
    assert_same(read_all(tmp_path / "m.ckpt"), weights)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(tmp_path, protocol):
    torch.save({"state_dict": views()}, tmp_path / "m.pt", pickle_protocol=protocol)
    assert_same(read_all(tmp_path / "m.pt"), views())


def test_rows_of_a_transposed_fused_weight(tmp_path):
    stored = torch.randn(4, 9).t()
    torch.save({"in_proj": stored}, tmp_path / "m.pt")
    with open_tensors(tmp_path / "m.pt") as file:
        assert torch.equal(file.read(file.tensors["in_proj"].rows(3, 6)), stored[3:6])


def test_content_counts_and_not_the_suffix(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "really_a_zip.safetensors")
    assert read_all(tmp_path / "really_a_zip.safetensors")["a"].tolist() == [1, 1]


# --- pickles that want more than weights ------------------------------------------------------------------


class Call:
    """Pickles to the call of a function by its name; state, if given, becomes a BUILD."""

    def __init__(self, function, *arguments, state=None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def touch(marker: pathlib.Path) -> str:
    return f"touch {marker}"


def attacks(marker: pathlib.Path) -> dict[str, tuple[object, str]]:
    """name → (what is pickled beside the weights, the import that must be named)."""
    code = f"open({str(marker)!r}, 'w')"
    system = f"{os.name}.system"
    return {
        "os_system": (Call(os.system, touch(marker)), system),
        "eval": (Call(builtins.eval, code), "eval"),
        "exec": (Call(builtins.exec, code), "exec"),
        "import": (Call(builtins.__import__, "this"), "__import__"),
        "getattr": (Call(builtins.getattr, Call(builtins.__import__, "os"), "system"), "getattr"),
        "open": (Call(builtins.open, str(marker), "w"), "open"),
        "nested": (Call(collections.OrderedDict, Call(os.system, touch(marker))), system),
        "torch_load": (Call(torch.load, str(marker)), "torch.serialization.load"),
        "unpickle_again": (Call(pickle.loads, pickle.dumps(Call(os.system, touch(marker)))), "loads"),
        "state": (Call(collections.OrderedDict, state={"x": Call(os.system, touch(marker))}), system),
        "key": ({"deep": [({"a": Call(os.system, touch(marker))},)]}, system),
        "module": (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        "own_class": (pathlib.PurePath, "PurePath"),
    }


@BOTH
@pytest.mark.parametrize("name", attacks(pathlib.Path("marker")))
def test_an_import_is_refused_by_name_and_nothing_runs(tmp_path, options, name):
    marker = tmp_path / "marker"
    evil, imported = attacks(marker)[name]
    sys.modules.pop("this", None)
    torch.save({"state_dict": {"a": torch.ones(2)}, "evil": evil}, tmp_path / "m.ckpt", **options)
    with pytest.raises(FormatError) as caught:
        open_tensors(tmp_path / "m.ckpt")
    assert "m.ckpt was refused: it wants to run code" in caught.value.what
    assert imported in caught.value.why
    assert not marker.exists()
    assert "this" not in sys.modules


def test_the_attacks_are_real(tmp_path):
    """Python's own loader runs what the test above proves harmless here."""
    marker = tmp_path / "marker"
    for name in ("os_system", "eval", "unpickle_again"):
        pickle.loads(pickle.dumps(attacks(marker)[name][0]))
        assert marker.exists()
        marker.unlink()


def zip_of(path: pathlib.Path, program: bytes, storage: bytes = bytes(64)) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", storage)
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"


def tensor_program(start: bytes, shape: bytes, stride: bytes) -> bytes:
    """A pickle {"a": tensor} in opcodes; the arguments are opcodes too."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + start + shape + stride + b"I00\n}tR"
    return b"}X\x01\x00\x00\x00a" + rebuild + b"s."


def number(value: int) -> bytes:
    return b"L%dL\n" % value


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def test_a_tensor_written_by_hand_is_read(tmp_path):
    path = zip_of(tmp_path / "m.ckpt", tensor_program(number(0), numbers(4, 4), numbers(4, 1)))
    assert read_all(path)["a"].shape == (4, 4)


FORGED = {
    "bytearray_of_64_gib": b"\x96" + (1 << 36).to_bytes(8, "little") + b".",
    "bytes_of_2_62": b"\x8e" + (1 << 62).to_bytes(8, "little") + b".",
    "frame_of_2_62": b"\x95" + (1 << 62).to_bytes(8, "little") + b".",
    "extension_registry": b"\x82\x01.",
    "empty": b"",
    "no_stop": b"}",
    "stack_underflow": b"R.",
    "key_that_takes_for_ever_to_hash": b"}(I1\nt" + b"2\x86" * 80 + b"Ns.",
    "key_nested_too_deep": b"}" + b"(I1\nt" + b"\x85" * 200_000 + b"Ns.",
    "storage_of_another_kind": b"(X\x06\x00\x00\x00modulectorch\nFloatStorage\nX\x01\x00\x00\x000Nt\x51.",
    "storage_of_no_known_type": b"(X\x07\x00\x00\x00storageX\x03\x00\x00\x00F99X\x01\x00\x00\x000NNtQ.",
    "tensor_without_storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n))I00\n}tR.",
    "calling_a_number_format": b"ctorch\nFloatStorage\n)R.",
    "stride_negative": tensor_program(number(15), numbers(4), numbers(-1)),
    "shape_negative": tensor_program(number(0), numbers(-4), numbers(1)),
    "start_negative": tensor_program(number(-4), numbers(4), numbers(1)),
    "axes_differ": tensor_program(number(0), numbers(4, 4), numbers(1)),
    "behind_the_storage": tensor_program(number(1), numbers(4, 4), numbers(4, 1)),
    "enormous_by_stride_0": tensor_program(number(0), numbers(1 << 40), numbers(0)),
    "beyond_torch": tensor_program(number(0), numbers(0, 1 << 62, 1 << 62), numbers(1, 1, 1)),
    "shape_of_texts": tensor_program(number(0), b"(X\x01\x00\x00\x00xt", numbers(1)),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_pickle_is_a_broken_file(tmp_path, case):
    path = zip_of(tmp_path / "m.ckpt", FORGED[case])
    with pytest.raises(FormatError, match=r"m\.ckpt is not a sound PyTorch file"):
        open_tensors(path)


def test_a_memo_index_takes_no_memory(tmp_path):
    """Python's decoder in C makes a table as long as the index, here of 64 GiB."""
    path = zip_of(tmp_path / "m.ckpt", b"Nr\xff\xff\xff\xff0" + tensor_program(number(0), numbers(4), numbers(1)))
    assert read_all(path)["a"].shape == (4,)


def test_a_pickle_cannot_alter_the_decoder(tmp_path):
    """BUILD would set attributes of a function, for every later file too."""
    slots = b"(N}X\x07\x00\x00\x00__doc__X\x01\x00\x00\x00xst"
    program = b"ctorch._utils\n_rebuild_tensor_v2\n" + slots + b"b0"
    path = zip_of(tmp_path / "m.ckpt", program + tensor_program(number(0), numbers(4), numbers(1)))
    assert read_all(path)["a"].shape == (4,)
    assert unpickle._rebuild_tensor.__doc__ != "x"


def test_compressed_weights_and_foreign_archives_are_refused(tmp_path):
    path = tmp_path / "m.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_program(number(0), numbers(4, 4), numbers(4, 1)))
        archive.writestr("archive/data/0", bytes(64))
    with pytest.raises(FormatError, match="missing or too short"):
        open_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(FormatError, match=r"no data\.pkl"):
        open_tensors(path)


def test_big_endian_is_told(tmp_path):
    path = zip_of(tmp_path / "m.ckpt", tensor_program(number(0), numbers(4), numbers(1)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(FormatError, match="big-endian"):
        open_tensors(path)


@BOTH
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_file_is_broken(tmp_path, options, keep):
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": {"a": torch.randn(50, 50)}}, path, **options)
    size = path.stat().st_size
    os.truncate(path, keep if isinstance(keep, int) else int(keep * size))
    with pytest.raises(FormatError, match=r"m\.ckpt"):
        open_tensors(path)


@functools.cache
def saved(legacy: bool) -> bytes:
    # Once per run: a legacy file holds the storages' addresses, so that its very length differs from save to save.
    file = io.BytesIO()
    content = {"state_dict": {"a": torch.randn(4, 3), "b": torch.ones(2).half()}, "epoch": 1}
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_gives_a_format_error_or_a_reading(tmp_path, legacy, data):
    content = bytearray(saved(legacy))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.ckpt"
    path.write_bytes(content)
    try:
        file = PickleFile(path)
    except FormatError as error:
        assert "m.ckpt" in str(error)
        return
    with file:
        for info in file.tensors.values():
            assert file.read(info).shape == info.shape
