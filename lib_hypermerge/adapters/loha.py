"""LoHa: ΔW = alpha/r · (w1_a·w1_b) ∘ (w2_a·w2_b), an entrywise product (FedPara, arXiv 2108.06098; LyCORIS).

With `hada_t1` and `hada_t2` (Tucker form of a convolution) each of the two is
Σ_pq w_a[p,o] · t[p,q,y,x] · w_b[q,i], where w_a is (r, n) and w_b (r, c).

The entrywise product of two matrices of ranks r1 and r2 has rank r1·r2 at most: its factors are the products of
every column of one w_a with every column of the other, and of the rows of the w_b likewise (Khatri–Rao products).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..algebra.factored import LowRank
from ..algebra.hadamard import Hadamard
from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, rank_as_alpha, require, squeezed

A1, B1, A2, B2 = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
T1, T2 = "hada_t1", "hada_t2"


class Loha(Adapter):
    """The family; w_b of a convolution without Tucker form is (r, c·kh·kw)."""

    family, title = "loha", "LoHa"
    parts = frozenset((A1, B1, A2, B2, T1, T2))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, A1, B1, A2, B2)
        if T1 in shapes or T2 in shapes:
            require(shapes, cls.title, T1, T2)
        both = [_made(shapes, a, b, t) for a, b, t in ((A1, B1, T1), (A2, B2, T2))]
        if None in both or both[0] != both[1]:
            raise disagree(cls.title, shapes, A1, B1, T1, A2, B2, T2)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        own = made(shapes)
        return own is not None and (squeezed(own) == squeezed(weight) or (len(own) == 2 and own == flat(weight)))

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return shapes[B1][0] if B1 in shapes else None

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        (up1, down1), (up2, down2) = self._factors(weight.dtype, weight.device)
        return ((self.scale * up1) @ down1).mul_(up2 @ down2).reshape(weight.shape)

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        (up1, down1), (up2, down2) = self._factors(dtype or torch.float32, self.tensors[A1].device)
        if len(down1) * len(down2) >= min(len(up1), down1.shape[1]):
            return None
        up = (up1[:, :, None] * up2[:, None]).flatten(1)
        down = (down1[:, None] * down2[None]).flatten(0, 1)
        return LowRank(up, down, self.scale)

    def _factors(self, dtype: torch.dtype, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(n, r) and (r, k) of each of the two matrices."""
        out = []
        for a, b, t in ((A1, B1, T1), (A2, B2, T2)):
            wa, wb = (self.tensors[name].to(device, dtype) for name in (a, b))
            if t in self.tensors:
                wb = torch.einsum("pqyx,qi->piyx", self.tensors[t].to(device, dtype), wb)
                wa = wa.mT
            out.append((wa, wb.flatten(1)))
        return out


def made(shapes: Shapes) -> Shape | None:
    """The size of the change; None if the parts disagree."""
    return _made(shapes, A1, B1, T1)


def tensors(name: str, product: Hadamard) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one module with alpha = rank, as LyCORIS writes them; those of a convolution are matrices too."""
    for part, factor in ((A1, product.up1), (B1, product.down1), (A2, product.up2), (B2, product.down2)):
        yield f"{name}.{part}", factor
    yield rank_as_alpha(name, len(product.down1), product.down1.dtype)


def _made(shapes: Shapes, a: str, b: str, t: str) -> Shape | None:
    """The size of one of the two matrices; None if its parts disagree."""
    wa, wb, core = shapes[a], shapes[b], shapes.get(t)
    if len(wa) != 2 or len(wb) < 2:
        return None
    if core is None:
        return (wa[0], *wb[1:]) if wa[1] == wb[0] else None
    return (wa[1], wb[1], *core[2:]) if len(core) == 4 and core[:2] == (wa[0], wb[0]) and len(wb) == 2 else None
