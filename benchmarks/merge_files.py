"""A full-width checkpoint of random weights and a LoRA for all of its layers. Made once, then kept.

python benchmarks/merge_files.py TABLE.json FOLDER RANK
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from lib_hypermerge import synthetic
from lib_hypermerge.adapters import lora
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import LORA_KINDS


def main(table_path: str, folder_path: str, rank: str) -> None:
    folder = Path(folder_path)
    folder.mkdir(parents=True, exist_ok=True)
    table = {key: tuple(shape) for key, shape in json.loads(Path(table_path).read_text()).items()}
    checkpoint, spare = synthetic.write_pair(folder, table, lambda _key, weight, _generator: weight.flatten()[:0])
    spare.unlink()
    checkpoint.rename(folder / "checkpoint.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    with open_tensors(folder / "checkpoint.safetensors") as file:
        for component in recognise(file).components.values():
            for module in component.values():
                if module.kind in LORA_KINDS and module.name and module.weight:
                    tensors |= _factors(module.name, module.weight.shape, int(rank), len(tensors))
    save_file(tensors, folder / f"lora{rank}.safetensors", {"ss_network_module": "networks.lora"})


def _factors(name: str, shape: tuple[int, ...], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A change of about 5 % of what a weight of that size is."""
    n, k = shape[0], torch.Size(shape[1:]).numel()
    rank = min(rank, n, k)
    generator = torch.Generator().manual_seed(seed)
    strength = (0.05 * 0.7 / k**0.5 / rank**0.5) ** 0.5
    up, down = (torch.randn(size, generator=generator) * strength for size in ((n, rank), (rank, k)))
    return dict(lora.tensors(name, up.half(), down.half(), shape))


if __name__ == "__main__":
    main(*sys.argv[1:])
