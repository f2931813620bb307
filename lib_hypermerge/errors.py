"""Typed errors: each says what happened, why, and what to try; each knows its exit code."""

from __future__ import annotations

REQUEST_IS_WRONG = 2
FAILED = 1
CANCELLED = 130


class HypermergeError(Exception):
    """Something a person can act on.

    what: the fact, one sentence.  why: the likely cause.  hint: what to try.
    """

    exit_code = FAILED
    code = "failed"

    def __init__(self, what: str, why: str = "", hint: str = ""):
        super().__init__(what)
        self.what, self.why, self.hint = what, why, hint

    def __str__(self) -> str:
        return " ".join(part for part in (self.what, self.why, self.hint) if part)

    def to_json(self) -> dict[str, str]:
        return {"code": self.code, "what": self.what, "why": self.why, "hint": self.hint}


class SpecError(HypermergeError):
    """A parameter is missing, unknown, ill-typed or out of bounds."""

    exit_code, code = REQUEST_IS_WRONG, "bad_request"


class MissingError(SpecError):
    """Something that is needed was not given; to a person who is about to choose, a page says nothing of it yet."""


class BusyError(SpecError):
    """The target is being written by somebody else, or the host cannot take another job."""

    code = "busy"


class FormatError(HypermergeError):
    """A file is not what its name promises: truncated, empty, garbage, or a pickle that runs code."""

    exit_code, code = REQUEST_IS_WRONG, "bad_file"


class LayoutError(HypermergeError):
    """A file is sound, but not a model this job can work with, or two models do not match."""

    exit_code, code = REQUEST_IS_WRONG, "wrong_model"


class UnchangedError(HypermergeError):
    """There is nothing to do: both models are the same."""

    exit_code, code = REQUEST_IS_WRONG, "nothing_changed"


class NumericalError(HypermergeError):
    """NaN, Inf, or a result that the output's number format cannot hold."""

    code = "numerical"


class OutputError(HypermergeError):
    """The result could not be written: no space, no permission, or the disk failed."""

    code = "output"


class InputChangedError(HypermergeError):
    """A file was replaced or modified while a job was reading it."""

    code = "input_changed"


class DeviceError(HypermergeError):
    """The device asked for is not there."""

    exit_code, code = REQUEST_IS_WRONG, "device"


class Cancelled(HypermergeError):  # noqa: N818 - it is no failure
    """Somebody asked the job to stop; nothing was written."""

    exit_code, code = CANCELLED, "cancelled"

    def __init__(self):
        super().__init__("Cancelled.", "The job was interrupted.", "Nothing was written.")


def defect(error: Exception) -> HypermergeError:
    """An exception nobody foresaw, as an answer to whoever waits for one."""
    return HypermergeError(
        f"{type(error).__name__}: {error}", "This is a defect in Hypermerge.", "The console has the details."
    )
