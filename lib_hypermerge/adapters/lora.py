"""LoRA and LoCon: ΔW = alpha/r · up·down (Hu et al. 2021, arXiv 2106.09685; LyCORIS for convolutions).

With `lora_mid` (LyCORIS' Tucker form, "CP"): ΔW[o,i,y,x] = alpha/r · Σ_pq up[o,p] · mid[p,q,y,x] · down[q,i].
`lora_up.bias` (PEFT's lora_bias) changes the layer's bias by alpha/r times itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..algebra.factored import LowRank
from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, rank_as_alpha, require, squeezed

UP, DOWN, MID, UP_BIAS = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_up.bias"


class Lora(Adapter):
    """The family; a convolution has a down (r, c, kh, kw) and an up (n, r, 1, 1), both possibly flattened."""

    family, title = "lora", "LoRA"
    parts = frozenset((UP, DOWN, MID, UP_BIAS))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, UP, DOWN)
        up, down, mid = shapes[UP], shapes[DOWN], shapes.get(MID)
        if len(squeezed(up)) != 2 or len(down) < 2:
            good = False
        elif mid is None:
            good = up[1] == down[0]
        else:
            good = len(mid) == 4 and mid[:2] == (up[1], down[0]) and len(squeezed(down)) == 2
        if not good or (UP_BIAS in shapes and flat(shapes[UP_BIAS]) != (up[0], 1)):
            raise disagree(cls.title, shapes, UP, MID, DOWN, UP_BIAS)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        up, down, mid = shapes[UP], shapes[DOWN], shapes.get(MID)
        if mid is not None:
            return squeezed((up[0], down[1], *mid[2:])) == squeezed(weight)
        made = (up[0], *down[1:])
        return squeezed(made) == squeezed(weight) or (len(down) == 2 and made == flat(weight))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes[DOWN][0] if DOWN in shapes else None

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        bias = ["AUTOMATIC1111 and Forge leave out lora_up.bias, a change of the bias."] if UP_BIAS in shapes else []
        return super().notes(shapes) + bias

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        up, down = self.tensors[UP].flatten(1), self.tensors[DOWN]
        mid = self.tensors.get(MID)
        if mid is not None:
            wide = dtype or torch.float32
            down = torch.einsum("pqyx,qi->piyx", mid.to(wide), down.to(wide).flatten(1))
        return LowRank(up, down.flatten(1), self.scale)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        low = Lora.low_rank(self, weight.dtype)
        assert low is not None
        up, down = (factor.to(weight.device, weight.dtype) for factor in (low.up, low.down))
        return ((low.scale * up) @ down).reshape(weight.shape)

    def bias_change(self) -> torch.Tensor | None:
        own, more = super().bias_change(), self.tensors.get(UP_BIAS)
        if more is None:
            return own
        more = self.scale * more.to(torch.float64 if more.dtype == torch.float64 else torch.float32).flatten()
        return more if own is None else own.to(more.dtype) + more


def tensors(
    name: str, up: torch.Tensor, down: torch.Tensor, weight_shape: tuple[int, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one module with alpha = rank, as kohya files hold them.

    up: (n, r), down: (r, k), both in the file's dtype.  For a convolution (n, c, kh, kw) down becomes
    (r, c, kh, kw) and up (n, r, 1, 1).
    """
    rank = down.shape[0]
    if len(weight_shape) == 4:
        down = down.reshape(rank, *weight_shape[1:])
        up = up.reshape(*up.shape, 1, 1)
    yield f"{name}.{DOWN}", down
    yield f"{name}.{UP}", up
    yield rank_as_alpha(name, rank, up.dtype)


def tensor_bytes(rank: int, n: int, k: int, itemsize: int) -> int:
    """Bytes of the two factors of one module."""
    return rank * (n + k) * itemsize
