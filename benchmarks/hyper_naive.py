"""The published way to share LoRAs among M checkpoints, as its definition goes and made to work: timed, or run through.

python benchmarks/hyper_naive.py time RANKS THREADS MODEL…   → one JSON object: seconds, projected
python benchmarks/hyper_naive.py run  RANKS THREADS MODEL…   → one JSON object: its residual share

All models are in memory. Of each LoRA in turn, three times over: dW' = Σ λ_m dW_m / Σ λ_m² of each layer, its SVD cut
to the rank, λ_m = ⟨dW_m, dW'⟩ / ‖dW'‖² over all layers; then λ_m dW' is subtracted from every dW_m. Numbers are
float32 and λ starts at random: from λ = 1 the centred differences add up to nothing.

`time` does one such step on one layer of each distinct shape, to be multiplied by how many layers have it. `run` gives
the loop's very result without its cost, singular vectors from the Gram matrix of the short side; and, as a single
random start can end far from the others, from the best of three for each LoRA.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import LORA_KINDS

ITERATIONS = 3  # of each LoRA
_MORE, _STEPS = 16, 30  # vectors beyond those wanted, and how often they are multiplied
_STARTS, _SAMPLED = 3, 8  # random starts of a LoRA, tried on every eighth layer
_SMALL = 2.0  # seconds; quicker SVDs are timed twice

Place = tuple[str, int, int]  # tensor, first row, last row
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # U (n, r), S·Vh (r, k), ⟨dW_m, dW'⟩ (M,)


def layers(path: Path) -> dict[Place, tuple[int, int]]:
    """Every weight that a LoRA reaches, and its matrix's shape; the same in all models of a family."""
    out = {}
    with open_tensors(path) as file:
        for component in recognise(file).components.values():
            for module in component.values():
                if module.kind in LORA_KINDS and module.name and module.weight:
                    whole = file.tensors[module.weight.name]
                    start = (module.weight.offset - whole.offset) // (whole.nbytes // whole.shape[0])
                    place = (module.weight.name, start, start + module.weight.shape[0])
                    out[place] = (module.matrix_shape[0], module.matrix_shape[1])
    return out


def differences(files: Sequence, place: Place) -> torch.Tensor:
    """(M, n, k) float32: every model's layer less their mean."""
    name, start, stop = place
    stacked = torch.stack([file.get_slice(name)[start:stop].float().flatten(1) for file in files])
    return stacked.sub_(stacked.mean(0))


