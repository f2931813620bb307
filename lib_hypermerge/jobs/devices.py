"""Where a job computes, and about how long that takes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ..errors import DeviceError

T = TypeVar("T")

# MPS and most CUDA libraries raise a plain RuntimeError
_OUT_OF_MEMORY = re.compile(
    r"out of memory|(CUBLAS|CUSOLVER|CUDNN|CUFFT|CUSPARSE|HIPBLAS|ROCBLAS|HIPSOLVER)_STATUS_(ALLOC_FAILED|MEMORY_ERROR)"
    r"|(cuda|hip)Error(MemoryAllocation|OutOfMemory)",
    re.IGNORECASE,
)
_MEASURED_FOR = 600  # seconds: what else the machine does changes
_PLAUSIBLE = (0.1, 100.0)  # outside it is the clock that was wrong

_measured: tuple[float, float] | None = None  # (when, slowness)


def resolve_device(asked: str, preferred: str = "auto") -> str:
    """A torch device for auto, cpu, cuda or mps. DeviceError if it is not there."""
    wanted = preferred if asked == "auto" else asked
    has_mps = torch.backends.mps.is_available()
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    kind = wanted.split(":")[0]
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": has_mps}.get(kind, False)
    if not present:
        raise DeviceError(f"There is no {kind} device here.", "torch does not see one.", "Choose auto or cpu.")
    return wanted


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or a library on it, ran out of memory."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def release(device: str) -> None:
    """Give cached device memory back to the rest of the process."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    elif device == "mps":
        torch.mps.empty_cache()


def on_device(device: str, work: Callable[[str, bool], T]) -> T:
    """work(device, False); should the device run out of memory, work("cpu", True)."""
    try:
        return work(device, False)
    except RuntimeError as error:
        if device == "cpu" or not is_out_of_memory(error):
            raise
    release(device)
    return work("cpu", True)


@contextlib.contextmanager
def whole_float32() -> Iterator[None]:
    """Products in float32 with all its digits: a WebUI may have allowed its graphics card to use ten of 23 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def slowness() -> float:
    """How much slower one core here multiplies than the core that the cost constants were measured on.

    Good for forecasts only. Measured anew after ten minutes: the first time may have been a busy moment.
    """
    global _measured
    now = time.monotonic()
    if _measured is None or now - _measured[0] > _MEASURED_FOR:
        _measured = now, min(max(_stopwatch(), _PLAUSIBLE[0]), _PLAUSIBLE[1])
    return _measured[1]


def _stopwatch() -> float:
    A, B = torch.randn(512, 2048), torch.randn(2048, 64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(A, B)
        best = min(best, time.perf_counter() - start)
    return best * torch.get_num_threads() / (2 * 512 * 2048 * 64 / 68e9)
