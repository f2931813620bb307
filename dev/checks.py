"""Run the linter, the type checker and the tests, and sum up the results.

Both test environments are worked on side by side, each with its share of the cores: much of a test's time is waiting,
for a browser or another process. What the second says is shown when the first is done.
"""

import argparse
import os
import subprocess
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dev import chromium, environments

# The test environments: the versions of WebUI Forge and those of AUTOMATIC1111.
ENVIRONMENTS = {
    "gradio4": (".venv-test", "test.txt"),
    "gradio3": (".venv-test-gradio3", "test-gradio3.txt"),
}
PARTS = ("lint", *ENVIRONMENTS)

PYTEST_NO_TESTS = 5
_SETTING_UP = threading.Lock()  # packages are installed for one at a time


@dataclass(frozen=True)
class Counts:
    """How many tests passed and failed."""

    passed: int = 0
    failed: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.passed + other.passed, self.failed + other.failed)

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed"


def read_junit(file: Path) -> Counts:
    """Count the results in a pytest JUnit report; an error counts as a failed test.

    A missing or broken report means that pytest itself died: one failure.
    """
    try:
        suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return Counts(failed=1)
    total = Counts()
    for suite in suites:
        tests, failures, errors, skipped = (int(suite.get(n, 0)) for n in ("tests", "failures", "errors", "skipped"))
        total += Counts(tests - failures - errors - skipped, failures + errors)
    return total


def parse(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the parts to run and the arguments left for pytest."""
    parser = argparse.ArgumentParser(prog="start.py test", add_help=False, allow_abbrev=False)
    parser.add_argument("--only", choices=PARTS)
    options, rest = parser.parse_known_args(arguments)
    return [options.only] if options.only else list(PARTS), rest


def run(root: Path, arguments: list[str]) -> int:
    """Run the wanted parts, print the summary as the last line, return the exit status."""
    parts, pytest_arguments = parse(arguments)
    failed_steps: list[str] = []
    total = Counts()
    if "lint" in parts:
        failed_steps += lint(root)
    wanted = [part for part in parts if part in ENVIRONMENTS]
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        runs = [
            pool.submit(run_pytest, root, part, pytest_arguments, aside=index > 0, beside=len(wanted))
            for index, part in enumerate(wanted)
        ]
        for part, run in zip(wanted, runs, strict=True):
            counts, status = run.result()
            total += counts
            if status not in (0, PYTEST_NO_TESTS):
                failed_steps.append(f"pytest in {part}")
    if parts != ["lint"] and total == Counts():
        failed_steps.append("no test ran")
    if failed_steps:
        print("failed:", ", ".join(failed_steps), flush=True)
    print(total, flush=True)
    return 1 if failed_steps or total.failed else 0


def python_of(root: Path, part: str) -> Path:
    """Return the interpreter of a part's test environment, made if need be."""
    folder, requirements = ENVIRONMENTS[part]
    return environments.ensure(root / folder, root / "requirements" / requirements)


def lint(root: Path) -> list[str]:
    """Run ruff and pyright and return the names of those that found something."""
    python = str(python_of(root, "gradio4"))
    commands = {
        "ruff": [python, "-m", "ruff", "check", "."],
        "pyright": [python, "-m", "pyright", "--pythonpath", python],
    }
    return [name for name, command in commands.items() if _call(name, command, root, dict(os.environ))]


def run_pytest(
    root: Path, part: str, arguments: list[str], *, aside: bool = False, beside: int = 1
) -> tuple[Counts, int]:
    """Run the tests in one environment and return the counts and pytest's exit status.

    aside: keep what it says until it is done.  beside: how many environments run at once.
    """
    with _SETTING_UP:
        python = python_of(root, part)
        env = {**os.environ, chromium.VARIABLE: chromium.find_here(python)}
    if beside > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))
    with tempfile.TemporaryDirectory() as folder:
        report, said = Path(folder) / "junit.xml", Path(folder) / "said.txt"
        command = [str(python), "-m", "pytest", f"--junitxml={report}", *arguments]
        title = f"pytest in {part}"
        if not aside:
            status = _call(title, command, root, env)
        else:
            with said.open("w") as file:
                status = subprocess.call(command, cwd=root, env=env, stdout=file, stderr=subprocess.STDOUT)
            print(f"\n=== {title}", said.read_text(errors="replace"), sep="\n", flush=True)
        return read_junit(report), status


def _call(title: str, command: list[str], root: Path, env: dict[str, str]) -> int:
    print(f"\n=== {title}", flush=True)
    return subprocess.call(command, cwd=root, env=env)
