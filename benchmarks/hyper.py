"""Hyper-merge against the published way on full-width checkpoints: time, memory and residual, in one run; and the
cost by the number of models.

python benchmarks/hyper.py [--model sd15] [--ranks 32,16] [--models 2,3,4,8] [--against 3,4] [--plot FILE.png] …
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from measuring import ROOT, ChildError, Run, machine, run, summary, warm

HERE = Path(__file__).resolve().parent
TABLES = ROOT / "lib_hypermerge" / "layouts" / "tables"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    bench = _Bench(options)
    results: dict[str, Any] = {
        "model": options.model, "ranks": options.ranks, "threads": options.threads, "device": options.device,
        "machine": machine(), "flags": options.flags,
    }  # fmt: skip
    if results["machine"]["load"] > 0.3:
        _say(f"warning: the machine is busy (load {results['machine']['load']}): times will be too long")
    # half of ours before and half after the published way: what else the machine does shows as spread
    runs = {count: bench.ours(count, (options.runs + 1) // 2) for count in options.models}
    results["published"] = {count: bench.published(count) for count in options.against}
    for count in options.models:
        runs[count] += bench.ours(count, options.runs - len(runs[count]))
    results["ours"] = {count: {**summary(r), **_detail(r[-1])} for count, r in runs.items()}
    if options.check:
        results["recomputed"] = {count: bench.recomputed(count) for count in options.models}
    _report(results)
    if options.plot:
        _plot(results, options.plot)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    bench.clear()
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--ranks", default="32,16", help="of the LoRAs (default: 32,16)")
    parser.add_argument("--models", type=_counts, default=(2, 3, 4, 8), help="numbers of models (default: 2,3,4,8)")
    parser.add_argument("--against", type=_counts, default=(3, 4), metavar="COUNTS",
                        help="of these numbers, the published way too (default: 3,4; an empty text: none)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="CPU threads on both sides (default: 2)")
    parser.add_argument("--runs", type=int, default=2, help="repetitions of ours (default: 2)")
    parser.add_argument("--no-residual", action="store_true", help="do not run the published loop through")
    parser.add_argument("--check", action="store_true", help="recompute the residual share from the files, float64")
    parser.add_argument("--device", default="cpu", help="where ours computes (default: cpu)")
    parser.add_argument("--flags", default="", help="more for the command line, such as '--solver greedy'")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the models are kept")
    parser.add_argument("--layouts", type=Path, default=TABLES, help="folder of key tables (default: our own)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the cost against the number of models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    options.scratch, options.layouts = options.scratch.resolve(), options.layouts.resolve()
    if options.runs < 1:
        parser.error("--runs must be 1 or more")
    if not set(options.against) <= set(options.models):
        parser.error("--against must be among --models")
    return options


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(",") if item)


class _Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.threads = options, options.threads
        self.folder = options.scratch / f"{options.model}-family"
        self.out = self.folder / "out"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clear()

    def clear(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)

    def _models(self, count: int) -> list[Path]:
        paths = [self.folder / f"m{model}.safetensors" for model in range(count)]  # as families.py calls them
        if not all(path.exists() for path in paths):
            _say(f"making {count} models in {self.folder}")
            run([sys.executable, HERE / "families.py", self._table, self.folder, str(count)], self.threads)
        return paths

    @property
    def _table(self) -> Path:
        return self.options.layouts / f"{self.options.model}.json"

    def ours(self, count: int, times: int) -> list[Run]:
        """Whole processes of the command line, each writing all of its files anew."""
        runs, paths = [], self._models(count)
        for _ in range(times):
            self.clear()
            (self.out / str(count)).mkdir(parents=True)
            warm(*paths)
            runs.append(run([
                sys.executable, "-m", "lib_hypermerge", "hyper", *(part for p in paths for part in ("--model", p)),
                "--name", "hyper", "--out-dir", self.out / str(count), "--ranks", self.options.ranks,
                "--no-separate-te",  # the published way has one multiplier for text encoders and U-Net
                "--threads", str(self.threads), "--device", self.options.device, *self.options.flags.split(),
                "--json", "--quiet",
            ], self.threads))  # fmt: skip
            last = runs[-1]
            steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in last.result["steps"].items())
            _say(f"ours, {count} models: {last.wall:.2f} s ({steps}), {last.peak:.0f} MiB, {last.disk:.0f} MiB from "
                 f"disk, residual {last.result['residual_share']:.4f}")  # fmt: skip
        return runs

    def published(self, count: int) -> dict[str, Any]:
        """The projection, and what the loop ends with."""
        paths = self._models(count)
        warm(*paths)
        _say(f"the published way, {count} models: one iteration in a layer of each distinct shape")
        found = self._naive("time", self.threads, paths).result
        if not self.options.no_residual:
            # what it ends with does not depend on the day: kept
            kept = self.folder / f"published-{count}-{self.options.ranks}.json"
            if not kept.exists():
                _say("the same, run through")
                kept.write_text(json.dumps(self._naive("run", self.threads, paths).result))
            found["run"] = json.loads(kept.read_text())
        return found

    def _naive(self, what: str, threads: int, paths: list[Path]) -> Run:
        return run([sys.executable, HERE / "hyper_naive.py", what, self.options.ranks, str(threads), *paths], threads)

    def recomputed(self, count: int) -> float:
        """By the tests' independent script, from files written once more."""
        self.ours(count, 1)
        _say("the residual share, recomputed from the files")
        recipe = self.out / str(count) / "hyper.hypermerge.json"
        checker = ROOT / "tests" / "hyper_oracle.py"
        return run([sys.executable, checker, recipe, *self._models(count)], self.threads).result["residual_share"]


