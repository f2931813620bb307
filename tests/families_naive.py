"""Every family by its definition: loops and plain products over numpy doubles, one small module of each kind.

A case makes the tensors of a module for a weight's shape and says, in the plainest way, what W becomes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Parts = dict[str, np.ndarray]

N, C, K = 12, 8, 3
LINEAR, CONV1, CONV3, NORM = (N, C), (N, C, 1, 1), (N, C, K, K), (N,)
LAYERS = {"linear": LINEAR, "conv1x1": CONV1, "conv3x3": CONV3}


@dataclass(frozen=True)
class Case:
    """make(rng, shape) → parts; tuned(parts, W, alpha) → W'.  ranks: what the file calls its dimension."""

    family: str
    make: Callable[[np.random.Generator, tuple[int, ...]], Parts]
    tuned: Callable[[Parts, np.ndarray, float | None], np.ndarray]
    shapes: tuple[tuple[int, ...], ...] = (LINEAR, CONV1, CONV3)
    rank: int | None = None


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _kernel(shape):
    return shape[2:] if len(shape) > 2 else ()


def _columns(shape):
    return int(np.prod(shape[1:]))


# LoRA


def lora_parts(rng, shape, r=3):
    kernel = _kernel(shape)
    return {
        "lora_up.weight": rng.standard_normal((shape[0], r) + (1,) * len(kernel)),
        "lora_down.weight": rng.standard_normal((r, shape[1], *kernel)),
    }


def lora(parts, W, alpha):
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    r = len(down)
    change = np.zeros((W.shape[0], _columns(W.shape)))
    for o, p in itertools.product(range(W.shape[0]), range(r)):
        change[o] += up.reshape(len(up), r)[o, p] * down.reshape(r, -1)[p]
    return W + _scale(alpha, r) * change.reshape(W.shape)


def lora_mid_parts(rng, shape, r=3):
    return {
        "lora_up.weight": rng.standard_normal((shape[0], r, 1, 1)),
        "lora_mid.weight": rng.standard_normal((r, r, *_kernel(shape))),
        "lora_down.weight": rng.standard_normal((r, shape[1], 1, 1)),
    }


def lora_mid(parts, W, alpha):
    up, mid, down = (parts[f"lora_{name}.weight"] for name in ("up", "mid", "down"))
    change = np.zeros(W.shape)
    for o, i, p, q in itertools.product(range(N), range(C), range(len(mid)), range(len(down))):
        change[o, i] += up[o, p, 0, 0] * mid[p, q] * down[q, i, 0, 0]
    return W + _scale(alpha, len(down)) * change


def sparse_parts(rng, shape):
    places = rng.choice(N * _columns(shape), 5, replace=False)
    return lora_parts(rng, shape) | {
        "bias_indices": np.stack(np.divmod(places, _columns(shape))).astype(np.int16),
        "bias_values": rng.standard_normal(5),
        "bias_size": np.array([N, _columns(shape)], np.int16),
    }


def sparse(parts, W, alpha):
    rest = np.zeros((N, _columns(W.shape)))
    for row, column, value in zip(*parts["bias_indices"], parts["bias_values"], strict=True):
        rest[row, column] = value
    return lora(parts, W, alpha) + _scale(alpha, 3) * rest.reshape(W.shape)


# LoHa


def loha_parts(rng, shape, r=2):
    k = _columns(shape)
    sizes = {"hada_w1_a": (N, r), "hada_w1_b": (r, k), "hada_w2_a": (N, r), "hada_w2_b": (r, k)}
    return {name: rng.standard_normal(size) for name, size in sizes.items()}


def loha(parts, W, alpha):
    first = parts["hada_w1_a"] @ parts["hada_w1_b"]
    second = parts["hada_w2_a"] @ parts["hada_w2_b"]
    return W + _scale(alpha, len(parts["hada_w1_b"])) * (first * second).reshape(W.shape)


def loha_tucker_parts(rng, shape, r=2):
    sizes = {"w1_a": (r, N), "w1_b": (r, C), "w2_a": (r, N), "w2_b": (r, C)}
    sizes |= {"t1": (r, r, *_kernel(shape)), "t2": (r, r, *_kernel(shape))}
    return {f"hada_{name}": rng.standard_normal(size) for name, size in sizes.items()}


def _tucker(core, a, b):
    out = np.zeros((a.shape[1], b.shape[1], *core.shape[2:]))
    for o, i, p, q in itertools.product(range(a.shape[1]), range(b.shape[1]), range(len(a)), range(len(b))):
        out[o, i] += core[p, q] * a[p, o] * b[q, i]
    return out


