"""The naive way to resize a LoRA: each module's product formed, and its full SVD cut to the rank.

python benchmarks/resize_naive.py LORA [--rank 32] [--limit 600]   → one JSON object: seconds, projected

Timed once per distinct shape (small ones twice, the lesser counts), and multiplied by how many modules have it. As
torch's default, which the public scripts use, makes the square factor of the long side whole as well, so does this.
What would take longer than the limit is not run but scaled by n·k·min(n, k) from that smaller shape which was the
quickest by this measure: rather too little, as whole factors cost more than that. The last line's `note` says of how
many shapes that is so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open

_SMALL = 2.0  # seconds; quicker ones are timed twice


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    by_shape: dict[tuple[int, int], list[str]] = defaultdict(list)
    start = time.perf_counter()
    with safe_open(options.lora, "pt") as file:
        for key in file.keys():  # noqa: SIM118 - it is no dictionary
            if key.endswith(".lora_down.weight"):
                up, down = _factors(file, key.removesuffix(".lora_down.weight"))
                by_shape[len(up), down.shape[1]].append(key.removesuffix(".lora_down.weight"))
        seconds, rows = time.perf_counter() - start, []
        rate = float("inf")
        for shape, names in sorted(by_shape.items(), key=lambda item: _operations(*item[0])):
            expected = rate * _operations(*shape)
            scaled = options.limit < expected < float("inf")
            each = expected if scaled else _least(*_factors(file, names[0]), options.rank)
            if not scaled:
                rate = min(rate, each / _operations(*shape))
            seconds += each * len(names)
            rows.append({"shape": shape, "count": len(names), "seconds": each, "scaled": scaled})
            print(shape, len(names), f"{each:.2f} s{', scaled' if scaled else ''}", file=sys.stderr, flush=True)
    scaled_ones = [row for row in rows if row["scaled"]]
    note = f", {len(scaled_ones)} of them scaled from a smaller one by n·k·min(n, k)" if scaled_ones else ""
    print(json.dumps({
        "seconds": seconds, "shapes": len(rows), "note": note, "timings": rows, "torch": torch.__version__,
        "measured_share": 1 - sum(row["seconds"] * row["count"] for row in scaled_ones) / seconds,
    }))  # fmt: skip


def _factors(file, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    up, down = (file.get_tensor(f"{name}.lora_{part}.weight").float().flatten(1) for part in ("up", "down"))
    return up * float(file.get_tensor(f"{name}.alpha")) / len(down), down


def _operations(n: int, k: int) -> float:
    return float(n) * k * min(n, k)


def _least(up: torch.Tensor, down: torch.Tensor, rank: int) -> float:
    """Seconds of one module, the lesser of two if it is quick."""
    timings: list[float] = []
    while not timings or (len(timings) < 2 and timings[0] < _SMALL):
        start = time.perf_counter()
        U, S, Vh = torch.linalg.svd(up @ down)
        _ = (U[:, :rank] * S[:rank]).half(), Vh[:rank].half()
        timings.append(time.perf_counter() - start)
    return min(timings)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--rank", type=int, default=32, help="that it is cut to (default: 32)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one SVD may take (default: 600)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
