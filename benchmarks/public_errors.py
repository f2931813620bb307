"""What LoRA files miss of a change, over all layers, in float64, from the numbers in the files.

python benchmarks/public_errors.py extract BASE TUNED LAYERS.json LORA…   of the difference of two checkpoints
python benchmarks/public_errors.py loras WEIGHT=LORA… LORA…               of a weighted sum of LoRAs

One JSON object: file name → ‖change − LoRA‖ / ‖change‖. Layers that a file lacks count as missed.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from errors import rows
from safetensors import safe_open
from torch import Tensor

_UP = ".lora_up.weight"
Factors = tuple[Tensor, Tensor]


def factors(file, module: str, weight: float = 1.0) -> Factors | None:
    """up (n, r) with weight and alpha / r in it, and down (r, k); None where the file has no such module."""
    names = set(file.keys())
    if f"{module}.lora_up.weight" not in names:
        return None
    up, down = (file.get_tensor(f"{module}.lora_{part}.weight").double().flatten(1) for part in ("up", "down"))
    alpha = float(file.get_tensor(f"{module}.alpha")) if f"{module}.alpha" in names else len(down)
    return weight * alpha / len(down) * up, down


def square(parts: list[Factors]) -> float:
    """‖Σ up·down‖², from the factors' Gram matrices."""
    if not parts:
        return 0.0
    up, down = torch.cat([up for up, _ in parts], 1), torch.cat([down for _, down in parts])
    return float(((up.mT @ up) * (down @ down.mT)).sum())


def of_pair(base: Path, tuned: Path, layers: Path, loras: list[Path]) -> dict[str, float]:
    missed, whole = dict.fromkeys((lora.name for lora in loras), 0.0), 0.0
    with ExitStack() as opened:
        first, second = (opened.enter_context(safe_open(file, "pt")) for file in (base, tuned))
        files = {lora.name: opened.enter_context(safe_open(lora, "pt")) for lora in loras}
        for layer in json.loads(layers.read_text()):
            change = rows(second, layer["tuned"]) - rows(first, layer["base"])
            whole += float(change.square().sum())
            for name, file in files.items():
                found = factors(file, layer["name"])
                rest = change if found is None else torch.addmm(change, *found, alpha=-1)
                missed[name] += float(rest.square().sum())
    return {name: (value / whole) ** 0.5 for name, value in missed.items()}


def of_sum(terms: dict[Path, float], loras: list[Path]) -> dict[str, float]:
    missed, whole = dict.fromkeys((lora.name for lora in loras), 0.0), 0.0
    with ExitStack() as opened:
        sources = [(opened.enter_context(safe_open(file, "pt")), weight) for file, weight in terms.items()]
        files = {lora.name: opened.enter_context(safe_open(lora, "pt")) for lora in loras}
        names = {key for file, _ in sources for key in set(file.keys())}
        for module in sorted(name.removesuffix(_UP) for name in names if name.endswith(_UP)):
            parts = [part for file, weight in sources if (part := factors(file, module, weight)) is not None]
            whole += square(parts)
            for name, file in files.items():
                found = factors(file, module)
                missed[name] += square(parts if found is None else [*parts, (-found[0], found[1])])
    return {name: (max(0.0, value) / whole) ** 0.5 for name, value in missed.items()}


def main(kind: str, *arguments: str) -> None:
    if kind == "extract":
        base, tuned, layers, *loras = map(Path, arguments)
        found = of_pair(base, tuned, layers, loras)
    else:
        terms = {Path(text.partition("=")[2]): float(text.partition("=")[0]) for text in arguments if "=" in text}
        found = of_sum(terms, [Path(text) for text in arguments if "=" not in text])
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
