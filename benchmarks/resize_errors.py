"""How far a resized LoRA is from the best of its rank, module by module, in float64 and by other means than the job's.

python benchmarks/resize_errors.py BEFORE AFTER RANK

Of up·down the singular values are those of R_up·R_downᵀ, both from a QR; of a difference of two such products, the
norm is that of the same for the factors side by side.
"""

from __future__ import annotations

import json
import statistics
import sys

import numpy as np
from safetensors import safe_open


def main(arguments: list[str]) -> int:
    before, after, rank = arguments[0], arguments[1], int(arguments[2])
    found, best2, error2 = [], 0.0, 0.0
    with safe_open(before, "np") as old, safe_open(after, "np") as new:
        for name in [key.removesuffix(".lora_down.weight") for key in old.keys() if key.endswith(".lora_down.weight")]:  # noqa: SIM118 - no mapping
            up, down = _factors(old, name)
            less_up, less_down = _factors(new, name)
            S = np.linalg.svd(_r(up) @ _r(down.T).T, compute_uv=False)
            optimum = float(np.square(S[rank:]).sum())
            left, right = _r(np.hstack((up, less_up))), _r(np.hstack((down.T, -less_down.T)))
            own = float(np.square(left @ right.T).sum())
            best2, error2 = best2 + optimum, error2 + own
            found.append((own / optimum) ** 0.5 - 1)
    print(json.dumps({"modules": len(found), "whole": (error2 / best2) ** 0.5 - 1,
                      "median": statistics.median(found), "worst": max(found)}))  # fmt: skip
    return 0


def _factors(file, name: str) -> tuple[np.ndarray, np.ndarray]:
    down, up = (file.get_tensor(f"{name}.lora_{side}.weight").astype(np.float64) for side in ("down", "up"))
    rank = len(down)
    return up.reshape(-1, rank) * float(file.get_tensor(f"{name}.alpha")) / rank, down.reshape(rank, -1)


def _r(X: np.ndarray) -> np.ndarray:
    return np.linalg.qr(X, mode="r")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
