"""A LoRA file of any family as one of the models: its base with the file applied at strength 1."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from ...adapters.adapter import BIAS, Adapter
from ...adapters.lora import UP_BIAS
from ...adapters.norm import SHIFT
from ...algebra.products import times_transposed
from ...errors import OutputError
from ...layouts.adapter_file import Entry, Target
from ...layouts.module import LORA_KINDS, Model
from ..adapter_inputs import LoraInput, open_lora
from .align import few
from .sources import Layer, Source, as_bytes

_BIAS_PARTS = frozenset((BIAS, SHIFT, UP_BIAS))
_HELD = 128 << 20  # bytes of whole changes that a thread keeps in memory, all LoRAs together
_DENSE = 4  # a product pays while its factors are this much smaller than the matrix


@dataclass(frozen=True)
class _Product:
    """Rows start…stop of a change are up · down_tᵀ, both float32."""

    start: int
    stop: int
    up: torch.Tensor
    down_t: torch.Tensor

    def into(self, a: int, b: int, out: torch.Tensor) -> None:
        out.copy_(times_transposed(self.up[a - self.start : b - self.start], self.down_t))


@dataclass(frozen=True)
class _Whole:
    """Rows start…stop of a change that only all together can be computed."""

    start: int
    stop: int
    rows: torch.Tensor

    def into(self, a: int, b: int, out: torch.Tensor) -> None:
        out.copy_(self.rows[a - self.start : b - self.start])


@dataclass(frozen=True)
class _Spilled:
    """The same in a file of the thread's own, from `offset` on."""

    start: int
    stop: int
    file: IO[bytes]
    offset: int

    def into(self, a: int, b: int, out: torch.Tensor) -> None:
        rows = torch.empty(out.shape)
        view, done = as_bytes(rows), 0
        self.file.seek(self.offset + (a - self.start) * out.shape[1] * 4)
        while done < len(view):
            got = self.file.readinto(view[done:])  # type: ignore[attr-defined]  # unbuffered files have it
            if not got:
                raise OutputError("A temporary file ends too early.", "Another program changed it.", "Run it again.")
            done += got
        out.copy_(rows)


class _Latest(threading.local):
    """What a thread keeps of the layer that it works on."""

    def __init__(self):
        self.key = ""
        self.pieces: list[_Product | _Whole | _Spilled] = []
        self.file: IO[bytes] | None = None


class LoraSource(Source):
    """rows_into gives the change of the base. Thread-safe; settle() comes first.

    reached: keys of the layers that it changes and all models share.
    """

    relative = True

    def __init__(self, lora: LoraInput, base: Model):
        self.lora, self.base, self.path, self.file, self.label = lora, base, lora.path, lora.file.file, lora.path.name
        self._targets: dict[str, list[tuple[Entry, Target]]] = {}
        self._latest = _Latest()
        self._held = _HELD

    @property
    def reached(self) -> set[str]:
        return set(self._targets)

    def settle(self, shared: set[str], loras: int) -> list[str]:
        """Learn which layers are shared, and among how many LoRAs memory is; returns what is left out, as sentences."""
        self._held = _HELD // max(1, loras)
        others, elsewhere, biases = [], [], 0
        for entry, target in self.lora.resolution.targets:
            module = target.module
            key = f"{module.component}.{module.path}"
            if _BIAS_PARTS & entry.parts.keys() and entry.key not in self.lora.idle:
                biases += 1
            if entry.key in self.lora.idle or not set(entry.shapes) - _BIAS_PARTS:
                continue
            if module.kind not in LORA_KINDS or module.name is None:
                others.append(key)
            elif key not in shared:
                elsewhere.append(key)
            else:
                self._targets.setdefault(key, []).append((entry, target))
        return [*self.lora.warnings, *self._left_out(others, elsewhere, biases)]

    def _left_out(self, others: list[str], elsewhere: list[str], biases: int) -> list[str]:
        name, out = self.path.name, []
        if others:
            out.append(f"{name}: {len(others)} changes of norms, embeddings and the like, which shared LoRAs do not "
                       f"carry ({few(others)}); left out.")  # fmt: skip
        if biases:
            out.append(f"{name}: {biases} changes of biases, which shared LoRAs do not carry; left out.")
        if elsewhere:
            out.append(f"{name}: {len(elsewhere)} changes of layers that not all models have "
                       f"({few(elsewhere)}); left out.")  # fmt: skip
        if self.lora.file.embeddings:
            out.append(f"{name}: {len(self.lora.file.embeddings)} tensors of embeddings; left out.")
        return out

    def rows_into(self, layer: Layer, start: int, stop: int, out: torch.Tensor) -> None:
        pieces = self._prepared(layer.key, layer.shape[1])
        if sum(piece.stop - piece.start for piece in pieces) < layer.shape[0]:
            out.zero_()
        for piece in pieces:
            a, b = max(start, piece.start), min(stop, piece.stop)
            if a < b:
                piece.into(a, b, out[a - start : b - start])

    def _prepared(self, key: str, k: int) -> Sequence[_Product | _Whole | _Spilled]:
        """The change of a layer; what was computed for the thread's layer before is let go."""
        latest = self._latest
        if latest.key != key:
            latest.key, latest.pieces = "", []
            held = 0
            for entry, target in self._targets.get(key, ()):
                latest.pieces.append(self._piece(entry, target, k, held))
                held += (target.stop - target.start) * k * 4
            latest.key = key
        return latest.pieces

    def _piece(self, entry: Entry, target: Target, k: int, held: int) -> _Product | _Whole | _Spilled:
        adapter = self.lora.load(entry)
        start, stop = target.start, target.stop
        low = None if adapter.needs_weight else adapter.low_rank(torch.float32)
        n = stop - start
        plain = self.lora.families[entry.key].family == "lora"
        if low is not None and (plain or _DENSE * low.rank * (n + k) < n * k):
            return _Product(start, stop, low.scale * low.up.float().contiguous(), low.down.float().mT.contiguous())
        change = self._change(adapter, target).reshape(n, k)
        if held + change.numel() * 4 <= self._held:
            return _Whole(start, stop, change)
        return _Spilled(start, stop, self._spill(change, held), held)

    def _change(self, adapter: Adapter, target: Target) -> torch.Tensor:
        info = target.module.weight
        assert info is not None
        return adapter.change(self.base.file.read(info.rows(target.start, target.stop)).float())

    def _spill(self, change: torch.Tensor, offset: int) -> IO[bytes]:
        """Many LoRAs' whole changes do not fit into memory; a file without a name is gone with the thread."""
        latest = self._latest
        try:
            if latest.file is None:
                latest.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - kept by the thread
            latest.file.seek(offset)
            view, done = as_bytes(change.contiguous()), 0
            while done < len(view):
                done += latest.file.write(view[done:])
        except OSError as error:
            raise OutputError(
                "The change of a layer could not be put into a temporary file.", f"{error.strerror}.",
                f"Make room in {tempfile.gettempdir()}, or choose fewer LoRAs.",
            ) from None  # fmt: skip
        return latest.file


def open_source(path: Path, base: Model) -> LoraSource:
    """A LoRA file or PEFT folder. Raises SpecError, FormatError or LayoutError (for another model)."""
    return LoraSource(open_lora(path, base), base)
