"""The container: one file with bases that all models share and small cores of each, from which LoRAs are made.

A safetensors file that ends in .hypermerge, so that no WebUI lists it. Of each module of a LoRA file (kohya's NAME)
it holds NAME.up (n, a), NAME.down (b, k), or (b, c, kh, kw) of a convolution, and NAME.cores (M, a, b): model m
changes the weight by up·cores[m]·down, without a further scale. Header: `hypermerge_container`, JSON of what `Stated`
has, and `hypermerge`, the recipe. A module that is not in the file is one that no model changes by it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ...algebra.factored import LowRank
from ...errors import FormatError, SpecError
from ...files.dtypes import FLOATS
from ...files.metadata import BaseModel
from ...files.opening import open_tensors
from ...files.source import TensorFile
from ...files.writer import header_bytes
from .recipe import Recipe, parse

KEY, VERSION = "hypermerge_container", 1
UP, DOWN, CORES = "up", "down", "cores"


@dataclass(frozen=True)
class Stated:
    """labels: the models, in the order of the cores.  hyper: the file that changes are added to.  base: its family."""

    labels: tuple[str, ...]
    hyper: str
    base: BaseModel

    def text(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False, separators=(",", ":"))


# --- writing -----------------------------------------------------------------------------------------------------


def module_tensors(
    name: str, up: torch.Tensor, down: torch.Tensor, cores: torch.Tensor, weight_shape: tuple[int, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the file holds of one module: up (n, a), down (b, k), cores (M, a, b), all in the file's dtype."""
    yield f"{name}.{UP}", up
    yield f"{name}.{DOWN}", down.reshape(len(down), *weight_shape[1:])
    yield f"{name}.{CORES}", cores


def container_metadata(stated: Stated, recipe: Recipe) -> dict[str, str]:
    """The header's texts."""
    return {"format": "pt", KEY: stated.text(), "hypermerge": recipe.text()}


def header_reserve(names: Sequence[str], metadata: Mapping[str, str]) -> int:
    """An upper bound of the header's size with these modules; metadata no shorter than what will be written."""
    size = 10**6
    entry = {"dtype": "BF16", "shape": [size, size, 99, 99], "data_offsets": [10**12, 10**12]}
    entries = {f"{name}.{part}": entry for name in names for part in (UP, DOWN, CORES)}
    return len(header_bytes(entries, dict(metadata)))


# --- reading -----------------------------------------------------------------------------------------------------


class Container:
    """An open container; use as a context or close() it. modules: name → shape of the weight that it changes."""

    def __init__(self, file: TensorFile):
        self.file = file
        self.stated = _stated(file)
        self.modules: dict[str, tuple[int, ...]] = _modules(file, len(self.stated.labels))

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()

    @property
    def labels(self) -> tuple[str, ...]:
        return self.stated.labels

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return next((info.dtype for info in self.file.tensors.values()), "F16")

    @property
    def recipe(self) -> Recipe:
        """FormatError if the file holds none."""
        return parse(self.file.metadata.get("hypermerge", ""), self.file.path.name)

    def rank(self, name: str, most: int | None = None) -> int:
        """That a LoRA's module can have at most: of the cores, no more than asked for."""
        return min(*self.file.tensors[f"{name}.{CORES}"].shape[1:], most or 1 << 30)

    def change(self, name: str, weights: Mapping[str, float]) -> LowRank:
        """Σ_m weights[m]·(model m's change) of a module: up (n, b) in float64, down (b, k) as stored, flattened.

        weights: {"label": 1.0} is one model, several are a blend.  Raises SpecError for a label that is not there,
        FormatError where numbers are not finite.
        """
        share = self._shares(weights)
        up, down, cores = (self._read(name, part) for part in (UP, DOWN, CORES))
        core = torch.einsum("m,mab->ab", share, cores.double())
        return LowRank(up.double() @ core, down.flatten(1))

    def _shares(self, weights: Mapping[str, float]) -> torch.Tensor:
        unknown = [label for label in weights if label not in self.labels]
        if unknown:
            there = ", ".join(self.labels)
            raise SpecError(f"{self.file.path.name} has no model {unknown[0]!r}.", hint=f"It has: {there}.")
        return torch.tensor([float(weights.get(label, 0.0)) for label in self.labels], dtype=torch.float64)

    def _read(self, name: str, part: str) -> torch.Tensor:
        tensor = self.file.read(self.file.tensors[f"{name}.{part}"])
        if not tensor.isfinite().all():
            raise _broken(self.file, f"{name}.{part} has numbers that are not finite.")
        return tensor


def open_container(path: Path) -> Container:
    """Raises SpecError (no such file) or FormatError (broken, or no container)."""
    file = open_tensors(path)
    try:
        return Container(file)
    except BaseException:
        file.close()
        raise


def _stated(file: TensorFile) -> Stated:
    try:
        table = json.loads(file.metadata[KEY])
        labels = tuple(table["labels"])
        version, base = table["version"], BaseModel(**table["base"])
        if not labels or len({*labels}) < len(labels) or not all(isinstance(item, str) for item in labels):
            raise ValueError
        stated = Stated(labels, str(table["hyper"]), base)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(
            f"{file.path.name} is no container of a hyper-merge.", "Its header does not say what it holds.",
            "Choose the .hypermerge file that Hyper-Merge wrote.",
        ) from None  # fmt: skip
    if version != VERSION:
        raise FormatError(
            f"{file.path.name} is of version {version}, and {VERSION} is known.",
            "A newer Hypermerge wrote it.", "Update Hypermerge.",
        )  # fmt: skip
    return stated


def _modules(file: TensorFile, models: int) -> dict[str, tuple[int, ...]]:
    """Name → weight shape, in the file's order. FormatError unless all are complete and fit together."""
    out = {}
    for key in file.tensors:
        name, _, part = key.rpartition(".")
        if part not in (UP, DOWN, CORES) or not name:
            raise _broken(file, f"The tensor {key!r} is no part of a container.")
        if name in out:
            continue
        parts = [file.tensors.get(f"{name}.{item}") for item in (UP, DOWN, CORES)]
        if None in parts:
            raise _broken(file, f"The module {name} is incomplete.")
        up, down, cores = (item.shape for item in parts if item)
        fits = len(up) == 2 and len(down) in (2, 4) and cores == (models, up[1], down[0])
        if not fits or min(*up, *down) < 1 or not all(item and item.dtype in FLOATS for item in parts):
            raise _broken(file, f"The parts of the module {name} do not fit together.")
        out[name] = (up[0], *down[1:])
    if not out:
        raise _broken(file, "It has no modules.")
    return out


def _broken(file: TensorFile, why: str) -> FormatError:
    return FormatError(f"{file.path.name} is damaged.", why, "Make the container again.")
