"""What came out of a job, in the words every front end shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Output:
    """A file that was written."""

    path: str
    bytes: int
    sha256: str


@dataclass
class Report:
    """A finished job.  modules: written; skipped: looked at and left out; unreachable: changed tensors that
    the written file cannot carry.  details: what only this verb measures, JSON-ready.  exit_code: the command
    line's, where a job is done but for a part of what was asked."""

    verb: str
    outputs: list[Output] = field(default_factory=list)
    relative_error: float | None = None
    modules: int = 0
    skipped: int = 0
    unreachable: int = 0
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "verb": self.verb,
            "outputs": [vars(output) for output in self.outputs],
            "relative_error": self.relative_error,
            "modules": self.modules,
            "skipped": self.skipped,
            "unreachable": self.unreachable,
            "warnings": self.warnings,
            "seconds": round(self.seconds, 3),
            **self.details,
        }
