"""What a LoRA changes in one layer of its own base: as the file has it, and as one product over all of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...adapters.adapter import BIAS
from ...adapters.lora import DOWN, UP, UP_BIAS
from ...adapters.norm import SHIFT
from ...algebra.factored import LowRank, norm
from ...errors import NumericalError
from ...layouts.adapter_file import Entry, Target
from ...layouts.dialects import parts
from ..adapter_inputs import LoraInput
from ..convert_modules import alpha_tensor
from .spec import USUAL_RANK

Tensors = dict[str, torch.Tensor]
Use = tuple[Entry, Target]

ALPHA = "alpha"
BIAS_PARTS = frozenset((BIAS, SHIFT, UP_BIAS))
_ELSEWHERE = "lora_magnitude_vector"  # PEFT's spelling, which kohya's files do not have
_KOHYA_LIKE = (parts.KOHYA, parts.LYCORIS)


@dataclass(frozen=True)
class Change:
    """low: of the weight, float32; None for a change of the bias alone.  rank: the most that is worth keeping of it,
    None for all.  bias: (n,) or None."""

    low: LowRank | None
    bias: torch.Tensor | None
    dtype: torch.dtype
    rank: int | None = None

    @property
    def energy(self) -> float:
        """‖ΔW‖²_F."""
        return 0.0 if self.low is None else norm(self.low) ** 2

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return self.energy == 0 and (self.bias is None or not bool(self.bias.any()))


def read_change(lora: LoraInput, uses: Sequence[Use], weight: torch.Tensor) -> Change:
    """The change of a layer's weight (n, …), float32, by all modules of a LoRA that have rows of it.

    Raises NumericalError for NaN or Inf.
    """
    n, k = weight.flatten(1).shape
    ups, downs, bias, dtype, ranks = [], [], None, None, 0
    for entry, target in uses:
        adapter = lora.load(entry)
        rows = slice(target.start, target.stop)
        dtype = dtype or next(t.dtype for part, t in adapter.tensors.items() if t.is_floating_point())
        if set(entry.shapes) - BIAS_PARTS:
            low = adapter.low_rank(torch.float32)
            if low is None:
                change = adapter.change(weight[rows])
                low = _whole(change.reshape(target.stop - target.start, k))
                ranks = max(ranks, USUAL_RANK)
            up = torch.zeros(n, low.rank)
            up[rows] = low.scale * low.up.float()
            ups.append(up)
            downs.append(low.down.float())
        own = adapter.bias_change()
        if own is not None:
            bias = torch.zeros(n) if bias is None else bias
            bias[rows] = own.float()
    assert dtype is not None
    low = LowRank(torch.cat(ups, 1), torch.cat(downs)) if ups else None
    found = Change(low, bias, dtype, ranks or None)
    if not math.isfinite(found.energy) or not (bias is None or bool(bias.isfinite().all())):
        raise damaged(lora, uses[0][0])
    return found


def verbatim(
    lora: LoraInput, uses: Sequence[Use], rank: int | None, dtype: torch.dtype | None, same_weight: bool
) -> Tensors | None:
    """A module's tensors by kohya's part names, to mean the same in another model's layer of the same size.

    None where that takes computing: several modules for one layer, a change that depends on the weight (unless that
    is the same), a rank above what is asked for.  dtype: None to keep the very bits.
    """
    (entry, target), family = uses[0], lora.families[uses[0][0].key]
    whole = target.module.weight is not None and (target.start, target.stop) == (0, target.module.weight.shape[0])
    if len(uses) > 1 or not whole or target.swapped or target.channels is not None or _ELSEWHERE in entry.parts:
        return None
    own = family.rank(entry.shapes)
    if family.needs_weight and not same_weight:
        return None
    is_change = len(target.shape) > 1 and set(entry.shapes) - BIAS_PARTS
    if is_change and rank is not None and (family.family != "lora" or own is None or own > rank):
        return None
    out = {part: lora.file.file.read(info) for part, info in entry.parts.items()}
    for part, tensor in out.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise damaged(lora, entry)
        if dtype is not None and tensor.is_floating_point() and part not in (ALPHA, "scale"):
            out[part] = cast(tensor, dtype, entry.key)
    if UP_BIAS in out:  # kohya's files have it as a change of its own
        bias = lora.load(entry).bias_change()
        assert bias is not None
        del out[UP_BIAS]
        out[BIAS] = cast(bias, out[UP].dtype, entry.key)
    if lora.file.dialect not in _KOHYA_LIKE and not {ALPHA, "scale"} & out.keys() and DOWN in out:
        alpha = entry.alpha
        out[ALPHA] = alpha_tensor(len(out[DOWN]) if alpha is None else alpha, out[DOWN].dtype)
    return out


def cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """In another number format. NumericalError if that cannot hold it."""
    out = tensor.to(dtype)
    if not bool(out.float().isfinite().all()):
        raise NumericalError(
            f"{name} does not fit the number format {str(dtype).removeprefix('torch.')}.",
            "Its largest numbers overflow.", "Choose bf16 or fp32.",
        )  # fmt: skip
    return out


def damaged(lora: LoraInput, entry: Entry) -> NumericalError:
    """The error for NaN or Inf in a module."""
    return NumericalError(
        f"{entry.key} in {lora.path.name} holds NaN or Inf, or makes them.", "The LoRA or its base is damaged.",
        "Get a sound copy.",
    )  # fmt: skip


def _whole(change: torch.Tensor) -> LowRank:
    """A whole matrix as a product with the identity, so that it goes the way of all others."""
    n, k = change.shape
    if n <= k:
        return LowRank(torch.eye(n), change)
    return LowRank(change, torch.eye(k))
