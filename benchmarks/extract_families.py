"""What extract's families miss at equal size, and how long they take, on full-width SD1.5 pairs whose changes are of
different kinds.

python benchmarks/extract_families.py [--change decaying,rescaled,kronecker,entrywise,noise] [--family lora,…]
                                      [--rank 32] [--components unet,te] [--threads 2] [--json FILE]

decaying: as in benchmarks/extract.py.  rescaled: that, and input channels multiplied by factors of their own, both of
one size.  kronecker: w1 (4, 4) ⊗ w2.  entrywise: a matrix of rank 16 times a positive one of rank 16.  noise: white.
The last three have a tenth of the decaying one beside them. Pairs are made once and kept, 4 GB each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, run, warm

sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve().parent
FAMILIES = ("lora", "dora", "loha", "lokr", "best")
CHANGES = ("decaying", "rescaled", "kronecker", "entrywise", "noise")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--change", default=",".join(CHANGES), help="kinds of pairs (default: all)")
    parser.add_argument("--family", default=",".join(FAMILIES), help="families (default: all)")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--components", default="unet,te")
    parser.add_argument("--divisor", type=int, default=1, help="of the widths, for a smaller model (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the pairs are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--make", metavar="CHANGE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.make:
        _make(options.scratch, options.make, options.divisor)
        return 0
    results: dict[str, Any] = {"machine": machine(), "rank": options.rank}
    for change in options.change.split(","):
        folder = options.scratch.resolve() / f"families-{change}-{options.divisor}"
        if not (folder / "made").exists():
            folder.mkdir(parents=True, exist_ok=True)
            run([sys.executable, Path(__file__).resolve(), "--make", change, "--scratch", folder, "--divisor",
                 str(options.divisor)], options.threads)  # fmt: skip
        pair = [folder / f"{name}.safetensors" for name in ("base", "tuned")]
        warm(*pair)
        print(f"\n{change}, rank {options.rank}\nfamily  written as                error  less than LoRA   MiB"
              "  seconds    CPU  peak MiB", flush=True)  # fmt: skip
        for family in options.family.split(","):
            results[f"{change} {family}"] = _timed(options, pair, family)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _timed(options: argparse.Namespace, pair: list[Path], family: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=pair[0].parent) as out:
        done = run(
            [sys.executable, "-m", "lib_hypermerge", "extract", "--base", pair[0], "--tuned", pair[1], "--out",
             Path(out) / "o", "--rank", str(options.rank), "--components", options.components, "--family", family,
             "--json", "--quiet", "--device", "cpu", "--threads", str(options.threads)], options.threads,
        )  # fmt: skip
    answer = done.result
    written = ", ".join(f"{count} {name}" for name, count in answer["family_layers"].items())
    gain = f"{100 * (answer['gain'] or 0):8.2f} %"
    size = answer["outputs"][0]["bytes"] / 2**20
    print(f"{family:7s} {written:24s} {100 * answer['relative_error']:6.2f} % {gain:>13s} {size:8.1f} "
          f"{done.wall:8.1f} {done.cpu:6.1f} {done.peak:9.0f}", flush=True)  # fmt: skip
    if family == "best":
        for row in answer["families"]:
            print(f"        {row['family']:5s} {100 * row['relative_error']:6.2f} %, {100 * row['gain']:.2f} % less in "
                  f"{row['layers']} of {answer['families_measured']['layers']} layers", flush=True)  # fmt: skip
    return {"seconds": done.wall, "cpu": done.cpu, "peak_mib": done.peak} | {
        key: answer[key] for key in ("relative_error", "gain", "family", "family_layers", "families", "outputs")
    }


def _make(folder: Path, change: str, divisor: int) -> None:
    """Write a pair; the file `made` says that it is complete."""
    from lib_hypermerge import synthetic
    from lib_hypermerge.layouts.tables import narrow, shapes

    table = shapes("sd15")
    synthetic.write_pair(folder, table if divisor == 1 else narrow(table, divisor), _tune(change))
    (folder / "made").touch()


def _tune(change: str) -> Callable[..., Any]:
    import torch
    from pairs import tune as decaying

    def tune(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        own = decaying(key, weight, generator)
        if change == "decaying" or weight.dim() < 2 or "first_stage" in key or "embedding" in key:
            return own
        size, flat = (own - weight).norm(), weight.flatten(1)
        n, k = flat.shape

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def positive(*shape: int) -> torch.Tensor:
            return torch.rand(*shape, generator=generator) ** 4

        if change == "rescaled":
            more = weight * normal(1, weight.shape[1], *[1] * (weight.dim() - 2))
            return own + size * more / more.norm()
        if change == "kronecker":
            u, v = (4 if side % 4 == 0 and side > 4 else 1 for side in weight.shape[:2])
            ones = [1] * (weight.dim() - 2)
            more = torch.kron(normal(u, v, *ones), normal(n // u, weight.shape[1] // v, *weight.shape[2:]))
        elif change == "entrywise":
            more = ((normal(n, 16) @ normal(16, k)) * (positive(n, 16) @ positive(16, k))).reshape(weight.shape)
        else:
            more = normal(*weight.shape)
        return weight + 0.1 * (own - weight) + size * more / more.norm()

    return tune


if __name__ == "__main__":
    sys.exit(main())
