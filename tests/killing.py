"""Run something in a process of its own that is killed in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def die() -> None:
    """As by the system, when memory runs out, or by a person: without any cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(function: Callable[[], object]) -> bool:
    """Whether the function's process was killed; it must end well otherwise."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)