def by_svd(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U and S·Vh of the best approximation."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank, None] * Vh[:rank]


def by_gram(W: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by way of the short side's Gram matrix."""
    if W.shape[0] > W.shape[1]:
        left, right = by_gram(W.mT, rank)
        sizes = right.norm(dim=1).clamp_min(1e-30)
        return (right / sizes[:, None]).mT, sizes[:, None] * left.mT
    U = _top_eigenvectors(W @ W.mT, rank)
    return U, U.mT @ W


def _top_eigenvectors(G: torch.Tensor, rank: int) -> torch.Tensor:
    """(n, r); of large matrices by subspace iteration, far enough for seven digits of what they hold."""
    if len(G) < 6 * (rank + _MORE):
        return torch.linalg.eigh(G.double()).eigenvectors[:, -rank:].flip(1).float()
    Q = torch.randn(len(G), rank + _MORE, generator=torch.Generator().manual_seed(0))
    for _ in range(_STEPS):
        Q = torch.linalg.qr(G @ Q).Q
    return Q @ torch.linalg.eigh((Q.mT @ (G @ Q)).double()).eigenvectors[:, -rank:].flip(1).float()


def step(dW: torch.Tensor, multipliers: torch.Tensor, rank: int, svd: Callable) -> Step:
    """One iteration in one layer. dW: (M, n, k)."""
    combined = torch.tensordot(multipliers, dW, 1) / multipliers.square().sum()
    left, right = svd(combined, min(rank, *combined.shape))
    return left, right, torch.tensordot(dW, left @ right, 2)


def timed(files: Sequence, places: dict[Place, tuple[int, int]], ranks: Sequence[int]) -> dict:
    """What all of it would take: preparing is timed on all layers, an iteration on one of each shape."""
    start = time.perf_counter()
    by_shape: dict[tuple[int, int], list[Place]] = defaultdict(list)
    for place, shape in places.items():
        differences(files, place)
        by_shape[shape].append(place)
    prepare = time.perf_counter() - start
    multipliers, per_iteration, subtracting, svd, shapes = _start(len(files), 0), 0.0, 0.0, 0.0, []
    for shape, same in by_shape.items():
        dW, rank = differences(files, same[0]), max(ranks)
        seconds, svd_seconds = _least(dW, multipliers, rank)
        left, right, _ = step(dW, multipliers, rank, by_gram)
        start = time.perf_counter()
        dW -= multipliers[:, None, None] * (left @ right)
        subtract = time.perf_counter() - start
        shapes.append({"shape": shape, "count": len(same), "iteration": seconds, "subtract": subtract})
        per_iteration, subtracting = per_iteration + len(same) * seconds, subtracting + len(same) * subtract
        svd += len(same) * svd_seconds
        print(shape, len(same), seconds, subtract, file=sys.stderr, flush=True)
    count = len(ranks) * ITERATIONS
    return {
        "prepare": prepare, "iteration": per_iteration, "iterations": count, "subtract": subtracting,
        "projected": prepare + count * per_iteration + len(ranks) * subtracting, "svd_seconds": count * svd,
        "needs_mib": len(files) * 4 * sum(n * k for n, k in places.values()) / 2**20,
        "shapes": shapes, "torch": torch.__version__,
    }  # fmt: skip


def _least(dW: torch.Tensor, multipliers: torch.Tensor, rank: int) -> tuple[float, float]:
    """Seconds of one iteration and of the SVD in it, the lesser of two if it is quick."""
    timings: list[tuple[float, float]] = []
    while not timings or (len(timings) < 2 and timings[0][0] < _SMALL):
        svd: list[float] = []

        def watched(W: torch.Tensor, rank: int, svd: list[float] = svd) -> tuple[torch.Tensor, torch.Tensor]:
            began = time.perf_counter()
            found = by_svd(W, rank)
            svd.append(time.perf_counter() - began)
            return found

        start = time.perf_counter()
        step(dW, multipliers, rank, watched)
        timings.append((time.perf_counter() - start, svd[0]))
    return min(timings)


@dataclass(frozen=True)
class Lora:
    """factors: place → U (n, r) and S·Vh (r, k).  square: ‖dW'‖² over all of them."""

    multipliers: torch.Tensor
    factors: dict[Place, Step]
    square: float

    @property
    def explains(self) -> float:
        """How much of Σ‖dW_m‖² goes with it, as λ_m is the best one for it."""
        return float(self.multipliers.double().square().sum()) * self.square


def run(files: Sequence, places: dict[Place, tuple[int, int]], ranks: Sequence[int]) -> dict:
    """The whole loop, each LoRA from that random start which is best on a part of the layers."""
    energy = sum(float(differences(files, place).square().sum(dtype=torch.float64)) for place in places)
    loras: list[Lora] = []
    for number, rank in enumerate(ranks):
        starts = [_start(len(files), number * _STARTS + i) for i in range(_STARTS)]
        trials = [_lora(files, list(places)[::_SAMPLED], rank, start, loras).explains for start in starts]
        loras.append(_lora(files, list(places), rank, starts[trials.index(max(trials))], loras))
        print(rank, loras[-1].explains / energy, loras[-1].multipliers.tolist(), trials, file=sys.stderr, flush=True)
    shares = [1 - sum(lora.explains for lora in loras[: i + 1]) / energy for i in range(len(loras))]
    multipliers = [lora.multipliers.tolist() for lora in loras]
    return {"residual_share": shares[-1], "shares": shares, "multipliers": multipliers}


def _lora(
    files: Sequence, places: Sequence[Place], rank: int, multipliers: torch.Tensor, earlier: Sequence[Lora]
) -> Lora:
    """One LoRA's iterations."""
    found = Lora(multipliers, {}, 0.0)
    for _ in range(ITERATIONS):
        inner, square, factors = torch.zeros(len(files), dtype=torch.float64), 0.0, {}
        for place in places:
            dW = differences(files, place)
            for lora in earlier:
                left, right, _ = lora.factors[place]
                dW -= lora.multipliers[:, None, None] * (left @ right)
            factors[place] = step(dW, found.multipliers, rank, by_gram)
            inner, square = inner + factors[place][2], square + float(factors[place][1].square().sum())
        found = Lora((inner / square).float(), factors, square)
    return found


def _start(models: int, seed: int) -> torch.Tensor:
    return torch.randn(models, generator=torch.Generator().manual_seed(seed))


def main(what: str, ranks: str, threads: str, *models: str) -> None:
    torch.set_num_threads(int(threads))
    places, numbers = layers(Path(models[0])), [int(rank) for rank in ranks.split(",")]
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(model, "pt")) for model in models]
        print(json.dumps((timed if what == "time" else run)(files, places, numbers)))


if __name__ == "__main__":
    main(*sys.argv[1:])
