"""Merging a LoRA into a full-width checkpoint, beside a plain copy of the file, in one run.

python benchmarks/merge.py [--model sd15|sdxl] [--rank 32] …
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from measuring import ROOT, ChildError, Run, machine, run, summary, warm

HERE = Path(__file__).resolve().parent
TABLES = ROOT / "lib_hypermerge" / "layouts" / "tables"
WEIGHT = "0.8"

# what `cp` does, and then waits for the disk, as a merge must before it says that the file is there
_COPY = """
import os, shutil, sys
shutil.copyfileobj(source := open(sys.argv[1], "rb"), target := open(sys.argv[2], "wb"), 1 << 22)
target.flush()
os.fsync(target.fileno())
"""


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    folder = options.scratch / f"merge-{options.model}"
    checkpoint, lora = folder / "checkpoint.safetensors", folder / f"lora{options.rank}.safetensors"
    if not lora.exists():
        _say(f"making a checkpoint and a LoRA in {folder}")
        run([sys.executable, HERE / "merge_files.py", TABLES / f"{options.model}.json", folder, str(options.rank)],
            options.threads)  # fmt: skip
    results: dict[str, Any] = {"model": options.model, "rank": options.rank, "threads": options.threads,
                               "machine": machine(), "bytes": checkpoint.stat().st_size}  # fmt: skip
    if results["machine"]["load"] > 0.3:
        _say(f"warning: the machine is busy (load {results['machine']['load']}): times will be too long")
    copies, ours = [], []
    for _ in range(options.runs):  # in turn: what else the machine does meanwhile shows in both
        copies.append(_copied(checkpoint, folder / "copy.safetensors"))
        ours.append(_merged(checkpoint, lora, folder / "merged.safetensors", options.threads))
    results["copy"] = {"median": statistics.median(copies), "all": copies}
    results["ours"] = summary(ours)
    if not options.no_rounding:
        results["rounding"] = run([sys.executable, HERE / "merge_rounding.py", checkpoint, lora,
                                   folder / "merged.safetensors", WEIGHT], options.threads).result  # fmt: skip
    _report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("sd15", "sd21", "sdxl"), default="sd15")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA, in all layers (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all that is timed (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--no-rounding", action="store_true", help="do not look at the numbers")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the files are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    options.scratch = options.scratch.resolve()
    return options


def _copied(source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    warm(source)
    seconds = run([sys.executable, "-S", "-c", _COPY, source, target], 1).wall
    target.unlink()
    _say(f"copy: {seconds:.2f} s")
    return seconds


def _merged(checkpoint: Path, lora: Path, target: Path, threads: int) -> Run:
    target.unlink(missing_ok=True)
    warm(checkpoint, lora)
    child = run([sys.executable, "-m", "lib_hypermerge", "merge", "--checkpoint", checkpoint, "--lora", lora, WEIGHT,
                 "--out", target, "--threads", str(threads), "--json", "--quiet"], threads)  # fmt: skip
    _say(f"ours: {child.wall:.2f} s, {child.result['seconds']:.2f} s inside, {child.peak:.0f} MiB")
    return child


def _report(results: dict[str, Any]) -> None:
    m, own, copy = results["machine"], results["ours"], results["copy"]["median"]
    print(f"\n{results['model']}, {results['bytes'] / 2**20:.0f} MiB, LoRA of rank {results['rank']}, "
          f"{results['threads']} threads; {m['cores']} cores of {m['cpu']}; load {m['load']}")  # fmt: skip
    print(f"copy with fsync {copy:8.2f} s")
    print(f"merge           {own['wall_median']:8.2f} s, least {own['wall_min']:.2f}, inside "
          f"{own['inside_median']:.2f}, {own['peak_mib']:.0f} MiB: {own['wall_median'] / copy:.2f} copies")  # fmt: skip
    if rounding := results.get("rounding"):
        print(f"{rounding['rounded']:.5%} of {rounding['numbers']:,} changed numbers are correctly rounded; "
              f"{rounding['same']} of {rounding['untouched']} other tensors are the same bit for bit")  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChildError as failure:
        sys.exit(str(failure))
