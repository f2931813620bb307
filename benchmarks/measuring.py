"""Run a program as a process of its own and say how long it took and how much memory it held.

Free of torch on purpose: a child's peak is never below its parent's at the moment it was started.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Run:
    """A finished process.  wall: seconds from start to exit.  peak: MiB resident.  disk: MiB that had to come
    from the disk, next to none with warm files.  result: its last line as JSON."""

    wall: float
    cpu: float
    peak: float
    disk: float
    result: Any


class ChildError(RuntimeError):
    """A process failed; the text holds the end of what it said."""


def run(command: Sequence[str | Path], threads: int) -> Run:
    """Wait for a command with this many CPU threads. Raises ChildError with its last words."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        child = subprocess.Popen([str(part) for part in command], cwd=ROOT, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)  # or its destructor would look for it
        out.seek(0)
        err.seek(0)
        printed = out.read().decode(errors="replace").strip()
        if child.returncode:
            said = (err.read().decode(errors="replace") or printed).strip()[-2000:]
            raise ChildError(f"{' '.join(map(str, command))}\nended with {child.returncode}:\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    peak, disk = usage.ru_maxrss * unit / 2**20, usage.ru_inblock * 512 / 2**20
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, disk, _last_json(printed))


def _last_json(printed: str) -> Any:
    try:
        return json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        return None


def warm(*paths: Path) -> None:
    """Read files, so that the system has them in memory."""
    buffer = bytearray(1 << 24)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, least and every wall time; the highest peak."""
    walls = [r.wall for r in runs]
    return {
        "wall_median": statistics.median(walls),
        "wall_min": min(walls),
        "walls": [round(w, 3) for w in walls],
        "inside_median": statistics.median(r.result["seconds"] for r in runs),
        "cpu_median": statistics.median(r.cpu for r in runs),
        "peak_mib": max(r.peak for r in runs),
        "disk_mib": max(r.disk for r in runs),
    }


def machine() -> dict[str, Any]:
    """What the processor calls itself, how many there are, and how busy they were in the minute before."""
    model, flags = "unknown", ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            elif name.strip() == "flags":
                flags = value
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {"cpu": model, "cores": os.cpu_count(), "has": [f for f in wanted if f in flags.split()],
            "load": round(os.getloadavg()[0], 1)}  # fmt: skip
