"""Resizing a LoRA of true widths, beside full SVDs of the products, in one run.

python benchmarks/resize.py [--model sd15|sdxl|flux] [--from-rank 128] [--rank 32] …
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from measuring import ChildError, machine, run, summary, warm

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    options.scratch.mkdir(parents=True, exist_ok=True)
    source = options.scratch / f"lora-{options.model}-{options.from_rank}{'-conv' if options.conv else ''}.safetensors"
    target = options.scratch / "resized.safetensors"
    if not source.exists():
        _say(f"making {source}")
        conv = ["--conv"] if options.conv else []
        run([sys.executable, HERE / "resize_files.py", options.model, str(options.from_rank), source, *conv], 2)
    results: dict[str, Any] = {
        "model": options.model, "from": options.from_rank, "to": options.rank, "threads": options.threads,
        "machine": machine(), "bytes": source.stat().st_size,
    }  # fmt: skip
    if results["machine"]["load"] > 0.3:
        _say(f"warning: the machine is busy (load {results['machine']['load']}): times will be too long")
    ours = []
    for _ in range(options.runs):
        target.unlink(missing_ok=True)
        warm(source)
        ours.append(run([sys.executable, "-m", "lib_hypermerge", "resize", "--lora", source, "--out", target, "--rank",
                         str(options.rank), "--threads", str(options.threads), "--json", "--quiet"],
                        options.threads))  # fmt: skip
        _say(f"ours: {ours[-1].wall:.2f} s, {ours[-1].result['seconds']:.2f} s inside, {ours[-1].peak:.0f} MiB")
    results["ours"] = summary(ours)
    results["misses"] = ours[-1].result["relative_error"]
    if not options.no_naive:
        results["naive"] = run([sys.executable, HERE / "resize_naive.py", source], options.threads).result
    if not options.no_errors:
        results["excess"] = run([sys.executable, HERE / "resize_errors.py", source, target, str(options.rank)],
                                options.threads).result  # fmt: skip
    _report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("sd15", "sd21", "sdxl", "flux"), default="sd15")
    parser.add_argument("--from-rank", type=int, default=128, help="of the LoRA (default: 128)")
    parser.add_argument("--rank", type=int, default=32, help="of the result (default: 32)")
    parser.add_argument("--conv", action="store_true", help="a LoRA with 3×3 convolutions")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all that is timed (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--no-naive", action="store_true", help="do not time full SVDs of the products")
    parser.add_argument("--no-errors", action="store_true", help="do not look at the numbers")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the files are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    options.scratch = options.scratch.resolve()
    return options


def _report(results: dict[str, Any]) -> None:
    m, own = results["machine"], results["ours"]
    print(f"\n{results['model']}, {results['bytes'] / 2**20:.0f} MiB, rank {results['from']} to {results['to']}, "
          f"{results['threads']} threads; {m['cores']} cores of {m['cpu']}; load {m['load']}")  # fmt: skip
    print(f"resize           {own['wall_median']:9.2f} s, least {own['wall_min']:.2f}, inside "
          f"{own['inside_median']:.2f}, {own['peak_mib']:.0f} MiB; misses {results['misses']:.2%}")  # fmt: skip
    if naive := results.get("naive"):
        print(f"full SVDs        {naive['seconds']:9.0f} s, projected from one timing of each of {naive['shapes']} "
              f"shapes{naive.get('note', '')}: ours is {naive['seconds'] / own['wall_median']:.0f} "
              "times faster")  # fmt: skip
    if excess := results.get("excess"):
        print(f"error above the best of that rank: {excess['whole']:.1e} of it over all {excess['modules']} modules, "
              f"{excess['median']:.1e} in the median module, {excess['worst']:.1e} in the worst")  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChildError as failure:
        sys.exit(str(failure))