def _detail(child: Run) -> dict[str, Any]:
    return {key: child.result[key] for key in ("residual_share", "models", "loss", "steps", "device")}


def _report(results: dict[str, Any]) -> None:
    m = results["machine"]
    print(f"\n{results['model']}, ranks {results['ranks']}, {results['threads']} threads; "
          f"{m['cores']} cores of {m['cpu']} ({', '.join(m['has'])}); load {m['load']}\n")  # fmt: skip
    print(f"{'models':>6}{'seconds':>9}{'least':>8}{'inside':>8}{'MiB':>7}{'residual':>10}"
          f"{'published, s':>14}{'residual':>10}{'/ours':>8}")  # fmt: skip
    for count, own in results["ours"].items():
        line = (f"{count:6}{own['wall_median']:9.2f}{own['wall_min']:8.2f}{own['inside_median']:8.2f}"
                f"{own['peak_mib']:7.0f}{own['residual_share']:10.4f}")  # fmt: skip
        if other := results["published"].get(count):
            share = f"{other['run']['residual_share']:10.4f}" if "run" in other else f"{'':10}"
            line += f"{other['projected']:14.0f}{share}{other['projected'] / own['wall_median']:7.1f}×"
        print(line)
    for count, other in results["published"].items():
        print(f"  published, {count} models: {other['prepare']:.1f} s to read and subtract, "
              f"{other['iterations']} iterations of {other['iteration']:.1f} s, {other['svd_seconds']:.0f} s of it all "
              f"in SVDs; projected from one timing of each of {len(other['shapes'])} shapes; it holds "
              f"{other['needs_mib']:.0f} MiB of float32")  # fmt: skip
    for count, own in results["ours"].items():
        steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in own["steps"].items())
        print(f"  ours, {count} models, inside: {steps}; {len(own['loss'])} iterations")
    for count, share in results.get("recomputed", {}).items():
        print(f"  {count} models: residual share {results['ours'][count]['residual_share']:.6f} as reported, "
              f"{share:.6f} from the files")  # fmt: skip


def _plot(results: dict[str, Any], path: Path) -> None:
    """Seconds by step, and memory, against the number of models."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    counts = sorted(results["ours"], key=int)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    bottom = [0.0] * len(counts)
    places = [str(count) for count in counts]
    for name in results["ours"][counts[-1]]["steps"]:
        seconds = [results["ours"][count]["steps"].get(name, 0.0) for count in counts]
        left.bar(places, seconds, bottom=bottom, label=name, width=0.6)
        bottom = [below + more for below, more in zip(bottom, seconds, strict=True)]
    walls = [results["ours"][count]["wall_median"] for count in counts]
    left.plot(places, walls, "k_", markersize=30, label="whole process")
    left.set(xlabel="models", ylabel="seconds", ylim=(0, None))
    left.legend(fontsize=8)
    right.bar(places, [results["ours"][count]["peak_mib"] for count in counts], width=0.6, color="tab:gray")
    right.axhline(1536, color="tab:red", linewidth=1)
    right.set(xlabel="models", ylabel="MiB resident at most", ylim=(0, 1700))
    figure.suptitle(f"hyper: {results['model']} at full width, ranks {results['ranks']}, {results['threads']} threads",
                    fontsize=10)  # fmt: skip
    figure.savefig(path, dpi=110)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChildError as failure:
        sys.exit(str(failure))
