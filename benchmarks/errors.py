"""How far LoRA files are above the optimal truncation of the same rank, in float64.

python benchmarks/errors.py BASE TUNED LAYERS.json THREADS all|shapes LORA…  → one JSON object

The optimum of a layer is Σ σ_i² over i > r, its σ² the eigenvalues of ΔW·ΔWᵀ in float64. On one layer of each
distinct shape they are checked against torch.linalg.svdvals. The error is ‖ΔW − (alpha/r)·up·down‖² of the
factors as they stand in the file.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

_CHECKED = 1280 * 1280  # elements; larger matrices' singular values are not computed a second time


def main(base_path: str, tuned_path: str, layers_path: str, threads: str, which: str, *loras: str) -> None:
    torch.set_num_threads(int(threads))
    layers = json.loads(Path(layers_path).read_text())
    excess: dict[str, list[tuple[float, str]]] = {lora: [] for lora in loras}
    seen: Counter[tuple[int, ...]] = Counter()
    full_rank, worst_check = 0, 0.0
    with safe_open(base_path, "pt") as base, safe_open(tuned_path, "pt") as tuned:
        files = {lora: safe_open(lora, "pt").__enter__() for lora in loras}
        for layer in layers:
            seen[tuple(layer["shape"])] += 1
            first = seen[tuple(layer["shape"])] == 1
            if which == "shapes" and not first and math.prod(layer["shape"]) > _CHECKED // 4:
                continue
            dW = rows(tuned, layer["tuned"]).sub_(rows(base, layer["base"]))
            square = squares(dW)
            if first and dW.numel() <= _CHECKED:
                worst_check = max(worst_check, _disagreement(square, dW))
            rank = None
            for lora, file in files.items():
                up, down, rank = factors(file, layer["name"])
                optimum = float(square[rank:].sum())
                if rank < len(square):
                    error = float(torch.linalg.vector_norm(torch.addmm(dW, up, down, alpha=-1))) ** 2
                    excess[lora].append((math.sqrt(error / optimum) - 1, layer["name"]))
            full_rank += rank == len(square)
    out = {lora: _figures(found) for lora, found in excess.items()}
    count = len(next(iter(excess.values())))
    print(json.dumps({"layers": count, "full_rank": full_rank, "svd_disagrees_by": worst_check, "files": out}))


def rows(file, place: tuple[str, int, int]) -> torch.Tensor:
    name, start, stop = place
    return file.get_slice(name)[start:stop].double().flatten(1)


def squares(dW: torch.Tensor) -> torch.Tensor:
    """σ², descending."""
    A = dW if dW.shape[0] <= dW.shape[1] else dW.mT
    return torch.linalg.eigvalsh(A @ A.mT).flip(0).clamp_min(0)


def _disagreement(square: torch.Tensor, dW: torch.Tensor) -> float:
    """The greatest relative difference of a tail sum of σ² from that of a real SVD."""
    tails = [s.flip(0).cumsum(0) for s in (square, torch.linalg.svdvals(dW).square())]
    half = len(square) // 2  # the last directions hold next to nothing
    return float(((tails[0] - tails[1]).abs() / tails[1])[half:].max())


def factors(file, name: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(up·alpha/r, down, r) in float64."""
    up, down = (file.get_tensor(f"{name}.lora_{side}.weight").double().flatten(1) for side in ("up", "down"))
    return up * (float(file.get_tensor(f"{name}.alpha")) / len(down)), down, len(down)


def _figures(found: list[tuple[float, str]]) -> dict:
    worst, name = max(found)
    return {"median": statistics.median(e for e, _ in found), "worst": worst, "worst_layer": name}


if __name__ == "__main__":
    main(*sys.argv[1:])
