"""Convert: a LoRA into another dialect or family, a checkpoint into another number format."""

from __future__ import annotations

from . import convert_adapter, convert_checkpoint, convert_plan
from .convert_checkpoint import CheckpointPlan
from .convert_plan import AdapterPlan
from .convert_spec import ConvertSpec
from .host import Context, Host
from .report import Report

__all__ = ["ConvertSpec", "make_plan", "run"]


def make_plan(spec: ConvertSpec, host: Host) -> AdapterPlan | CheckpointPlan:
    """Open everything and check what can be known before computing.

    Raises SpecError, FormatError, LayoutError or OutputError.
    """
    return (convert_checkpoint if spec.lora is None else convert_plan).make_plan(spec, host)


def run(plan: AdapterPlan | CheckpointPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    if isinstance(plan, CheckpointPlan):
        return convert_checkpoint.run(plan, host, context)
    return convert_adapter.run(plan, host, context)
