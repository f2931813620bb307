"""Set up and start Hypermerge outside a WebUI.

    python start.py demo [arguments]    fine-tune a small model, extract a LoRA from it, draw with it
    python start.py ui [arguments]      open the standalone page in the browser (--no-browser: only serve it)
    python start.py test [arguments]    lint, type-check and run every test
    python start.py family [arguments]  train the small models of docs/evidence.md
    python start.py evidence            make every table and picture of docs/evidence.md from them
    python start.py VERB [arguments]    run `python -m lib_hypermerge VERB [arguments]`

The first start of each kind makes a virtual environment beside this file
(`.venv`; for `test` also `.venv-test` and `.venv-test-gradio3`) and installs
the versions pinned in `requirements/` there. Later starts reuse it until a pin
changes. `python start.py test --only gradio4|gradio3|lint` runs one part; what
else stands after `test` goes to pytest.
"""

import sys

OLDEST_PYTHON = (3, 10)


def check_python(version) -> "str | None":
    """Return what to tell the user when the interpreter is too old, else None."""
    if tuple(version[:2]) >= OLDEST_PYTHON:
        return None
    needed, found = ("{}.{}".format(*v[:2]) for v in (OLDEST_PYTHON, version))
    return f"Hypermerge needs Python {needed} or newer; this one is {found}. Name a newer one: python3.11 start.py ..."


if check_python(sys.version_info):
    # Before the other imports: this file may use only what an old Python can
    # parse, the files it imports may use anything.
    sys.exit(check_python(sys.version_info))

import os  # noqa: E402
import subprocess  # noqa: E402
from pathlib import Path  # noqa: E402

from dev import checks, environments  # noqa: E402

ROOT = Path(__file__).resolve().parent

# Verbs that have a module of their own; any other goes to the command line.
MODULE_OF_VERB = {
    "ui": "lib_hypermerge.ui",
    "demo": "benchmarks.family.demo",
    "family": "benchmarks.family.train",
    "evidence": "benchmarks.family.evidence",
}


def module_command(verb: str, arguments: list[str]) -> list[str]:
    """Return what follows the interpreter's name to carry out a verb."""
    if verb in MODULE_OF_VERB:
        return ["-m", MODULE_OF_VERB[verb], *arguments]
    return ["-m", "lib_hypermerge", verb, *arguments]


def run_verb(verb: str, arguments: list[str]) -> int:
    """Run a verb in `.venv`, from the folder the user stands in, and return its exit status.

    The user's folder stays the current one so that relative model paths mean
    what they say; the package is found through PYTHONPATH instead.
    """
    python = environments.ensure(ROOT / ".venv", ROOT / "requirements" / "standalone.txt")
    search_path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    return subprocess.call([str(python), *module_command(verb, arguments)], env=env)


def main(arguments: list[str]) -> int:
    """Carry out the command line and return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    verb, *rest = arguments
    try:
        return checks.run(ROOT, rest) if verb == "test" else run_verb(verb, rest)
    except environments.SetupError as error:
        print(f"start.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
