"""Low-rank changes made in a frequency domain (FouRA, arXiv 2406.08798), as the plain ones that they are.

FouRA computes, for each input x of c numbers: y = W·x + s · F⁻¹_n(B·diag(g)·A·F_c(x)), where F_m is a
transform along m channels and g a gate on the r directions that depends on x. With the gate frozen, that is the change
ΔW = s · F_n⁻¹ · B · diag(g) · A · F_c, and where F is
 - the discrete cosine transform, real: ΔW = (F_n⁻¹·B·diag(s·g))·(A·F_c), of rank r exactly;
 - the discrete Fourier transform, complex: with P = F_n⁻¹·B·diag(s·g) and Q = A·F_c a layer keeps the real part,
   Re(P·Q) = [Re P, −Im P]·[Re Q; Im Q], of rank 2r at most.
Both in their orthonormal scaling, in which the inverse is the conjugate transpose. No file format is known.
"""

from __future__ import annotations

import math

from ..lazy import torch
from .factored import LowRank


def cosine_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II (size, size) float64: C[j,i] = √(2/m)·cos(π·(i + ½)·j/m), row 0 divided by √2."""
    i = torch.arange(size, dtype=torch.float64)
    C = math.sqrt(2 / size) * torch.cos(math.pi / size * i[:, None] * (i + 0.5))
    C[0] /= math.sqrt(2)
    return C


def fourier_matrix(size: int) -> torch.Tensor:
    """The orthonormal DFT (size, size) complex128: F[j,i] = e^(−2πi·j·i/m)/√m."""
    i = torch.arange(size)
    angle = -2 * math.pi / size * (i[:, None] * i % size).double()  # whole turns taken off while the numbers are exact
    return torch.polar(torch.full_like(angle, 1 / math.sqrt(size)), angle)


def to_low_rank(
    up: torch.Tensor, down: torch.Tensor, gate: torch.Tensor | None = None, transform: str = "dct", scale: float = 1.0
) -> LowRank:
    """The plain change that a frozen-gate FouRA layer makes.

    up: B (n, r), down: A (r, c), real or, with "dft", complex.  gate: g (r,); None for all ones.
    transform: "dct" or "dft".  Gives float64 factors of rank r, or 2r with "dft"; ValueError for another transform.
    """
    gated = up if gate is None else up * gate
    if transform == "dct":
        n, c = cosine_matrix(len(up)), cosine_matrix(down.shape[1])
        return LowRank(n.mT @ gated.double(), down.double() @ c, scale)
    if transform != "dft":
        raise ValueError(f"transform is dct or dft, not {transform}")
    P = fourier_matrix(len(up)).mH @ gated.to(torch.complex128)
    Q = down.to(torch.complex128) @ fourier_matrix(down.shape[1])
    return LowRank(torch.cat((P.real, -P.imag), 1), torch.cat((Q.real, Q.imag)), scale)
