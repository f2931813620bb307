"""Extraction against the naive way on a full-width pair: time, memory, and error above the optimum, in one run.

python benchmarks/extract.py [--model sd15|sdxl] [--rank 32] [--naive sample|skip] …
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from measuring import ROOT, ChildError, Run, machine, run, summary, warm

HERE = Path(__file__).resolve().parent
TABLES = ROOT / "lib_hypermerge" / "layouts" / "tables"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    folder = options.scratch / options.model
    base, tuned, layers = folder / "base.safetensors", folder / "tuned.safetensors", folder / "layers.json"
    table = options.layouts / f"{options.model}.json"
    if not layers.exists():
        _say(f"making a pair in {folder}")
        run([sys.executable, HERE / "pairs.py", table, folder], options.threads)
    results: dict[str, Any] = {
        "model": options.model, "rank": options.rank, "threads": options.threads, "device": options.device,
        "machine": machine(), "layers": len(json.loads(layers.read_text())),
    }  # fmt: skip
    if results["machine"]["load"] > 0.3:
        _say(f"warning: the machine is busy (load {results['machine']['load']}): times will be too long")
    bench = _Bench(options, base, tuned, layers)
    # ours before and after the naive way: what else the machine does meanwhile shows as spread
    runs = {"auto": bench.ours("auto", options.runs // 2)}
    if not options.no_exact:
        runs["exact"] = bench.ours("exact", (options.runs + 1) // 4)
    if options.naive == "sample":
        results["naive"] = bench.naive()
    runs["auto"] += bench.ours("auto", options.runs - len(runs["auto"]))
    if not options.no_exact:
        runs["exact"] += bench.ours("exact", max(1, options.runs // 2) - len(runs["exact"]))
    results["ours"] = {method: {**summary(r), **_detail(r[0])} for method, r in runs.items()}
    if options.errors != "skip":
        results["errors"] = bench.errors()
    _report(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("sd15", "sdxl"), default="sd15")
    parser.add_argument("--rank", type=int, default=32, help="of linear layers and convolutions (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads on both sides (default: 2)")
    parser.add_argument("--runs", type=int, default=5, help="repetitions of ours (default: 5); half as many exact")
    parser.add_argument("--no-exact", action="store_true", help="leave the exact method out")
    parser.add_argument("--naive", choices=("sample", "skip"), default="sample", help="time the naive way, or not")
    parser.add_argument(
        "--errors", choices=("all", "shapes", "skip"), default="shapes",
        help="layers to measure the error of: all, or one of each distinct shape and all small ones (default)",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the pairs are kept")
    parser.add_argument("--layouts", type=Path, default=TABLES, help="folder of key tables (default: our own)")
    parser.add_argument("--device", default="cpu", help="where all that is timed computes (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    options.scratch, options.layouts = options.scratch.resolve(), options.layouts.resolve()
    if options.runs < 2:
        parser.error("--runs must be 2 or more")
    return options


class _Bench:
    def __init__(self, options: argparse.Namespace, base: Path, tuned: Path, layers: Path):
        self.options, self.base, self.tuned, self.layers = options, base, tuned, layers
        self.threads = options.threads

    def ours(self, method: str, times: int, dtype: str = "fp16") -> list[Run]:
        """Whole processes of the command line."""
        runs = []
        for _ in range(times):
            warm(self.base, self.tuned)
            runs.append(run([
                sys.executable, "-m", "lib_hypermerge", "extract", "--base", self.base, "--tuned", self.tuned,
                "--out", self._lora(method, dtype), "--rank", str(self.options.rank), "--threads", str(self.threads),
                "--method", method, "--dtype", dtype, "--device", self.options.device,
                "--overwrite", "--json", "--quiet",
            ], self.threads))  # fmt: skip
            _say(f"ours, {method}, {dtype}: {runs[-1].wall:.2f} s, {runs[-1].peak:.0f} MiB, "
                 f"{runs[-1].disk:.0f} MiB from disk")  # fmt: skip
        return runs

    def _lora(self, method: str, dtype: str) -> Path:
        return self.base.with_name(f"lora-{method}-{dtype}.safetensors")

    def naive(self) -> dict[str, Any]:
        """The projection: loading and subtracting once, and each shape's SVD as often as it occurs."""
        _say("the naive way: a full SVD of each distinct shape")
        warm(self.base, self.tuned)
        child = run([sys.executable, HERE / "naive.py", self.base, self.tuned, self.layers, str(self.threads),
                     self.options.device],
                    self.threads)  # fmt: skip
        found = child.result
        svd = {kind: sum(shape["count"] * shape[kind] for shape in found["shapes"]) for kind in ("full", "thin")}
        projected = {kind: found["seconds"] + seconds for kind, seconds in svd.items()}
        return {**found, "svd_seconds": svd, "projected": projected, "measured_wall": child.wall,
                "peak_mib": child.peak}  # fmt: skip

    def errors(self) -> dict[str, Any]:
        """The written files against the optimum; one in fp32 too, where no rounding of the factors is in the error."""
        _say("errors above the optimum")
        self.ours("auto", 1, "fp32")
        made = [("auto", "fp16"), ("auto", "fp32")] + ([] if self.options.no_exact else [("exact", "fp16")])
        files = [self._lora(*which) for which in made]
        start = time.perf_counter()
        child = run([sys.executable, HERE / "errors.py", self.base, self.tuned, self.layers, str(self.threads),
                     self.options.errors, *files], self.threads)  # fmt: skip
        _say(f"took {time.perf_counter() - start:.0f} s")
        found = child.result
        found["files"] = {Path(file).stem.removeprefix("lora-"): e for file, e in found["files"].items()}
        return found