def loha_tucker(parts, W, alpha):
    first, second = (_tucker(*(parts[f"hada_{name.format(i)}"] for name in ("t{}", "w{}_a", "w{}_b"))) for i in (1, 2))
    return W + _scale(alpha, len(parts["hada_w1_b"])) * first * second


# LoKr: W is (3·4, 2·4)


def lokr_parts(first, second):
    def make(rng, shape, r=2):
        kernel = _kernel(shape)
        columns = 4 * int(np.prod(kernel))
        sizes = {
            "whole": {"lokr_w1": (3, 2)},
            "factored": {"lokr_w1_a": (3, r), "lokr_w1_b": (r, 2)},
        }[first] | {
            "whole": {"lokr_w2": (4, 4, *kernel)},
            "factored": {"lokr_w2_a": (4, r), "lokr_w2_b": (r, columns)},
            "tucker": {"lokr_w2_a": (r, 4), "lokr_w2_b": (r, 4), "lokr_t2": (r, r, *kernel)},
        }[second]
        return {name: rng.standard_normal(size) for name, size in sizes.items()}

    return make


def lokr(parts, W, alpha):
    rank = None
    if "lokr_w1" in parts:
        first = parts["lokr_w1"]
    else:
        first, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], len(parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        second = parts["lokr_w2"]
    else:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        rank = len(b)
        second = _tucker(parts["lokr_t2"], a, b) if "lokr_t2" in parts else a @ b
    second = second.reshape(4, 4, *_kernel(W.shape))
    change = np.zeros(W.shape)
    for u, v, p, q in itertools.product(range(3), range(2), range(4), range(4)):
        change[4 * u + p, 4 * v + q] = first[u, v] * second[p, q]
    return W + (1.0 if rank is None else _scale(alpha, rank)) * change


# OFT


def oft_parts(rng, shape):
    return {"oft_blocks": 0.1 * rng.standard_normal((3, 4, 4))}


def _turns(blocks, alpha):
    Q = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.sqrt((Q**2).sum())
    if alpha and norm > alpha * N:
        Q = Q * alpha * N / norm
    eye = np.eye(Q.shape[-1])
    return (eye + Q) @ np.linalg.inv(eye - Q)


def _turned(R, W):
    return np.concatenate([block.T @ rows for block, rows in zip(R, W.reshape(*R.shape[:2], -1), strict=True)])


def oft(parts, W, alpha):
    return _turned(_turns(parts["oft_blocks"], alpha), W).reshape(W.shape)


def oft_rescaled_parts(rng, shape):
    return oft_parts(rng, shape) | {"rescale": 1 + 0.1 * rng.standard_normal((N,) + (1,) * (len(shape) - 1))}


def oft_rescaled(parts, W, alpha):
    return parts["rescale"].reshape((N,) + (1,) * (W.ndim - 1)) * oft(parts, W, alpha)


def oft_diag_parts(rng, shape):
    return {"oft_diag": np.linalg.qr(rng.standard_normal((3, 4, 4)))[0]}


def oft_diag(parts, W, alpha):
    return _turned(parts["oft_diag"], W).reshape(W.shape)


def boft_parts(rng, shape):
    return {"oft_blocks": 0.1 * rng.standard_normal((2, 2, 6, 6))}


def boft(parts, W, alpha):
    """Row by row: in round i, rows whose number differs by 2^i·b/2 are neighbours."""
    R = _turns(parts["oft_blocks"], alpha)
    rounds, _, b, _ = R.shape
    made = W.reshape(N, -1)
    for i in range(rounds):
        apart = 2**i * b // 2
        order = [2 * apart * c + apart * g + k for c in range(N // (2 * apart)) for k in range(apart) for g in range(2)]
        after = np.empty_like(made)
        for j in range(N // b):
            rows = order[j * b : (j + 1) * b]
            after[rows] = R[i, j] @ made[rows]
        made = after
    return made.reshape(W.shape)


# the others


def ia3_parts(on_input):
    def make(rng, shape):
        size = shape[1] if on_input else shape[0]
        weight = rng.standard_normal(size if len(shape) == 2 else (1, size, *[1] * len(_kernel(shape))))
        return {"weight": weight, "on_input": np.array(int(on_input))}

    return make


def ia3(parts, W, alpha):
    factor, made = 1 + parts["weight"].flatten(), W.copy()
    for o, i in itertools.product(range(N), range(C)):
        made[o, i] *= factor[i] if parts["on_input"] else factor[o]
    return made


def glora_parts(order):
    def make(rng, shape, r=2):
        one = (1,) * len(_kernel(shape))
        sizes = ((C, r, *one), (r, C, *one), (N, r, *one), (r, C, *_kernel(shape)))
        names = ("a1", "a2", "b1", "b2") if order == "new" else ("a2", "a1", "b2", "b1")
        return {f"{name}.weight": rng.standard_normal(size) for name, size in zip(names, sizes, strict=True)}

    return make


def glora(order):
    def tuned(parts, W, alpha):
        names = ("a1", "a2", "b1", "b2") if order == "new" else ("a2", "a1", "b2", "b1")
        up_a, down_a, up_b, down_b = (parts[f"{name}.weight"] for name in names)
        r = down_a.shape[0]
        A = up_a.reshape(C, r) @ down_a.reshape(r, C)
        change = (up_b.reshape(N, r) @ down_b.reshape(r, -1)).reshape(W.shape)
        for i, j in itertools.product(range(C), range(C)):
            change[:, j] += W[:, i] * A[i, j]
        return W + _scale(alpha, r) * change

    return tuned


def svdiff(parts, W, alpha):
    U, S, Vh = np.linalg.svd(W.reshape(len(W), -1) if W.ndim > 1 else W[None], full_matrices=False)
    return (U @ np.diag(np.maximum(S + parts["delta"], 0)) @ Vh).reshape(W.shape)


def shifts(rng, shape):
    """Some of them beyond what relu lets through."""
    return {"delta": rng.standard_normal(min(shape[0], _columns(shape)) if len(shape) > 1 else 1) - 1}


CASES = {
    "lora": Case("lora", lora_parts, lora, rank=3),
    "lora-mid": Case("lora", lora_mid_parts, lora_mid, (CONV3, CONV1), rank=3),
    "lora-sparse": Case("lora+sparse", sparse_parts, sparse, rank=3),
    "loha": Case("loha", loha_parts, loha, rank=2),
    "loha-tucker": Case("loha", loha_tucker_parts, loha_tucker, (CONV3,), rank=2),
    "lokr-whole-whole": Case("lokr", lokr_parts("whole", "whole"), lokr),
    "lokr-whole-factored": Case("lokr", lokr_parts("whole", "factored"), lokr, rank=2),
    "lokr-whole-tucker": Case("lokr", lokr_parts("whole", "tucker"), lokr, (CONV3,), rank=2),
    "lokr-factored-whole": Case("lokr", lokr_parts("factored", "whole"), lokr, rank=2),
    "lokr-factored-factored": Case("lokr", lokr_parts("factored", "factored"), lokr, rank=2),
    "lokr-factored-tucker": Case("lokr", lokr_parts("factored", "tucker"), lokr, (CONV3,), rank=2),
    "oft": Case("oft", oft_parts, oft),
    "oft-rescaled": Case("oft", oft_rescaled_parts, oft_rescaled),
    "oft-diag": Case("oft", oft_diag_parts, oft_diag),
    "boft": Case("oft", boft_parts, boft),
    "ia3-output": Case("ia3", ia3_parts(False), ia3),
    "ia3-input": Case("ia3", ia3_parts(True), ia3),
    "glora": Case("glora", glora_parts("new"), glora("new"), rank=2),
    "glora-old": Case("glora", glora_parts("old"), glora("old"), (LINEAR, CONV1), rank=2),
    "full": Case("full", lambda rng, s: {"diff": rng.standard_normal(s)}, lambda p, W, a: W + p["diff"]),
    "norm": Case(
        "norm",
        lambda rng, s: {"w_norm": rng.standard_normal(s), "b_norm": rng.standard_normal(s)},
        lambda p, W, a: W + p["w_norm"],
        (NORM,),
    ),
    "svdiff": Case("svdiff", shifts, svdiff, (LINEAR, CONV1, CONV3, NORM)),
}


def magnitudes(rng, shape, axis):
    """(n, 1, …) or (1, c, …)."""
    return rng.uniform(0.5, 2, [size if d == axis else 1 for d, size in enumerate(shape)])


def dora(V, m, axis):
    """m ∘ V/‖V‖, row by row or channel by channel."""
    made = np.empty_like(V)
    for j in range(V.shape[axis]):
        part = np.take(V, j, axis)
        made[j if axis == 0 else (slice(None), j)] = m.flatten()[j] * part / np.sqrt((part**2).sum())
    return made
