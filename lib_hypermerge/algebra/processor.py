"""What this machine's processor can do. Decided by what it says of itself, never by a stopwatch: equal runs of one
machine must give equal files, however busy it is."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

from ..lazy import torch

_CPUINFO = Path("/proc/cpuinfo")
_X86 = ("x86_64", "amd64")
_X86_FLAGS = {"avx512_bf16", "amx_bf16"}
_X86_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch.cpu, in newer versions
_ARM = ("aarch64", "arm64")


@lru_cache(maxsize=1)
def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; elsewhere bf16 products are slower. False if unknown.

    torch's own check is not enough: it is true on every processor with AVX-512, and without the bf16
    instructions these products are emulated.
    """
    return _decide(platform.machine().lower())


def _decide(machine: str) -> bool:
    has_kernels = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    if has_kernels is None or not has_kernels():
        return False
    if machine in _X86:
        checks = [check for name in _X86_CHECKS if (check := getattr(torch.cpu, name, None))]
        return any(check() for check in checks) or bool(_X86_FLAGS & _flags())
    return machine in _ARM and "bf16" in _flags()


def _flags() -> set[str]:
    """The instruction sets that Linux lists of the first core; none elsewhere."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86 and arm64
            return set(value.split())
    return set()