def _detail(child: Run) -> dict[str, Any]:
    kept = ("relative_error", "modules", "methods", "ranks", "outputs")
    out = {key: child.result[key] for key in kept}
    out["bytes"] = out.pop("outputs")[0]["bytes"]
    return out


def _report(results: dict[str, Any]) -> None:
    m, naive = results["machine"], results.get("naive")
    print(f"\n{results['model']}, rank {results['rank']}, {results['layers']} layers, {results['threads']} threads; "
          f"{m['cores']} cores of {m['cpu']} ({', '.join(m['has'])})"
          f"{'; torch ' + naive['torch'] if naive else ''}; load {m['load']}")  # fmt: skip
    print(f"\n{'':22}{'seconds':>9}{'least':>8}{'inside':>8}{'MiB':>8}{'full/ours':>11}{'thin/ours':>11}")
    for method, own in results["ours"].items():
        ratios = [naive["projected"][kind] / own["wall_median"] for kind in ("full", "thin")] if naive else []
        ratio = "".join(f"{value:10.1f}×" for value in ratios)
        print(f"{'ours, ' + method:22}{own['wall_median']:9.2f}{own['wall_min']:8.2f}{own['inside_median']:8.2f}"
              f"{own['peak_mib']:8.0f}{ratio}")  # fmt: skip
    if naive:
        for kind, title in (("full", "full SVD (projected)"), ("thin", "thin SVD (projected)")):
            print(f"{title:22}{naive['projected'][kind]:9.1f}{'':16}{naive['peak_mib']:8.0f}")
        print(f"  from one timing of each of {len(naive['shapes'])} shapes; of both, {naive['seconds']:.1f} s are "
              "loading and subtracting, and the memory is that of both in one process")  # fmt: skip
    if errors := results.get("errors"):
        print(f"\nerror above the optimal truncation, {errors['layers']} layers ({errors['full_rank']} more are kept "
              f"whole; the optimum agrees with an SVD to {errors['svd_disagrees_by']:.0e})")  # fmt: skip
        print(f"{'':22}{'median':>10}{'worst':>10}")
        for name, e in errors["files"].items():
            print(f"{name:22}{e['median']:10.4%}{e['worst']:10.4%}   {e['worst_layer']}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ChildError as failure:
        sys.exit(str(failure))
