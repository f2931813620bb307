"""Random modules of every family for a weight of any shape, each with what it changes, told in float64 by the
family's definition: (tensors by part name, alpha or None, W ↦ ΔW)."""

from __future__ import annotations

from collections.abc import Callable

import torch

Tensors = dict[str, torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]
Sample = tuple[Tensors, Change]
RANK, ALPHA = 3, 2.0


class Dice:
    """Reproducible random tensors in fp16, as trainers save them."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 0.1) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).half()


def _alpha() -> Tensors:
    return {"alpha": torch.tensor(ALPHA)}


def lora(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, c, *kernel = shape
    up, down = dice(n, RANK, *[1] * len(kernel)), dice(RANK, c, *kernel)
    delta = ALPHA / RANK * up.double().flatten(1) @ down.double().flatten(1)
    return {"lora_up.weight": up, "lora_down.weight": down, **_alpha()}, lambda w: delta.reshape(w.shape)


def locon_cp(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, c, *kernel = shape
    if not kernel:
        return lora(shape, dice)
    up, mid, down = dice(n, RANK, 1, 1), dice(RANK, RANK, *kernel, scale=0.3), dice(RANK, c, 1, 1)
    delta = torch.zeros(shape, dtype=torch.float64)
    for p in range(RANK):
        for q in range(RANK):
            outer = up[:, p].double().flatten()[:, None] * down[q].double().flatten()[None]
            delta += ALPHA / RANK * outer[:, :, None, None] * mid[p, q].double()
    return {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, **_alpha()}, lambda w: delta


def loha(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, k = shape[0], torch.Size(shape[1:]).numel()
    a1, b1, a2, b2 = (dice(*size, scale=0.3) for size in ((n, RANK), (RANK, k), (n, RANK), (RANK, k)))
    delta = ALPHA / RANK * (a1.double() @ b1.double()) * (a2.double() @ b2.double())
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, **_alpha()}, (
        lambda w: delta.reshape(w.shape)
    )


def loha_cp(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, c, *kernel = shape
    if not kernel or tuple(kernel) == (1, 1):
        return loha(shape, dice)
    parts, halves = {}, []
    for i in (1, 2):
        t = dice(RANK, RANK, *kernel, scale=0.5)
        a, b = dice(RANK, n, scale=0.5), dice(RANK, c, scale=0.5)
        parts |= {f"hada_t{i}": t, f"hada_w{i}_a": a, f"hada_w{i}_b": b}
        half = torch.zeros(shape, dtype=torch.float64)
        for p in range(RANK):
            for q in range(RANK):
                outer = a[p].double()[:, None] * b[q].double()[None]
                half += outer[:, :, None, None] * t[p, q].double()
        halves.append(half)
    delta = ALPHA / RANK * halves[0] * halves[1]
    return {**parts, **_alpha()}, lambda w: delta


def _divisor(size: int) -> int:
    return next((d for d in (4, 2, 3, 5, 7) if size % d == 0), 1)


def _kron(w1: torch.Tensor, w2: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """w1 (a, b) ⊗ w2 (n/a, c/b, …), entry by entry of w1."""
    out = torch.zeros(shape, dtype=torch.float64)
    rows, columns = w2.shape[:2]
    for i in range(w1.shape[0]):
        for j in range(w1.shape[1]):
            out[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = w1[i, j] * w2
    return out


def lokr_full(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, c, *kernel = shape
    a, b = _divisor(n), _divisor(c)
    w1, w2 = dice(a, b, scale=0.3), dice(n // a, c // b, *kernel, scale=0.3)
    delta = _kron(w1.double(), w2.double(), shape)  # both whole: no scale
    return {"lokr_w1": w1, "lokr_w2": w2, **_alpha()}, lambda w: delta


def lokr(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, c, *kernel = shape
    a, b = _divisor(n), _divisor(c)
    k = torch.Size([c // b, *kernel]).numel()
    w1, w2a, w2b = dice(a, b, scale=0.3), dice(n // a, RANK, scale=0.3), dice(RANK, k, scale=0.3)
    w2 = (w2a.double() @ w2b.double()).reshape(n // a, c // b, *kernel)
    delta = ALPHA / RANK * _kron(w1.double(), w2, shape)
    return {"lokr_w1": w1, "lokr_w2_a": w2a, "lokr_w2_b": w2b, **_alpha()}, lambda w: delta


def full(shape: tuple[int, ...], dice: Dice) -> Sample:
    diff = dice(*shape, scale=0.05)
    return {"diff": diff}, lambda w: diff.double()


def ia3(shape: tuple[int, ...], dice: Dice) -> Sample:
    w = dice(shape[0], 1)
    return {"weight": w, "on_input": torch.tensor(False)}, (
        lambda weight: weight * w.double().reshape(-1, *[1] * (weight.dim() - 1))
    )


def _dora(shape: tuple[int, ...], dice: Dice, axis: int) -> Sample:
    tensors, change = lora(shape, dice)
    others = [i for i in range(len(shape)) if i != axis]
    size = [shape[i] if i == axis else 1 for i in range(len(shape))]
    magnitude = (1 + dice(*size, scale=0.2).float()).half()

    def apply(w: torch.Tensor) -> torch.Tensor:
        v = w + change(w)
        return magnitude.double() * v / v.square().sum(others, keepdim=True).sqrt() - w

    return {**tensors, "dora_scale": magnitude}, apply


def dora_input(shape: tuple[int, ...], dice: Dice) -> Sample:
    return _dora(shape, dice, 1)


def dora_output(shape: tuple[int, ...], dice: Dice) -> Sample:
    return _dora(shape, dice, 0)


def glora(shape: tuple[int, ...], dice: Dice) -> Sample:
    n, k = shape[0], torch.Size(shape[1:]).numel()
    if len(shape) == 4 and shape[2:] != (1, 1):
        return lora(shape, dice)  # the family is for linear layers
    ones = [1] * (len(shape) - 2)
    a1, a2, b1, b2 = dice(RANK, k), dice(k, RANK), dice(RANK, k), dice(n, RANK)

    def apply(w: torch.Tensor) -> torch.Tensor:
        flat = w.flatten(1)
        delta = b2.double() @ b1.double() + flat @ a2.double() @ a1.double()
        return (ALPHA / RANK * delta).reshape(w.shape)

    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    return {**{name: t.reshape(*t.shape, *ones) for name, t in parts.items()}, **_alpha()}, apply


def oft(shape: tuple[int, ...], dice: Dice) -> Sample:
    """Block rotations of the rows by Cayley's transform, as kohya's networks.oft writes them."""
    n = shape[0]
    count = _divisor(n)
    size = n // count
    blocks = dice(count, size, size, scale=0.03)

    def apply(w: torch.Tensor) -> torch.Tensor:
        flat, eye = w.flatten(1), torch.eye(size, dtype=torch.float64)
        out = torch.zeros_like(flat)
        for i in range(count):
            q = blocks[i].double() - blocks[i].double().T
            rotation = (eye + q) @ torch.linalg.inv(eye - q)
            rows = slice(i * size, (i + 1) * size)
            out[rows] = rotation.T @ flat[rows]
        return (out - flat).reshape(w.shape)

    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, apply


SAMPLES: dict[str, Callable[[tuple[int, ...], Dice], Sample]] = {
    f.__name__: f
    for f in (lora, locon_cp, loha, loha_cp, lokr_full, lokr, full, ia3, dora_input, dora_output, glora, oft)
}
