"""What of a container is stored for one layer: from the whole changes E_m, rounded, and measured as rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...lazy import torch
from ..lowrank import Matrix, check_range, decompose, least_squares, signs_of

_SCALES = (-6, 15)  # of the ups, as powers of two: their numbers stay normal ones of fp16


@dataclass(frozen=True)
class Finished:
    """E_m ≈ up·cores[m]·down in the output's dtype, on the CPU.

    up: (n, a) by descending energy.  cores: (M, a, b).  errors: (M,) float64, ‖E_m − up·cores[m]·down‖²_F of
    the rounded numbers; differences of energies, so below 1e-7 of the energy they are rounding noise.
    """

    up: torch.Tensor
    cores: torch.Tensor
    errors: torch.Tensor


def finish(
    Q: torch.Tensor, down: torch.Tensor, energies: torch.Tensor, rank: int | None = None, seed: int = 0
) -> Finished:
    """The best up and cores for a down that is already rounded to the output's dtype.

    Q: (M, n, b) float32, E_m·downᵀ of the whole changes.  down: (b, k) in the output's dtype, rows about
    orthonormal.  energies: (M,) float64, ‖E_m‖²_F.  rank: columns that the up may have, by default b.  The up spans
    the leading left singular vectors of all Q_m·(down·downᵀ)^-½ beside each other; given its rounded numbers and
    those of down, the cores solve least squares, so that rounding the bases costs next to nothing.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    wide = down.to(Q.device).double() if Q.device.type != "mps" else down.double().cpu()
    G = wide @ wide.mT
    w, X = torch.linalg.eigh(G)
    there = w > 1e-8 * w[-1]
    whitened = Q @ (X * torch.where(there, w.clamp_min(1e-300).rsqrt(), 0.0)).to(Q.device, torch.float32)  # (M, n, b)
    U = _leading(whitened.transpose(0, 1).flatten(1), len(down) if rank is None else rank, seed)
    size = float((U.mT @ whitened).abs().amax()) if whitened.numel() else 0.0
    exponent = round(math.log2(size)) if 0 < size < math.inf else 0
    up = (U * signs_of(U) * 2.0 ** max(_SCALES[0], min(_SCALES[1], exponent))).to(down.dtype)
    check_range(up, down.dtype)
    tall = up.to(G.device).double()
    H = tall.mT @ tall
    P = torch.stack([tall.mT @ q.to(G.device).double() for q in Q])  # (M, a, b)
    C = least_squares(G, torch.stack([least_squares(H, p) for p in P]).mT).mT
    cores = C.to(down.dtype)
    check_range(cores, down.dtype)
    rounded = cores.double()
    errors = energies.to(G.device) + ((H @ rounded @ G - 2 * P) * rounded).sum((1, 2))
    return Finished(up.cpu().contiguous(), cores.cpu().contiguous(), errors.clamp_min(0).cpu())


def _leading(A: torch.Tensor, r: int, seed: int) -> torch.Tensor:
    """Orthonormal columns (n, ≤ r): the leading left singular vectors of A (n, m)."""
    matrix = Matrix(A, float(A.double().square().sum()) if A.device.type != "mps" else float(A.square().sum()))
    short, _ = matrix.short_first()
    basis = decompose(matrix, r, seed=seed)
    on_left = (basis.side == "left") == matrix.wide
    rows = basis.rows if on_left else basis.rows @ (short.mT if basis.side == "right" else short)
    return torch.linalg.qr(rows.mT).Q
