"""OFT and BOFT: the rows of W turned by orthogonal blocks (arXiv 2306.07280, 2311.06243; sd-scripts, LyCORIS).

`oft_blocks` (k, b, b) are free matrices X; Q = X − Xᵀ, shortened to ‖Q‖_F ≤ alpha·n where alpha > 0 (taken over
all blocks together); R = (I + Q)(I − Q)⁻¹ (Cayley). With W cut into k groups of b rows W_i, W'_i = R_iᵀ·W_i.
sd-scripts' dimension is the number of blocks, LyCORIS' about their size; the file says the same either way.

`oft_diag` (k, b, b), LyCORIS before 2.1, holds the R_i themselves, rescaled already.

Butterfly form, `oft_blocks` (m, k, b, b): W' = B_m ⋯ B_1·W, where B_i takes rows that stand 2^(i-1)·b/2 apart
together as a group of b and applies R_ij (not transposed) to each group j.

`rescale` (n, 1[, 1, 1]) multiplies the rows of the result.  ΔW = W' − W.
"""

from __future__ import annotations

from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, require

BLOCKS, TURNS, RESCALE = "oft_blocks", "oft_diag", "rescale"


class Oft(Adapter):
    """The family. ComfyUI bounds ‖Q‖ by alpha alone; kohya's and LyCORIS' bound, alpha·n, is taken here."""

    family, title, needs_weight = "oft", "OFT", True
    parts = frozenset((BLOCKS, TURNS, RESCALE))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        if TURNS not in shapes:
            require(shapes, cls.title, BLOCKS)
        blocks = _blocks(shapes)
        good = len(blocks) in (3, 4) and blocks[-1] == blocks[-2] and not (TURNS in shapes and len(blocks) == 4)
        if good and len(blocks) == 4:
            widest = (1 << (blocks[0] - 1)) * blocks[2] if blocks[0] else 0
            good = widest > 0 and blocks[2] % 2 == 0 and _rows(blocks) % widest == 0
        if not good or (RESCALE in shapes and _numel(shapes[RESCALE]) != _rows(blocks)):
            raise disagree(cls.title, shapes, BLOCKS, TURNS, RESCALE)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        return len(weight) > 1 and _rows(_blocks(shapes)) == weight[0]

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        turns = "ComfyUI does not read it" if TURNS in shapes else "ComfyUI turns less where alpha bounds the turn"
        return [*super().notes(shapes), f"Forge does not read OFT; {turns}."]

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        W = weight.flatten(1)
        R = self._turns(W)
        made = _butterfly(R, W) if R.ndim == 4 else (R.mT @ W.reshape(*R.shape[:2], -1)).reshape(W.shape)
        if RESCALE in self.tensors:
            made = made * self.like(RESCALE, weight).reshape(-1, 1)
        return (made - W).reshape(weight.shape)

    def _turns(self, W: torch.Tensor) -> torch.Tensor:
        if TURNS in self.tensors:
            return self.like(TURNS, W)
        X = self.like(BLOCKS, W)
        Q = X - X.mT
        if self.alpha is not None and self.alpha > 0:
            norm, bound = torch.linalg.vector_norm(Q), self.alpha * len(W)
            Q = Q * (bound / norm) if norm > bound else Q
        eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
        return torch.linalg.solve(eye - Q, eye + Q)  # both are functions of Q, so their order is free


def _butterfly(R: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    m, k, b, _ = R.shape
    for i in range(m):
        apart = (1 << i) * (b // 2)
        groups = W.reshape(-1, 2, apart, W.shape[1]).transpose(1, 2).reshape(k, b, -1)
        W = (R[i] @ groups).reshape(-1, apart, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
    return W


def _blocks(shapes: Shapes) -> Shape:
    return shapes[BLOCKS] if BLOCKS in shapes else shapes[TURNS]


def _rows(blocks: Shape) -> int:
    return blocks[-3] * blocks[-2]


def _numel(shape: Shape) -> int:
    rows, rest = flat(shape)
    return rows * rest
