"""What every family of adapters has in common: the tensors of one module, seen as the change of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar

from ..algebra.factored import LowRank
from ..errors import FormatError
from ..lazy import torch

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

BIAS = "diff_b"


class Adapter(ABC):
    """One module of an adapter file.

    The change at strength 1 is change(W); a host that applies the file at strength s sets W + s·change(W), for
    every family, as AUTOMATIC1111 does. Tensors are kept as stored (16, 32 or 8 bit); arithmetic is done in the
    dtype of the weight that is handed in: float32, or float64 where a caller wants more.

    Part names are kohya's and LyCORIS': what follows the module's name in a file, e.g. `lora_up.weight`,
    `hada_w1_a`. alpha: None where the file gives none, which means a scale of 1.  scale: the file's own, which
    goes before alpha / rank.
    """

    family: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[frozenset[str]]  # all that a module can have, but for those that any may have
    needs_weight: ClassVar[bool] = False  # change(W) depends on the numbers in W

    @classmethod
    def matches(cls, parts: Collection[str]) -> bool:
        """Whether a module with these part names is of this family (complete or not)."""
        return not cls.parts.isdisjoint(parts)

    @classmethod
    @abstractmethod
    def check(cls, shapes: Shapes) -> None:
        """FormatError if a part is missing or two parts disagree."""

    @classmethod
    @abstractmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        """fits(), but for the bias."""

    @classmethod
    def fits(cls, shapes: Shapes, weight: Shape) -> bool:
        """Whether the change has the size of such a weight. shapes have passed check()."""
        return cls._fits(shapes, weight) and (BIAS not in shapes or flat(shapes[BIAS]) == (weight[0], 1))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """The number that the file's trainer called its dimension, None where the family has none."""
        return None

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        """What programs that read such a module are known to do otherwise than its definition."""
        return [f"AUTOMATIC1111 leaves out {BIAS}, the change of the bias."] if BIAS in shapes else []

    def __init__(self, tensors: Mapping[str, torch.Tensor], alpha: float | None = None, scale: float | None = None):
        self.tensors = dict(tensors)
        self.alpha = alpha
        self._scale = scale

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def scale(self) -> float:
        """The file's own; else alpha / rank, 1 where it gives no alpha either."""
        if self._scale is not None:
            return self._scale
        rank = self.rank(self.shapes)
        return 1.0 if self.alpha is None or not rank else self.alpha / rank

    @abstractmethod
    def change(self, weight: torch.Tensor) -> torch.Tensor:
        """ΔW at strength 1, in weight's shape, dtype and device. weight is not modified."""

    def bias_change(self) -> torch.Tensor | None:
        """The change (n,) of the layer's bias at strength 1, None if there is none. A layer may have no bias yet."""
        return self.tensors[BIAS].flatten() if BIAS in self.tensors else None

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        """The change in factored form, exactly.

        None where the family has no such form, or one whose rank reaches the weight's short side (a plain LoRA
        always has its own). Products that have to be formed for it are formed in dtype, float32 by default.
        """
        return None

    def like(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A part in the weight's dtype, on its device."""
        return self.tensors[name].to(weight.device, weight.dtype)


def rank_as_alpha(name: str, rank: int, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """The tensor of an alpha that makes the scale 1, beside tensors in dtype."""
    # bfloat16 cannot hold every rank above 256, float16 every rank up to 2048
    alpha_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    return f"{name}.alpha", torch.tensor(float(rank), dtype=alpha_dtype)


def flat(shape: Shape) -> tuple[int, int]:
    """The size as a matrix: rows, and everything else."""
    k = 1
    for size in shape[1:]:
        k *= size
    return shape[0] if shape else 1, k


def squeezed(shape: Shape) -> Shape:
    """Without the 1×1 that tells a convolution from a linear layer."""
    return shape[:2] if len(shape) > 2 and all(size == 1 for size in shape[2:]) else shape


def require(shapes: Shapes, family: str, *names: str) -> None:
    """FormatError that names the first part missing."""
    for name in names:
        if name not in shapes:
            raise FormatError(
                f"A module lacks {name}, a part of {family}.", "The file is incomplete.", "Download or save it again."
            )


def disagree(family: str, shapes: Shapes, *names: str) -> FormatError:
    """The error for parts whose sizes contradict each other."""
    sizes = ", ".join(f"{name} is {list(shapes[name])}" for name in names if name in shapes)
    return FormatError(f"The parts of a module ({family}) do not fit together.", f"{sizes}.", "The file is damaged.")
