"""What a hyper-merge left, looked at again from its files alone: float64, and the definition of each figure.

python tests/hyper_oracle.py RECIPE.json MODEL… [--base BASE]      prints one JSON object

residual_share = Σ‖model_m − (hyper + Σ_i λ_mi LoRA_i)‖² / Σ‖model_m − centre‖² over all weights that a LoRA reaches;
the centre is the models' mean, or the base. A model's relative error is the root of its own share of either sum.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models import reachable  # noqa: E402

Multipliers = Mapping[str, Mapping[str, float]]


@dataclass
class Judged:
    """errors, wholes: Σ‖model − approximation‖² and Σ‖model − centre‖² of each model and component."""

    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    wholes: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, model: str, component: str, error: float, whole: float) -> None:
        for table, number in ((self.errors, error), (self.wholes, whole)):
            row = table.setdefault(model, {})
            row[component] = row.get(component, 0.0) + number

    @property
    def residual_share(self) -> float:
        return _total(self.errors) / _total(self.wholes)

    @property
    def models(self) -> dict[str, float]:
        return {m: math.sqrt(sum(self.errors[m].values()) / sum(self.wholes[m].values())) for m in self.errors}

    @property
    def components(self) -> dict[str, dict[str, float]]:
        return {
            model: {c: math.sqrt(error / self.wholes[model][c]) for c, error in row.items() if self.wholes[model][c]}
            for model, row in self.errors.items()
        }


def _total(table: dict[str, dict[str, float]]) -> float:
    return math.fsum(number for row in table.values() for number in row.values())


class Weights:
    """The weights of a checkpoint that a LoRA reaches, in float64 and flattened, by the names of LoRA modules."""

    def __init__(self, path: Path, stack: ExitStack):
        self._file = stack.enter_context(safe_open(path, "pt"))
        self._places = {name: (key, rows) for name, key, rows in reachable(path)}

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def __call__(self, name: str) -> torch.Tensor:
        key, rows = self._places[name]
        return self._file.get_slice(key)[rows].double().flatten(1)


class Lora:
    """alpha/r · up · down of a module, float64; a number 0 where the file has none."""

    def __init__(self, path: Path, stack: ExitStack):
        self._file = stack.enter_context(safe_open(path, "pt"))
        self._keys = set(self._file.keys())
        self.names = {key.removesuffix(".lora_down.weight") for key in self._keys if key.endswith(".lora_down.weight")}

    def __call__(self, name: str) -> torch.Tensor | float:
        if f"{name}.diff" in self._keys:  # a whole matrix
            return self._file.get_tensor(f"{name}.diff").double().flatten(1)
        if name not in self.names:
            return 0.0
        up, down = (self._file.get_tensor(f"{name}.lora_{side}.weight").double().flatten(1) for side in ("up", "down"))
        return up @ down * (float(self._file.get_tensor(f"{name}.alpha")) / len(down))


def is_lora(path: Path) -> bool:
    with safe_open(path, "pt") as file:
        return any(key.endswith((".lora_down.weight", ".alpha")) for key in file.keys())  # noqa: SIM118


def load_reached(path: Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint that a LoRA reaches; (n, k) float64."""
    with ExitStack() as stack:
        weights = Weights(path, stack)
        return {name: weights(name) for name in weights.names}


def component_of(name: str) -> str:
    """`unet`, `te`, `te1` … of lora_unet_…"""
    return name.split("_")[1]


@dataclass(frozen=True)
class Piece:
    """One weight: every model's, the centre, the hyper-model's, each LoRA's change; (n, k) float64."""

    name: str
    models: list[torch.Tensor]
    centre: torch.Tensor
    hyper: torch.Tensor
    loras: list[torch.Tensor | float]


def pieces(models: Sequence[Path], hyper: Path, loras: Sequence[Path], base: Path | None = None) -> Iterator[Piece]:
    """Weight by weight, so that full-width models fit. models: checkpoints, or plain LoRA files of the base."""
    with ExitStack() as stack:
        hypers = Weights(hyper, stack)
        bases = None if base is None else Weights(base, stack)
        sources = [Lora(path, stack) if is_lora(path) else Weights(path, stack) for path in models]
        parts = [Lora(path, stack) for path in loras]
        for name in (bases or hypers).names:
            before = 0.0 if bases is None else bases(name)
            tuned = [before + source(name) if isinstance(source, Lora) else source(name) for source in sources]
            centre = sum(tuned) / len(tuned) if bases is None else before
            assert isinstance(centre, torch.Tensor)
            yield Piece(name, tuned, centre, hypers(name), [lora(name) for lora in parts])


def judge(
    models: Mapping[str, Path], hyper: Path, loras: Mapping[str, Path], multipliers: Multipliers,
    te_multipliers: Multipliers | None = None, base: Path | None = None,
) -> Judged:  # fmt: skip
    """models, loras: label → file. The multipliers are by these labels."""
    judged = Judged()
    for piece in pieces(list(models.values()), hyper, list(loras.values()), base):
        component = component_of(piece.name)
        own = multipliers if te_multipliers is None or component == "unet" else te_multipliers
        for label, weight in zip(models, piece.models, strict=True):
            left = weight - piece.hyper
            for lora, change in zip(loras, piece.loras, strict=True):
                left = left - own[label][lora] * change
            judged.add(label, component, _square(left), _square(weight - piece.centre))
    return judged


def best_multipliers(
    models: Sequence[Path], hyper: Path, loras: Sequence[Path], base: Path | None = None, only: str = ""
) -> tuple[torch.Tensor, float]:
    """λ (M, K) that bring the models as close as these LoRAs can, by least squares, and Σ‖…‖² that is left.

    only: the start of the modules' names that count.
    """
    K = len(loras)
    inner, with_models = torch.zeros(K, K, dtype=torch.float64), torch.zeros(len(models), K, dtype=torch.float64)
    energy = 0.0
    for piece in pieces(models, hyper, loras, base):
        if not piece.name.startswith(only):
            continue
        D = torch.stack([(torch.zeros_like(piece.hyper) + change).flatten() for change in piece.loras])
        E = torch.stack([(weight - piece.hyper).flatten() for weight in piece.models])
        inner, with_models, energy = inner + D @ D.mT, with_models + E @ D.mT, energy + _square(E)
    best = torch.linalg.lstsq(inner, with_models.mT, driver="gelsd").solution.mT
    return best, energy - float((best * with_models).sum())


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum())


def from_recipe(recipe: Path, models: Sequence[Path], base: Path | None = None) -> Judged:
    """Of the files beside a recipe; the models in any order, called by the stems of their names."""
    table = json.loads(recipe.read_text(encoding="utf-8"))
    hyper = recipe.with_name(table["hyper"])
    if base is not None and not hyper.exists():
        hyper = base
    loras = {stem: recipe.with_name(f"{stem}.safetensors") for stem in table["loras"]}
    named = {path.stem: path for path in models}
    return judge(named, hyper, loras, table["multipliers"], table.get("te_multipliers"), base)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--base", type=Path)
    options = parser.parse_args(arguments)
    judged = from_recipe(options.recipe, options.models, options.base)
    print(json.dumps({
        "residual_share": judged.residual_share, "models": judged.models, "components": judged.components,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
