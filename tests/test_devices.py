"""Where a job computes: what a device refuses is done on the CPU, and what a processor can do is no luck."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import base_weights, lora_deltas, rank_change, save_pair, tuned_weights

from lib_hypermerge.algebra import processor
from lib_hypermerge.errors import DeviceError
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs import devices
from lib_hypermerge.jobs import extract as job
from lib_hypermerge.jobs.difference import Difference
from lib_hypermerge.jobs.extract_spec import ExtractSpec
from lib_hypermerge.jobs.host import Context

# --- running out of memory ----------------------------------------------------------------------------------

OUT_OF_MEMORY = (
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
)
OTHERS = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_is_recognised(error):
    assert devices.is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_failures_are_not_taken_for_it(error):
    assert not devices.is_out_of_memory(error)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    base = base_weights("sd15", 64)
    tuned = tuned_weights(base, rank_change(12), seed=3)
    return save_pair(tmp_path_factory.mktemp("pair"), base, tuned)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Call it with a function that may raise for a tensor: "cuda" is then there, and its memory is the CPU's."""
    real = Difference.load

    def install(failing=lambda tuned: None) -> list[str]:
        loaded = []

        def load_on(self, device, tuned, base, n):
            assert device == "cuda"
            failing(tuned)
            loaded.append(tuned.name)
            matrix = real(self, tuned, base, "cpu")
            return type(matrix)(matrix.A.clone(), matrix.energy)

        monkeypatch.setattr(Difference, "_load_on", load_on)
        monkeypatch.setattr(job, "resolve_device", lambda asked, preferred="auto": asked)
        return loaded

    return install


def run(pair, out: Path, device: str, **more):
    values = {"base": str(pair[0]), "tuned": str(pair[1]), "out": str(out), "device": device, "rank": 4, **more}
    spec = ExtractSpec.from_json(values)
    with job.make_plan(spec, PathHost()) as plan:
        return job.run(plan, PathHost(), Context())


@pytest.fixture
def no_bf16(monkeypatch):
    """The CPU computes as a device does, in float32."""
    monkeypatch.setattr("lib_hypermerge.algebra.svd.native_bf16", lambda: False)


