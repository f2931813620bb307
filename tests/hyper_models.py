"""Models for hyper-merges that do or do not go together, and what is said of them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_samples import SAMPLES, Dice
from models import Weights, base_weights, cast, rank_change, reachable, save_checkpoint, tuned_weights
from safetensors.torch import save_file

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.hyper.inputs import Inputs, open_inputs
from lib_hypermerge.jobs.hyper.spec import HyperSpec

SD1, SD2, XL = "sd15", "sd21", "sdxl"


@functools.cache
def weights(family: str = SD1, seed: int = 0) -> Weights:
    base = base_weights(family, 64)
    return cast(tuned_weights(base, rank_change(2), seed=seed), torch.float16) if seed else cast(base, torch.float16)


@dataclass
class Files:
    """Writes models into a folder of its own."""

    folder: Path

    def model(self, name: str, family: str = SD1, seed: int = 1, without: str = "", texts=None, **more) -> Path:
        """A checkpoint; without: no tensor whose name holds this.  more: tensors by name, None to leave one out."""
        stored = {key: w for key, w in weights(family, seed).items() if not without or without not in key}
        stored = {key: w for key, w in (stored | more).items() if w is not None}
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        if not name.endswith(".safetensors"):
            return save_checkpoint(path, stored)
        save_file({key: w.contiguous() for key, w in stored.items()}, path, texts)
        return path

    def lora(self, name: str, family: str = SD1, kind: str = "lora", only=lambda name: "attn1" in name, texts=None,
             **more) -> Path:  # fmt: skip
        dice, tensors = Dice(0), {}
        for module, size in reached(family):
            if only(module):
                tensors |= {f"{module}.{part}": t for part, t in SAMPLES[kind](size, dice)[0].items()}
        path = self.folder / name
        save_file(tensors | more, path, texts)
        return path

    def two(self, **more) -> list[Path]:
        return [self.model("a.safetensors", seed=1, **more), self.model("b.safetensors", seed=2, **more)]


@functools.cache
def reached(family: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kohya's name, size) of every layer that a LoRA reaches."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(reachable(save_checkpoint(Path(folder) / "m.safetensors", weights(family))))
    return [(name, tuple(weights(family)[key][rows].shape)) for name, key, rows in found]


def opened(models: list[Path], base: Path | None = None, **more) -> Inputs:
    values = {"models": [str(path) for path in models], "name": "h", "ranks": "1", **more}
    return open_inputs(HyperSpec.from_json(values | ({"base": str(base)} if base else {})), PathHost())


def warned(models: list[Path], base: Path | None = None, **more) -> list[str]:
    inputs = opened(models, base, **more)
    inputs.close()
    return inputs.warnings


EMPTY = torch.zeros(0)
V_PRED, EPS = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
