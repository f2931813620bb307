"""A full-width pair of checkpoints with decaying spectra, and the list of its layers. Made once, then kept.

python benchmarks/pairs.py TABLE.json FOLDER
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

from lib_hypermerge import synthetic
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.extract import ExtractSpec, make_plan
from lib_hypermerge.layouts.module import CONV


def tune(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """σ_i ∝ i^−p over 256 directions and a floor of noise, of another p, floor and strength in each layer.

    p: 0.4…1.2.  floor: 3…50 % of the change's norm.  strength: 2…8 % of the weight's.  As different as in
    real fine-tunes, but the same in every run.
    """
    dice = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    p, floor, strength = torch.rand(3, generator=dice).tolist()
    shape_it = synthetic.decaying(
        power=0.4 + 0.8 * p, directions=256, strength=0.02 * 4**strength, tail=0.03 * (0.5 / 0.03) ** floor
    )
    return shape_it(key, weight, generator)


def layers(base: Path, tuned: Path) -> list[dict[str, Any]]:
    """What extract would decompose: name in the LoRA, (tensor, first row, last row) in each file, matrix shape."""
    values = {"base": str(base), "tuned": str(tuned), "out": str(base.with_name("never-written")), "rank": 1}
    with make_plan(ExtractSpec.from_json(values), PathHost()) as plan:
        return [
            {
                "name": pair.tuned.name,
                "tuned": _rows(plan.tuned.file, pair.tuned.weight),
                "base": _rows(plan.base.file, pair.base.weight),
                "shape": list(pair.tuned.matrix_shape),
                "conv": pair.tuned.kind == CONV,
            }
            for pair in plan.layers
        ]


def _rows(file: Any, info: Any) -> tuple[str, int, int]:
    whole = file.tensors[info.name]
    row = whole.nbytes // whole.shape[0]
    start = (info.offset - whole.offset) // row
    return info.name, start, start + info.shape[0]


def main(table_path: str, folder_path: str) -> None:
    folder = Path(folder_path)
    folder.mkdir(parents=True, exist_ok=True)
    table = {key: tuple(shape) for key, shape in json.loads(Path(table_path).read_text()).items()}
    base, tuned = synthetic.write_pair(folder, table, tune)
    # written last: its presence says that the pair is complete
    (folder / "layers.json").write_text(json.dumps(layers(base, tuned)))


if __name__ == "__main__":
    main(*sys.argv[1:])
