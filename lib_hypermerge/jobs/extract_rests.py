"""What changed outside LoRA modules: norms, biases, embeddings. Measured always, written where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ..adapters import norm
from ..errors import NumericalError
from ..files.writer import SafetensorsWriter
from .difference import Difference
from .extract_spec import ExtractSpec
from .pairing import Pairing, Rest


@dataclass
class Rests:
    """Changed tensors by label, with the squared norm of their change; `include` of them will be written."""

    energies: dict[str, float] = field(default_factory=dict)
    changed: list[Rest] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    include: list[tuple[Rest, ...]] = field(default_factory=list)  # (weight, bias) of a norm, or (bias,)
    written: set[str] = field(default_factory=set)

    @property
    def left(self) -> list[Rest]:
        """Changed and not in the file."""
        return [rest for rest in self.changed if rest.label not in self.written]

    @property
    def energy(self) -> float:
        return math.fsum(self.energies.values())

    @property
    def energy_left(self) -> float:
        return math.fsum(self.energies[rest.label] for rest in self.left)

    @property
    def out_of_reach(self) -> list[str]:
        """Labels of changed tensors that no LoRA file carries."""
        return [rest.label for rest in self.left if not could_carry(rest)]

    @property
    def not_asked_for(self) -> dict[str, int]:
        """How many changed norms and biases the file could carry, had it been asked to."""
        left = [rest.what for rest in self.left if could_carry(rest)]
        return {"norms": left.count("norm"), "biases": left.count("bias")}


def could_carry(rest: Rest) -> bool:
    """Whether a file could hold this change: norms by w_norm + b_norm, biases by diff_b beside a LoRA."""
    named = rest.owner.name is not None and rest.owner.bias is not None
    return named and (rest.what == "norm" or (rest.what == "bias" and rest.owner.part is None))


def look_at(pairing: Pairing, spec: ExtractSpec, difference: Difference, run: Callable[..., Iterator]) -> Rests:
    """Measure every such tensor; run is a parallel map in order."""
    rests = Rests()
    energies = run(lambda rest: difference.energy(rest.tuned, rest.base), pairing.rest)
    for rest, energy in zip(pairing.rest, energies, strict=True):
        if not math.isfinite(energy):
            rests.nonfinite.append(rest.label)
        elif energy > 0:
            rests.changed.append(rest)
            rests.energies[rest.label] = energy
    _choose(rests, pairing, spec)
    return rests


def _choose(rests: Rests, pairing: Pairing, spec: ExtractSpec) -> None:
    by_owner: dict[str, list[Rest]] = {}
    for rest in pairing.rest:
        if could_carry(rest):
            by_owner.setdefault(rest.label.removesuffix(".bias"), []).append(rest)
    for own in by_owner.values():
        asked = spec.norms if own[0].what == "norm" else spec.biases
        complete = own[0].what != "norm" or len(own) == 2  # A1111 refuses a norm without its bias
        finite = not any(rest.label in rests.nonfinite for rest in own)
        if asked and complete and finite and any(rest.label in rests.energies for rest in own):
            rests.include.append(tuple(own))


def tensor_names(rests: Rests) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what `write` may add, for the size of the header."""
    parts = {"norm": ("w_norm", "b_norm"), "bias": ("diff_b",)}
    return [
        (f"{rest.owner.name}.{part}", rest.tuned.shape)
        for own in rests.include
        for rest, part in zip(own, parts[own[0].what], strict=True)
    ]


def write(
    rests: Rests, writer: SafetensorsWriter, difference: Difference, dtype: torch.dtype, modules: set[str]
) -> None:
    """Add what is to be included; a bias only beside a LoRA module, alone A1111 would refuse the file."""
    for own in rests.include:
        name = own[0].owner.name
        assert name is not None
        if own[0].what == "bias" and name not in modules:
            continue
        changes = [difference.load(rest.tuned, rest.base).A.clone() for rest in own]
        if own[0].what == "norm":
            tensors = list(norm.tensors(name, changes[0], changes[1], dtype))
        else:
            tensors = [norm.bias_tensor(name, changes[0], dtype)]
        for key, tensor in tensors:
            if not tensor.isfinite().all():
                raise NumericalError(
                    f"The change of {key} is too large for {str(dtype).removeprefix('torch.')}.",
                    hint="Choose fp32 or bf16 as the output format.",
                )
            writer.add(key, tensor)
        rests.written |= {rest.label for rest in own}
