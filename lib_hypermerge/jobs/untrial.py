"""Take a tried merge back: the model in a WebUI's memory as it was."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..errors import SpecError
from .host import Context
from .report import Report
from .trial import TAKE_BACK, NoParameters, Trial, TrialHost, current


@dataclass
class Plan:
    """There is nothing to hold open."""

    trial: Trial

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_) -> None:
        pass


def make_plan(spec: NoParameters, host: TrialHost) -> Plan:
    """SpecError if the model in memory is unchanged, or was thrown away with its change."""
    trial = current(host)
    if trial is None:
        host.trial = None
        raise SpecError("There is nothing to take back.", "The model in memory is as its checkpoint.")
    return Plan(trial)


def run(plan: Plan, host: TrialHost, context: Context) -> Report:
    """Restore every tensor that was changed, from the copies."""
    begun = time.perf_counter()
    context.progress(0.0, "taking back")
    with torch.inference_mode():
        plan.trial.take_back()
    host.trial = None
    seconds = time.perf_counter() - begun
    details = {"checkpoint": plan.trial.model.checkpoint.name, "restored": len(plan.trial.originals)}
    return Report(TAKE_BACK, modules=len(plan.trial.originals), seconds=seconds, details=details)
