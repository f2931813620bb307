"""Full-width checkpoints of one family: shared directions of decaying spectra, and a part of each one's own.

python benchmarks/families.py TABLE.json FOLDER COUNT      writes FOLDER/m0.safetensors …; what is there is kept
"""

from __future__ import annotations

import json
import sys
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch

from lib_hypermerge.files.writer import SafetensorsWriter, header_bytes
from lib_hypermerge.synthetic import random_weight

SHARED = (1.0, 0.7, 0.5, 0.35)  # strengths of the directions that all models share
_OWN = 0.6  # of what a model has alone
_AT_ONCE = 4  # models that are written in one go over the table


def path_of(folder: Path, model: int) -> Path:
    return folder / f"m{model}.safetensors"


def multipliers(model: int) -> torch.Tensor:
    """λ of the shared directions."""
    return torch.randn(len(SHARED), generator=torch.Generator().manual_seed(9000 + model))


def write(folder: Path, table: dict[str, tuple[int, ...]], models: list[int]) -> None:
    """model = base + Σ λ_i D_i + own. All share what is drawn for a tensor; a model's part is drawn from its number."""
    entries = {k: {"dtype": "F16", "shape": list(s), "data_offsets": [10**12, 10**12]} for k, s in table.items()}
    reserve = len(header_bytes(entries, {"format": "pt"}))
    with ExitStack() as stack:
        writers = [stack.enter_context(SafetensorsWriter(path_of(folder, m), reserve)) for m in models]
        for index, (key, shape) in enumerate(sorted(table.items())):
            generator = torch.Generator().manual_seed(index)
            weight = random_weight(key, shape, generator)
            change = _Change(key, weight, generator)
            for model, writer in zip(models, writers, strict=True):
                tuned = change.applied(model, torch.Generator().manual_seed(index + 100_003 * (1 + model)))
                writer.add(key, tuned if tuned.dtype == torch.int64 else tuned.half())
        for writer in writers:
            writer.commit(lambda *_: {"format": "pt"})


class _Change:
    """How the models differ in one tensor: σ_j ∝ j^−p over 256 directions for what is shared and for what is a
    model's own, and a floor of noise.

    p: 0.4…1.2.  floor: 3…30 % of the own part's norm.  strength: 2…8 % of the weight's norm. By a hash of the key.
    """

    def __init__(self, key: str, weight: torch.Tensor, generator: torch.Generator):
        self.weight = weight
        self.vector = weight.dim() == 1 and weight.dtype != torch.int64
        self.matrix = weight.dim() > 1 and "first_stage" not in key and "embedding" not in key
        if self.matrix:
            dice = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            p, floor, strength = torch.rand(3, generator=dice).tolist()
            flat = weight.flatten(1)
            self.spectrum = torch.arange(1, min(256, *flat.shape) + 1).float() ** -(0.4 + 0.8 * p)
            self.floor, self.strength = 0.03 * 10**floor, 0.02 * 4**strength * float(flat.norm())
            self.shared = [self._direction(flat.shape, generator) * share for share in SHARED]

    def _direction(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        n, k = shape
        U = torch.randn(n, len(self.spectrum), generator=generator) * self.spectrum
        D = U @ torch.randn(len(self.spectrum), k, generator=generator)
        return D.div_(D.norm())

    def applied(self, model: int, generator: torch.Generator) -> torch.Tensor:
        if self.vector:
            return self.weight + 0.01 * torch.randn(self.weight.shape, generator=generator)
        if not self.matrix:
            return self.weight
        flat = self.weight.flatten(1)
        change = self._direction(flat.shape, generator)
        noise = torch.randn(flat.shape, generator=generator)
        change.add_(noise, alpha=self.floor / float(noise.norm())).mul_(_OWN)
        for D, multiplier in zip(self.shared, multipliers(model).tolist(), strict=True):
            change.add_(D, alpha=multiplier)
        return (flat + self.strength * change).reshape(self.weight.shape)


def main(table_path: str, folder_path: str, count: str) -> None:
    folder = Path(folder_path)
    folder.mkdir(parents=True, exist_ok=True)
    table = {key: tuple(shape) for key, shape in json.loads(Path(table_path).read_text()).items()}
    missing = [model for model in range(int(count)) if not path_of(folder, model).exists()]
    for start in range(0, len(missing), _AT_ONCE):
        write(folder, table, missing[start : start + _AT_ONCE])


if __name__ == "__main__":
    main(*sys.argv[1:])
