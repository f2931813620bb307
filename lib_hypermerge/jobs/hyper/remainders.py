"""Remainder files: what a model's norms and biases differ by from the hyper-model's, which no shared LoRA carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...adapters import norm
from ...adapters.adapter import BIAS as DIFF_B
from ...errors import NumericalError
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.metadata import lora_metadata, with_hashes
from ...files.writer import SafetensorsWriter, header_bytes
from .align import few
from .inputs import Inputs
from .rest_values import RestValues
from .rests import BIAS, NORM, Rest
from .spec import ALL, NONE, NORMS, HyperSpec

_WIDEST = 10**12  # an offset that no such file reaches
_SLACK = 256  # bytes of header for what is measured last
_COMMENT = "remainder of a hyper-merge by Hypermerge"


@dataclass
class Remainder:
    """One model's file. writer: sealed, not yet published; None in a preview.  modules: how many it changes.

    before, after: squared error of what it changes, without and with it.
    """

    label: str
    path: Path
    writer: SafetensorsWriter | None
    modules: int = 0
    before: float = 0.0
    after: float = 0.0

    @property
    def bytes(self) -> int:
        return 0 if self.writer is None or self.writer.sealed is None else self.writer.sealed.bytes

    def restores(self, rest_error2: float) -> float:
        """The share that it takes away of the squared error of everything outside LoRA layers."""
        return (self.before - self.after) / rest_error2 if rest_error2 > 0 else 0.0


def make(
    inputs: Inputs, spec: HyperSpec, rests: Sequence[Rest], values: RestValues, paths: dict[str, Path], hyper: str,
    write: bool, check: Callable[[], None] = lambda: None,
) -> list[Remainder]:  # fmt: skip
    """The files of all models for which one lowers the error; sealed, and the caller's to publish or to abort.

    A model's change of a norm is w_norm + b_norm, which A1111, Forge and ComfyUI load; of another layer's bias
    diff_b, which A1111 refuses beside no LoRA of the layer. Only what comes closer once rounded is written.
    paths: by label.  hyper: the hyper-model's file name.  NumericalError if a change does not fit the number format.
    """
    groups = _groups(rests, spec)
    made: list[Remainder] = []
    try:
        for label in inputs.labels:
            one = Remainder(label, paths[label], None)
            made.append(one)
            if write:
                one.writer = SafetensorsWriter(one.path, _header(groups, inputs, spec, one, hyper), spec.overwrite)
        for own in groups:
            check()
            _add(made, own, values, torch_dtype(OUTPUT_DTYPES[spec.dtype]))
        for one in made:
            if one.writer is not None and one.modules:
                metadata = _metadata(inputs, spec, one, hyper)
                one.writer.seal(lambda data, legacy, own=metadata: with_hashes(own, data, legacy))
    except BaseException:
        _abort(made)
        raise
    _abort([one for one in made if not one.modules])
    return [one for one in made if one.modules]


def note(remainders: Sequence[Remainder], inputs: Inputs, spec: HyperSpec) -> list[str]:
    """What to say where remainder files were asked for and some or all models have none."""
    if spec.remainders == NONE:
        return []
    have = {remainder.label for remainder in remainders}
    without = [label for label in inputs.labels if label not in have]
    what = "norms" if spec.remainders == NORMS else "norms and biases"
    if not have:
        return [f"No remainder files: the models' {what} are those of the hyper-model, or closer to them than the "
                "files' number format tells."]  # fmt: skip
    return [f"No remainder file for {few(without)}, whose {what} are those of the hyper-model."] if without else []


def _abort(remainders: Sequence[Remainder]) -> None:
    for one in remainders:
        if one.writer is not None:
            one.writer.abort()


def _groups(rests: Sequence[Rest], spec: HyperSpec) -> list[tuple[Rest, ...]]:
    """(weight, bias) of every norm, (bias,) of other layers where asked for. A part of a fused layer has no name of
    its own for its bias."""
    found: dict[str, list[Rest]] = {}
    for rest in rests:
        module = rest.module
        if module is None or module.name is None or module.bias is None or module.part is not None:
            continue
        if rest.kind == NORM or (rest.kind == BIAS and spec.remainders == ALL):
            found.setdefault(module.name, []).append(rest)
    groups = []
    for own in found.values():
        own.sort(key=lambda rest: rest.label)  # "….bias" follows the weight
        if len(own) == (2 if own[0].kind == NORM else 1):  # A1111 refuses a norm without its bias
            groups.append(tuple(own))
    return groups


def _add(remainders: list[Remainder], own: tuple[Rest, ...], values: RestValues, dtype: torch.dtype) -> None:
    written = [values.value(rest).tensor.double() for rest in own]
    module = own[0].module
    assert module is not None and module.name is not None
    for m, remainder in enumerate(remainders):
        if not all(m in rest.parts for rest in own):
            continue
        changes = [values.own(rest, m) - w for rest, w in zip(own, written, strict=True)]
        rounded = [change.to(dtype) for change in changes]
        before = sum(float(change.square().sum()) for change in changes)
        after = sum(float((c - r.double()).square().sum()) for c, r in zip(changes, rounded, strict=True))
        if not all(bool(r.isfinite().all()) for r in rounded):
            raise NumericalError(
                f"The change of {own[0].label} in {remainder.label} is too large for "
                f"{str(dtype).removeprefix('torch.')}.", hint="Choose fp32 or bf16 for the LoRAs.",
            )  # fmt: skip
        if not after < before:
            continue
        remainder.modules += 1
        remainder.before += before
        remainder.after += after
        if remainder.writer is not None:
            for name, tensor in _tensors(module.name, rounded, dtype):
                remainder.writer.add(name, tensor)


def _tensors(name: str, changes: list[torch.Tensor], dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    if len(changes) == 2:
        return list(norm.tensors(name, changes[0], changes[1], dtype))
    return [norm.bias_tensor(name, changes[0], dtype)]


def _header(groups: list[tuple[Rest, ...]], inputs: Inputs, spec: HyperSpec, remainder: Remainder, hyper: str) -> int:
    entries: dict[str, Any] = {}
    for own in groups:
        module = own[0].module
        assert module is not None
        for part in (norm.WEIGHT, norm.SHIFT) if len(own) == 2 else (DIFF_B,):
            shape = [own[0].info.numel]
            entries[f"{module.name}.{part}"] = {"dtype": "BF16", "shape": shape, "data_offsets": [_WIDEST, _WIDEST]}
    metadata = _metadata(inputs, spec, remainder, hyper)
    return len(header_bytes(entries, with_hashes(metadata, "0" * 64, "0" * 8))) + _SLACK


def _metadata(inputs: Inputs, spec: HyperSpec, remainder: Remainder, hyper: str) -> dict[str, str]:
    recipe = {
        "job": "hyper-remainder", "hyper": hyper, "model": remainder.label, "remainders": spec.remainders,
        "modules": remainder.modules,
    }  # fmt: skip
    metadata = lora_metadata(
        name=remainder.path.stem, base=inputs.template.base, base_file=hyper, ranks={}, conv_ranks={}, recipe=recipe
    )
    own = {key: text for key, text in metadata.items() if not key.startswith("ss_network")}  # it has no factors
    return own | {"ss_training_comment": _COMMENT}