@pytest.mark.parametrize("error", OUT_OF_MEMORY[::3], ids=["cuda", "cublas"])
def test_layers_that_do_not_fit_are_computed_on_the_cpu(tmp_path, pair, fake_cuda, error, no_bf16):
    def failing(tuned):
        if "attn1" in tuned.name:
            raise error

    loaded = fake_cuda(failing)
    report = run(pair, tmp_path / "device", "cuda")
    fallen = report.modules - len(loaded)
    assert 0 < fallen < report.modules
    assert f"{fallen} layers were computed on the CPU: the device ran out of memory." in report.warnings
    on_cpu = run(pair, tmp_path / "cpu", "cpu")
    ours, expected = (lora_deltas(tmp_path / f"{name}.safetensors") for name in ("device", "cpu"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(delta, expected[name]) for name, delta in ours.items() if "attn1" in name)
    assert report.relative_error == pytest.approx(on_cpu.relative_error, rel=1e-4)
    assert not any("out of memory" in warning for warning in on_cpu.warnings)


@pytest.mark.parametrize("rule", [{}, {"rank_rule": "size", "rank_target": 1.0}], ids=["fixed", "size"])
def test_if_nothing_fits_the_file_is_that_of_the_cpu(tmp_path, pair, fake_cuda, rule, no_bf16):
    def failing(tuned):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    fake_cuda(failing)
    report = run(pair, tmp_path / "device", "cuda", **rule)
    run(pair, tmp_path / "cpu", "cpu", **rule)
    assert any(str(report.modules) in w and "ran out of memory" in w for w in report.warnings)
    ours, expected = (lora_deltas(tmp_path / f"{name}.safetensors") for name in ("device", "cpu"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(delta, expected[name]) for name, delta in ours.items())


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_any_other_failure_ends_the_job_and_leaves_nothing(tmp_path, pair, fake_cuda, error):
    def failing(tuned):
        if "middle_block" in tuned.name:
            raise error

    fake_cuda(failing)
    with pytest.raises(RuntimeError) as caught:
        run(pair, tmp_path / "device", "cuda")
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [{}, {"method": "exact"}, {"method": "randomised", "rank": 8}, {"rank_rule": "energy", "rank_target": 0.9}],
    ids=str,
)
def test_a_device_computes_what_the_cpu_does(tmp_path, pair, fake_cuda, more):
    loaded = fake_cuda()
    report = run(pair, tmp_path / "device", "cuda", **more)
    assert len(loaded) == report.modules
    on_cpu = run(pair, tmp_path / "cpu", "cpu", **more)
    assert (report.modules, report.details["device"]) == (on_cpu.modules, "cuda")
    assert report.relative_error == pytest.approx(on_cpu.relative_error, rel=2e-3)
    for component, part in on_cpu.details["components"].items():
        found = report.details["components"][component]
        assert found["relative_error"] == pytest.approx(part["relative_error"], rel=5e-3)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.resolve_device("auto") == devices.resolve_device("auto", "cpu") == "cpu"
    for wanted in ("cuda", "cuda:1", "mps"):
        with pytest.raises(DeviceError, match=f"no {wanted[:4].rstrip(':')}"):
            devices.resolve_device(wanted)


# --- what a processor can do --------------------------------------------------------------------------------


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A processor: its lines in /proc/cpuinfo, and what torch says of it."""

    def install(cpuinfo: str | None, kernels: bool | None = True, **torch_says):
        path = tmp_path / "cpuinfo"
        if cpuinfo is not None:
            path.write_text(cpuinfo)
        monkeypatch.setattr(processor, "_CPUINFO", path)
        mkldnn = SimpleNamespace() if kernels is None else SimpleNamespace(_is_mkldnn_bf16_supported=lambda: kernels)
        checks = SimpleNamespace(**{name: lambda said=said: said for name, said in torch_says.items()})
        monkeypatch.setattr(processor, "torch", SimpleNamespace(ops=SimpleNamespace(mkldnn=mkldnn), cpu=checks))

    return install


X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512f{}\n"


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "kernels", "torch_says", "native"),
    [
        ("x86_64", X86.format(""), True, {}, False),  # AVX-512 alone: torch emulates
        ("x86_64", X86.format(" avx512_bf16"), True, {}, True),
        ("x86_64", X86.format(" amx_bf16 amx_tile"), True, {}, True),
        ("x86_64", X86.format(" avx512_bf16"), False, {}, False),
        ("x86_64", X86.format(" avx512_bf16"), None, {}, False),
        ("amd64", None, True, {}, False),  # Windows with an old torch: unknown
        ("amd64", None, True, {"_is_avx512_bf16_supported": True}, True),
        ("amd64", None, True, {"_is_avx512_bf16_supported": False, "_is_amx_tile_supported": True}, True),
        ("amd64", None, True, {"_is_avx512_bf16_supported": False}, False),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\n", True, {}, True),
        ("aarch64", "processor\t: 0\nFeatures\t: fp asimd\n", True, {}, False),
        ("arm64", None, True, {}, False),
        ("riscv64", "isa : rv64\n", True, {}, False),
    ],
)
def test_bf16_by_what_the_processor_says(pretend, machine, cpuinfo, kernels, torch_says, native):
    pretend(cpuinfo, kernels, **torch_says)
    assert processor._decide(machine) is native  # noqa: SLF001


def test_no_clock_decides(monkeypatch):
    answers = set()
    for step in (0.0, 1.0, -1.0):
        ticks = iter(range(10**6))
        monkeypatch.setattr("time.perf_counter", lambda step=step, ticks=ticks: step * next(ticks))
        processor.native_bf16.cache_clear()
        answers.add(processor.native_bf16())
    assert len(answers) == 1


# --- the forecast's stopwatch -------------------------------------------------------------------------------


def test_slowness_is_kept_for_a_while_and_plausible(monkeypatch):
    now, readings = [1000.0], iter([3.0, 0.0, 1e9])
    monkeypatch.setattr(devices, "_measured", None)
    monkeypatch.setattr(devices, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(devices, "_stopwatch", lambda: next(readings))
    found = []
    for later in (0, 500, 200, 700):
        now[0] += later
        found.append(devices.slowness())
    assert found == [3.0, 3.0, 0.1, 100.0]


def test_the_stopwatch_reads_something(monkeypatch):
    monkeypatch.setattr(devices, "_measured", None)
    assert 0.1 <= devices.slowness() <= 100
