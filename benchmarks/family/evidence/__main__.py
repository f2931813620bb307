"""All tables and pictures of docs/evidence.md, from the models of the family.

python start.py evidence [--only family extraction hyper …]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from ..train import FOLDER, OtherFamilyError, train
from .study import Study
from .tables import fill

QUESTIONS = {
    "family": "family", "extraction": "extraction", "resize": "resizing", "hyper": "hypermerge", "combine": "combining",
    "transfer": "transferring",
}  # fmt: skip
DOCS = Path(__file__).resolve().parents[3] / "docs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="start.py evidence", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--family", type=Path, default=FOLDER, help="where the family is, or goes to if it is not trained yet"
    )
    parser.add_argument(
        "--only", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="QUESTION", help=", ".join(QUESTIONS)
    )
    parser.add_argument(
        "--docs", type=Path, default=DOCS, help="the folder with evidence.md; pictures go to evidence/ in it"
    )
    options = parser.parse_args(arguments)
    try:
        train(options.family)
    except OtherFamilyError as error:
        print(f"start.py evidence: {error}", file=sys.stderr)
        return 1
    torch.set_num_threads(min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    for question in QUESTIONS:
        if question in options.only:
            _answer(question, options.family, options.docs)
    return 0


def _answer(question: str, family: Path, docs: Path) -> None:
    """Its tables into the page, its pictures beside it; nothing else is left."""
    start, work = time.perf_counter(), family / f"evidence-{question}"
    module = import_module(f".{QUESTIONS[question]}", __package__)
    try:
        for name, content in module.answer(Study(family, work), docs / "evidence"):
            print(f"\n{name}\n{content}", flush=True)
            fill(docs / "evidence.md", name, content)
    finally:
        shutil.rmtree(work)
    print(f"{question}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
