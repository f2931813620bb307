"""The main job on small models made on the spot, checked and explained: python -m lib_hypermerge.demo."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import synthetic
from .files.opening import open_tensors
from .files.source import TensorFile
from .hosts.standalone import PathHost
from .jobs.host import Context
from .jobs.pairing import pair
from .jobs.runner import execute
from .jobs.verbs import VERBS
from .layouts import tables
from .layouts.detect import recognise
from .render import as_text, mib, percent

_RANK = 4
_FOLDER = Path(__file__).resolve().parents[1] / "demo"


def main(arguments: list[str] | None = None) -> int:
    """Make two checkpoints, extract, apply the LoRA to the base again, compare. Exit code 1 if it is not close."""
    parser = argparse.ArgumentParser(
        prog="start.py demo", description="Extract a LoRA from two small models made here."
    )
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where the files go")
    folder: Path = parser.parse_args(arguments).folder
    folder.mkdir(parents=True, exist_ok=True)

    table = tables.narrow(tables.shapes("sd15"))
    base, tuned = synthetic.write_pair(folder, table, synthetic.low_rank(_RANK))
    print(f"Two narrow SD1.5 checkpoints with true key names, {len(table)} tensors, {mib(base.stat().st_size)} each;")
    print(f"the second differs by a change of rank {_RANK} in every layer.\n")

    lora = folder / "demo-lora.safetensors"
    verb = VERBS["extract"]
    spec = verb.spec.from_json(
        {"base": str(base), "tuned": str(tuned), "out": str(lora), "rank": _RANK, "overwrite": True}
    )
    print(as_text(execute(verb, spec, PathHost(), Context())))

    error = reconstruction_error(base, tuned, lora)
    close = error < 0.01
    print(f"\nbase + LoRA against the fine-tune, from the files: {percent(error)} of the change is missed.", end=" ")
    print("That is fp16 rounding: the LoRA reproduces the fine-tune." if close else "That is too much.")
    print(f"Files: {folder}")
    return 0 if close else 1


def reconstruction_error(base: Path, tuned: Path, lora: Path) -> float:
    """‖tuned − base − alpha/rank·up·down‖ / ‖tuned − base‖ over all layers, read back from the files."""
    with open_tensors(base) as base_file, open_tensors(tuned) as tuned_file, open_tensors(lora) as lora_file:
        models = recognise(base_file), recognise(tuned_file)
        missed = whole = 0.0
        for layer in pair(*models, models[0].components).layers:
            assert layer.tuned.weight is not None and layer.base.weight is not None
            change = tuned_file.read(layer.tuned.weight).double() - base_file.read(layer.base.weight).double()
            change = change.flatten(1)
            missed += float((change - _delta(lora_file, f"{layer.tuned.name}")).square().sum())
            whole += float(change.square().sum())
    return (missed / whole) ** 0.5


def _delta(file: TensorFile, name: str) -> torch.Tensor:
    up, down, alpha = (
        file.read(file.tensors[f"{name}.{part}"]).double() for part in ("lora_up.weight", "lora_down.weight", "alpha")
    )
    return float(alpha) / down.shape[0] * (up.flatten(1) @ down.flatten(1))


if __name__ == "__main__":
    sys.exit(main())
