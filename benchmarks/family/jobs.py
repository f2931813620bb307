"""Hypermerge's jobs, run in this process as the command line runs them."""

from __future__ import annotations

import json
from typing import Any

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.report import Report
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import VERBS


def run(verb: str, **params: Any) -> Report:
    """Paths become names; what is there already is overwritten. Raises what the job raises."""
    spec = VERBS[verb].spec
    again = {"overwrite": True} if "overwrite" in spec.params() else {}
    plain = json.loads(json.dumps({**params, **again}, default=str))
    return execute(VERBS[verb], spec.from_json(plain), PathHost(), Context())
