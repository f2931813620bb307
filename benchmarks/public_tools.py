"""Extract, merge, combine, resize and inspect beside sd-scripts' tools for the same: the same files, in one run.

python benchmarks/public_tools.py SD_SCRIPTS [--script-python PYTHON] [--jobs extract merge combine resize inspect] …

SD_SCRIPTS is a checkout of kohya-ss/sd-scripts, the Python one that its networks/*.py run on. Files are of SD1.5's true
widths. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from measuring import ROOT, ChildError, Run, machine, run, summary, warm

HERE = Path(__file__).resolve().parent
TABLE = ROOT / "lib_hypermerge" / "layouts" / "tables" / "sd15.json"
RANK, HIGH = 32, 128
JOBS = ("extract", "merge", "combine", "resize", "inspect")
OUT = "{out}"
_VERSIONS = """
import sys
from importlib.metadata import PackageNotFoundError, version
print("Python", sys.version.split()[0], end="")
for name in ("torch", "numpy", "safetensors", "diffusers", "transformers"):
    try:
        print(",", name, version(name), end="")
    except PackageNotFoundError:
        pass
"""


@dataclass(frozen=True)
class Job:
    """What it reads, our arguments, the tool's; `{out}` is the file that either writes, where it writes one."""

    title: str
    reads: list[Path]
    ours: list[str | Path]
    tool: str
    theirs: list[str | Path]
    compare: list[str | Path] = field(default_factory=list)  # arguments of public_errors.py before the two results


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    versions = _versions(options)
    print(f"{machine()}; {options.threads} threads; {versions}", flush=True)
    rows = []
    for name, job in _jobs(options).items():
        if name in options.jobs:
            rows.append(_row(options, name, job))
            print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    heads = ("job", "ours, s", "MiB", "misses", "tool", "s", "MiB", "misses", "tool / ours")
    for row in (heads, ("---",) * len(heads), *rows):
        print("| " + " | ".join(row) + " |")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("scripts", type=Path, metavar="SD_SCRIPTS", help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--script-python", default=sys.executable, help="the Python that runs it")
    parser.add_argument("--version", default="of unknown version", help="what to call the checkout in what is printed")
    parser.add_argument("--path", default="", help="for PYTHONPATH of the tools alone, beside the checkout")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads on both sides (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="of ours; the tool runs once (default: 3)")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the files are kept")
    options = parser.parse_args(arguments)
    options.scratch, options.scripts = options.scratch.resolve(), options.scripts.resolve()
    return options


def _versions(options: argparse.Namespace) -> str:
    ours, tools = ([sys.executable], ["env", f"PYTHONPATH={_path(options)}", options.script_python])
    told = [subprocess.check_output([*python, "-c", _VERSIONS], text=True).strip() for python in (ours, tools)]
    return f"ours on {told[0]}; the tools on {told[1]}; sd-scripts {options.version}"


def _path(options: argparse.Namespace) -> str:
    """PYTHONPATH of the tools."""
    return os.pathsep.join(filter(None, (str(options.scripts), options.path)))


def _jobs(options: argparse.Namespace) -> dict[str, Job]:
    """The files of all of them, made once and kept."""
    folder = options.scratch / "sd15"
    base, tuned, layers = folder / "base.safetensors", folder / "tuned.safetensors", folder / "layers.json"
    if not layers.exists():
        run([sys.executable, HERE / "pairs.py", TABLE, folder], options.threads)
    # linear layers and 1×1 convolutions, as sd-scripts trains without conv_dim: two unlike ones, and one of high rank
    one, other, high = (folder / f"lora{rank}.safetensors" for rank in (RANK, RANK + 1, HIGH))
    for lora, rank in ((one, RANK), (other, RANK + 1), (high, HIGH)):
        if not lora.exists():
            run([sys.executable, HERE / "resize_files.py", "sd15", str(rank), lora], options.threads)
    rank = str(RANK)
    written = ["--save_to", OUT, "--save_precision", "fp16"]
    return {
        "extract": Job(
            f"extract, rank {rank}", [base, tuned],
            ["extract", "--base", base, "--tuned", tuned, "--rank", rank, "--out", OUT], "extract_lora_from_models.py",
            ["--model_org", base, "--model_tuned", tuned, "--dim", rank, "--conv_dim", rank, "--device", "cpu",
             *written],
            ["extract", base, tuned, layers],
        ),
        "merge": Job(
            f"merge a LoRA of rank {rank}", [base, one],
            ["merge", "--checkpoint", base, "--lora", one, "0.8", "--out", OUT], "merge_lora.py",
            ["--sd_model", base, "--models", one, "--ratios", "0.8", "--precision", "float", *written],
        ),
        "combine": Job(
            f"combine two of rank {rank} and {RANK + 1} into {rank}", [one, other],
            ["combine", "--lora", one, "0.7", "--lora", other, "0.3", "--rank", rank, "--out", OUT],
            "svd_merge_lora.py",
            ["--models", one, other, "--ratios", "0.7", "0.3", "--new_rank", rank, "--new_conv_rank", rank,
             "--precision", "float", "--device", "cpu", *written],
            ["loras", f"0.7={one}", f"0.3={other}"],
        ),
        "resize": Job(
            f"resize, rank {HIGH} to {rank}", [high],
            ["resize", "--lora", high, "--rank", rank, "--out", OUT], "resize_lora.py",
            ["--model", high, "--new_rank", rank, "--new_conv_rank", rank, "--device", "cpu", *written],
            ["loras", f"1={high}"],
        ),
        "inspect": Job(
            f"norms of all changes of a LoRA of rank {HIGH}; the tool: means of its stored numbers", [high],
            ["inspect", "--norms", high], "check_lora_weights.py", [high],
        ),
    }  # fmt: skip


def _row(options: argparse.Namespace, name: str, job: Job) -> tuple[str, ...]:
    """Ours before and after the tool: what else the machine does meanwhile shows as spread."""
    ours, theirs = (options.scratch / f"public-{name}-{side}.safetensors" for side in ("ours", "tool"))

    def own(times: int) -> list[Run]:
        return [
            _timed(options, job, ours, [sys.executable, "-m", "lib_hypermerge", *_to(ours, job.ours), "--json",
                                        "--quiet", "--threads", str(options.threads)])
            for _ in range(times)
        ]  # fmt: skip

    runs = own((options.runs + 1) // 2)
    try:
        script = options.scripts / "networks" / job.tool
        tool = _timed(options, job, theirs, ["env", f"PYTHONPATH={_path(options)}", options.script_python, script,
                                             *_to(theirs, job.theirs)])  # fmt: skip
        took = [f"{tool.wall:.1f}", f"{tool.peak:.0f}"]
    except ChildError as error:
        tool, took = None, [f"failed: {str(error).splitlines()[-1]}", ""]
    found = summary(runs + own(options.runs // 2))
    misses = {}
    if job.compare and tool:
        misses = run([sys.executable, HERE / "public_errors.py", *job.compare, ours, theirs], options.threads).result
    for file in (ours, theirs):
        file.unlink(missing_ok=True)
    missed, tools = (f"{100 * misses[file.name]:.2f} %" if misses else "" for file in (ours, theirs))
    ratio = f"{tool.wall / found['wall_median']:.1f}" if tool else ""
    cells = [f"{found['wall_median']:.1f}", f"{found['peak_mib']:.0f}", missed, job.tool, *took, tools, ratio]
    return (job.title, *cells)


def _timed(options: argparse.Namespace, job: Job, out: Path, command: list[str | Path]) -> Run:
    """A whole process on files that were just read, and no file where it writes."""
    out.unlink(missing_ok=True)
    warm(*job.reads)
    return run(command, options.threads)


def _to(out: Path, parts: list[str | Path]) -> list[str | Path]:
    return [out if part == OUT else part for part in parts]


if __name__ == "__main__":
    sys.exit(main())
