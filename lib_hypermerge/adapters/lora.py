"""LoRA and LoCon: ΔW = alpha/r · up·down (Hu et al. 2021, arXiv 2106.09685; LyCORIS for convolutions).

With `lora_mid` (LyCORIS' Tucker form, "CP"): ΔW[o,i,y,x] = alpha/r · Σ_pq up[o,p] · mid[p,q,y,x] · down[q,i].
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from .adapter import Adapter, LowRank, Shape, Shapes, disagree, require

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"


class Lora(Adapter):
    """The family; a convolution has a down (r, c, kh, kw) and an up (n, r, 1, 1)."""

    family, title = "lora", "LoRA"

    @classmethod
    def matches(cls, parts: Collection[str]) -> bool:
        return UP in parts or DOWN in parts

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, UP, DOWN)
        up, down, mid = shapes[UP], shapes[DOWN], shapes.get(MID)
        if len(up) < 2 or len(down) < 2 or any(size != 1 for size in up[2:]):
            raise disagree(cls.title, f"up is {list(up)}, down is {list(down)}.")
        if mid is None:
            if up[1] != down[0]:
                raise disagree(cls.title, f"up has rank {up[1]}, down has rank {down[0]}.")
        elif len(mid) != 4 or mid[0] != up[1] or mid[1] != down[0] or any(size != 1 for size in down[2:]):
            raise disagree(cls.title, f"up is {list(up)}, mid is {list(mid)}, down is {list(down)}.")

    @classmethod
    def fits(cls, shapes: Shapes, weight: Shape) -> bool:
        up, down, mid = shapes[UP], shapes[DOWN], shapes.get(MID)
        kernel = down[2:] if mid is None else mid[2:]
        made = (up[0], down[1], *kernel)
        return _squeezed(made) == _squeezed(weight) or (mid is None and _flat(made) == _flat(weight))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes[DOWN][0] if DOWN in shapes else None

    def low_rank(self) -> LowRank:
        up, down = self.tensors[UP].flatten(1), self.tensors[DOWN]
        mid = self.tensors.get(MID)
        if mid is not None:
            wide = torch.float64 if torch.float64 in (mid.dtype, down.dtype) else torch.float32
            down = torch.einsum("pqyx,qi->piyx", mid.to(wide), down.to(wide).flatten(1))
        return LowRank(up, down.flatten(1), self.scale)

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        low = self.low_rank()
        up, down = (factor.to(weight.device, weight.dtype) for factor in (low.up, low.down))
        return (low.scale * (up @ down)).reshape(weight.shape)


def _squeezed(shape: Shape) -> Shape:
    """Without the 1×1 that tells a convolution from a linear layer."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _flat(shape: Shape) -> tuple[int, int]:
    k = 1
    for size in shape[1:]:
        k *= size
    return shape[0], k


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
    # bfloat16 cannot hold every rank above 256, float16 every rank up to 2048
    alpha_dtype = torch.float32 if up.dtype == torch.float32 else torch.float16
    yield f"{name}.alpha", torch.tensor(float(rank), dtype=alpha_dtype)


def tensor_bytes(rank: int, n: int, k: int, itemsize: int) -> int:
    """Bytes of the two factors of one module."""
    return rank * (n + k) * itemsize
