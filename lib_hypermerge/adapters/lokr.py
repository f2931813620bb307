"""LoKr: ΔW = scale · w1 ⊗ w2, a Kronecker product (KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

w1 is `lokr_w1` (u, v) or `lokr_w1_a`·`lokr_w1_b`.  w2 is `lokr_w2` (p, q[, kh, kw]), or `lokr_w2_a`·`lokr_w2_b`
with w2_b (r, q·kh·kw), or with `lokr_t2` Σ_ab w2_a[a,p] · t2[a,b,y,x] · w2_b[b,q].  The weight is (u·p, v·q[, kh, kw]).
scale is alpha/r; 1 where both are whole, whatever alpha says: there is no r then.

Flattened, w1 ⊗ w2 = (a1·b1) ⊗ (a2·b2) = (a1 ⊗ a2)·(b1 ⊗ b2): low-rank whenever one of the two is.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..algebra.factored import LowRank
from ..algebra.kronecker import Kronecker
from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, rank_as_alpha, require, squeezed

W1, A1, B1 = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, A2, B2, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"


class Lokr(Adapter):
    """The family, in all six ways of storing it."""

    family, title = "lokr", "LoKr"
    parts = frozenset((W1, A1, B1, W2, A2, B2, T2))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        if W1 not in shapes:
            require(shapes, cls.title, A1, B1)
        if W2 not in shapes:
            require(shapes, cls.title, A2, B2)
        if made(shapes) is None:
            raise disagree(cls.title, shapes, W1, A1, B1, W2, A2, T2, B2)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        own = made(shapes)
        return own is not None and (squeezed(own) == squeezed(weight) or (len(own) == 2 and own == flat(weight)))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """That of w2 where both are factored: trainers give both the same."""
        if W2 not in shapes and B2 in shapes:
            return shapes[B2][0]
        return shapes[B1][0] if W1 not in shapes and B1 in shapes else None

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        w1, w2 = (
            up if down is None else up @ down for up, down in (self._first(weight.dtype), self._second(weight.dtype))
        )
        return torch.kron((self.scale * w1).to(weight.device), w2.to(weight.device)).reshape(weight.shape)

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        wide = dtype or torch.float32
        (up1, down1), (up2, down2) = (_split(*pair) for pair in (self._first(wide), self._second(wide)))
        n, k, rank = len(up1) * len(up2), down1.shape[1] * down2.shape[1], len(down1) * len(down2)
        if rank >= min(n, k):
            return None
        return LowRank(torch.kron(up1, up2), torch.kron(down1, down2), self.scale)

    def _first(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """w1 and None, or its factors."""
        if W1 in self.tensors:
            return self.tensors[W1].to(dtype), None
        return self.tensors[A1].to(dtype), self.tensors[B1].to(dtype)

    def _second(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """w2 flattened to (p, q·kh·kw) and None, or its factors."""
        if W2 in self.tensors:
            return self.tensors[W2].to(dtype).flatten(1), None
        up, down = self.tensors[A2].to(dtype), self.tensors[B2].to(dtype)
        if T2 in self.tensors:
            up, down = up.mT, torch.einsum("abyx,bq->aqyx", self.tensors[T2].to(dtype), down)
        return up.contiguous(), down.flatten(1).contiguous()  # torch.kron asks for it


def tensors(name: str, product: Kronecker, weight_shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one module with a scale of 1, as LyCORIS writes them.

    Of a convolution (n, c, kh, kw) a whole w2 is (p, q, kh, kw), the factors of one are matrices.
    """
    yield f"{name}.{W1}", product.w1
    if product.w2 is not None:
        yield f"{name}.{W2}", product.w2.reshape(len(product.w2), -1, *weight_shape[2:])
    if product.up is not None and product.down is not None:
        yield f"{name}.{A2}", product.up
        yield f"{name}.{B2}", product.down
    yield rank_as_alpha(name, 1 if product.down is None else len(product.down), product.w1.dtype)


def _split(up: torch.Tensor, down: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a whole matrix too: itself and the identity of its short side."""
    if down is not None:
        return up, down
    rows, columns = up.shape
    eye = torch.eye(min(rows, columns), dtype=up.dtype, device=up.device)
    return (eye, up) if rows <= columns else (up, eye)


def made(shapes: Shapes) -> Shape | None:
    """The size of the change; None if the parts disagree."""
    if W1 in shapes:
        first = shapes[W1]
    elif shapes[A1][-1:] == shapes[B1][:1]:
        first = (shapes[A1][0], *shapes[B1][1:])
    else:
        return None
    if W2 in shapes:
        second = shapes[W2]
    else:
        a, b, core = shapes[A2], shapes[B2], shapes.get(T2)
        if len(a) != 2 or len(b) < 2:
            return None
        if core is None:
            second = (a[0], *b[1:]) if a[1] == b[0] else ()
        else:
            second = (a[1], b[1], *core[2:]) if len(core) == 4 and core[:2] == (a[0], b[0]) else ()
    if len(first) != 2 or len(second) < 2:
        return None
    return (first[0] * second[0], first[1] * second[1], *second[2:])
