"""The naive way: both checkpoints loaded whole, a full SVD of each layer's difference.

python benchmarks/naive.py BASE TUNED LAYERS.json THREADS [DEVICE]  → one JSON object

Loading and subtracting are timed over all layers; the SVD once per distinct shape (small ones twice, the
lesser counts), to be multiplied by how many layers have it.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file

_SMALL = 2.0  # seconds; quicker SVDs are timed twice


def difference(tuned: dict[str, torch.Tensor], base: dict[str, torch.Tensor], layer: dict) -> torch.Tensor:
    """A layer's change as a float32 matrix."""
    (t, t0, t1), (b, b0, b1) = layer["tuned"], layer["base"]
    return (tuned[t][t0:t1].float() - base[b][b0:b1].float()).flatten(1)


def main(base_path: str, tuned_path: str, layers_path: str, threads: str, device: str = "cpu") -> None:
    torch.set_num_threads(int(threads))
    layers = json.loads(Path(layers_path).read_text())
    start = time.perf_counter()
    base, tuned = load_file(base_path), load_file(tuned_path)
    by_shape: dict[tuple[int, int], list[dict]] = defaultdict(list)
    for layer in layers:
        dW = difference(tuned, base, layer)
        by_shape[dW.shape[0], dW.shape[1]].append(layer)
    seconds = time.perf_counter() - start
    shapes = []
    for shape, same in by_shape.items():
        dW = difference(tuned, base, same[0]).to(device)
        # torch's default, which the public scripts use, makes the square factor of the long side whole as well
        full, thin = _best(dW, full_matrices=True), _best(dW, full_matrices=False)
        shapes.append({"shape": shape, "count": len(same), "full": full, "thin": thin})
        print(shape, len(same), full, thin, file=sys.stderr, flush=True)
    print(json.dumps({"seconds": seconds, "shapes": shapes, "torch": torch.__version__}))


def _best(dW: torch.Tensor, full_matrices: bool) -> float:
    """Seconds of one SVD, the lesser of two if it is quick."""
    timings = []
    while not timings or (len(timings) < 2 and timings[0] < _SMALL):
        start = time.perf_counter()
        torch.linalg.svd(dW, full_matrices=full_matrices)[1].cpu()  # waits for a device to be done
        timings.append(time.perf_counter() - start)
    return min(timings)


if __name__ == "__main__":
    main(*sys.argv[1:])
