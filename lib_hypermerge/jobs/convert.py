"""Convert: a LoRA into another dialect or family, a checkpoint into another number format."""

from __future__ import annotations

from . import convert_checkpoint
from .convert_checkpoint import CheckpointPlan
from .convert_spec import ConvertSpec
from .host import Context, Host
from .report import Report

__all__ = ["ConvertSpec", "make_plan", "run"]


def make_plan(spec: ConvertSpec, host: Host) -> CheckpointPlan:
    """Open everything and check what can be known before computing."""
    return convert_checkpoint.make_plan(spec, host)


def run(plan: CheckpointPlan, host: Host, context: Context) -> Report:
    """Carry out a plan."""
    return convert_checkpoint.run(plan, host, context)
