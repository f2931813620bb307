"""What every family of adapters has in common: the tensors of one module, seen as the change of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import FormatError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class LowRank:
    """ΔW (flattened to (n, k)) = scale · up · down with up (n, r), down (r, k) as stored."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


class Adapter(ABC):
    """One module of an adapter file.

    The change at strength 1 is change(W); a host that applies the file at strength s sets W + s·change(W), for
    every family, as AUTOMATIC1111 does. Tensors are kept as stored; arithmetic is done in the dtype of the
    weight that is handed in (float32, or float64 where a caller wants more).

    Part names are kohya's and LyCORIS': what follows the module's name in a file, e.g. `lora_up.weight`,
    `hada_w1_a`, `alpha`. alpha: None where the file gives none, which means a scale of 1.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    needs_weight: ClassVar[bool] = False  # change(W) depends on the numbers in W

    @classmethod
    @abstractmethod
    def matches(cls, parts: Collection[str]) -> bool:
        """Whether a module with these part names is of this family (complete or not)."""

    @classmethod
    @abstractmethod
    def check(cls, shapes: Shapes) -> None:
        """FormatError if a part is missing or two parts disagree."""

    @classmethod
    @abstractmethod
    def fits(cls, shapes: Shapes, weight: Shape) -> bool:
        """Whether the change has the size of such a weight. shapes have passed check()."""

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """The number that the file's trainer called its dimension, None where the family has none."""
        return None

    def __init__(self, tensors: Mapping[str, torch.Tensor], alpha: float | None = None):
        self.tensors = dict(tensors)
        self.alpha = alpha

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def scale(self) -> float:
        """alpha / rank; 1 where the file gives no alpha."""
        rank = self.rank(self.shapes)
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    @abstractmethod
    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW at strength 1, in weight's shape, dtype and device. weight is not modified."""

    def low_rank(self) -> LowRank | None:
        """The change in factored form, exactly; None where the family has no such form."""
        return None


def require(shapes: Shapes, family: str, *names: str) -> None:
    """FormatError that names the first part missing."""
    for name in names:
        if name not in shapes:
            raise FormatError(
                f"A {family} module lacks {name}.", "The file is incomplete.", "Download or save it again."
            )


def disagree(family: str, why: str) -> FormatError:
    """The error for parts whose sizes contradict each other."""
    return FormatError(f"The parts of a {family} module do not fit together.", why, "The file is damaged.")
