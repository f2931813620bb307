"""How fast inspect answers: headers of a 7 GB checkpoint and a 1 GB LoRA, spectra of a rank-128 LoRA, two of them
compared.

python benchmarks/inspecting.py [--threads 2] [--runs 3] [--json FILE]

The large files are true headers before holes: their data takes no space on the disk and is never read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from measuring import ROOT, machine, run, summary

sys.path.insert(0, str(ROOT))

from lib_hypermerge.layouts.module import CONV, LORA_KINDS  # noqa: E402
from lib_hypermerge.layouts.reference import reference_model  # noqa: E402
from lib_hypermerge.layouts.tables import shapes  # noqa: E402

HERE = Path(__file__).resolve().parent
Shapes = dict[str, tuple[int, ...]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--runs", type=int, default=3, help="repetitions (default: 3)")
    parser.add_argument("--rank", type=int, default=128, help="of the LoRA whose spectra are taken (default: 128)")
    parser.add_argument("--scratch", type=Path, default=HERE / "scratch", help="where the files are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--warm", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.warm:
        print(json.dumps({"seconds": _warm(options.warm)}))
        return 0
    folder = options.scratch.resolve() / "inspect"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _hollow(folder / "sdxl.safetensors", shapes("sdxl"))
    large = _hollow(folder / "lora-of-1-gb.safetensors", _lora("sdxl", 128, True))
    loras = [_filled(folder / f"rank{options.rank}-{i}.safetensors", _lora("sd1", options.rank, False), i)
             for i in range(2)]  # fmt: skip
    convolutions = _filled(folder / f"rank{options.rank}-conv.safetensors", _lora("sd1", options.rank, True), 2)
    tasks = {
        "header of a checkpoint": [checkpoint],
        "header of a LoRA": [large],
        "header of a LoRA, torch being loaded, as on the page": [large],
        "norms": [loras[0], "--norms"],
        "spectra": [loras[0], "--spectra"],
        "spectra, 3x3 convolutions too": [convolutions, "--spectra"],
        "similarity of two": loras,
    }
    results: dict[str, Any] = {"machine": machine(), "threads": options.threads}
    for task, what in tasks.items():
        command = [sys.executable, "-m", "lib_hypermerge", "inspect", *what, "--json", "--quiet", "--threads",
                   str(options.threads)]  # fmt: skip
        if "as on the page" in task:
            command = [sys.executable, Path(__file__).resolve(), "--warm", *what]
        results[task] = summary([run(command, options.threads) for _ in range(options.runs)])
        size = sum(path.stat().st_size for path in what if isinstance(path, Path))
        print(
            f"{task} ({size / 2**30:.2f} GiB): {results[task]['inside_median']:.2f} s, as a program "
            f"{results[task]['wall_median']:.2f} s, at most {results[task]['peak_mib']:.0f} MiB",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _warm(model: Path) -> float:
    """Seconds of a second inspection in one process."""
    from lib_hypermerge.hosts.standalone import PathHost
    from lib_hypermerge.jobs.host import Context
    from lib_hypermerge.jobs.runner import execute
    from lib_hypermerge.jobs.verbs import find_verb

    verb = find_verb("inspect")
    spec = verb.spec.from_json({"files": [str(model)]})
    execute(verb, spec, PathHost(), Context())
    return execute(verb, spec, PathHost(), Context()).seconds


def _lora(architecture: str, rank: int, convolutions: bool) -> Shapes:
    """The tensors of a kohya LoRA of all linear layers, and of convolutions if asked for."""
    out: Shapes = {}
    for modules in reference_model(architecture).components.values():
        for module in modules.values():
            if module.kind in LORA_KINDS and module.name and module.weight and (convolutions or module.kind != CONV):
                n, *rest = module.weight.shape
                out[f"{module.name}.lora_up.weight"] = (n, rank, *(1 for _ in rest[1:]))
                out[f"{module.name}.lora_down.weight"] = (rank, *rest)
                out[f"{module.name}.alpha"] = ()
    return out


def _header(table: Shapes) -> tuple[bytes, int]:
    """(the file up to its data, bytes of the data), everything in fp16."""
    entries, offset = {}, 0
    for key, shape in table.items():
        stop = offset + 2 * math.prod(shape)
        entries[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    head = json.dumps(entries).encode()
    return len(head).to_bytes(8, "little") + head, offset


def _hollow(path: Path, table: Shapes) -> Path:
    head, size = _header(table)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return path


def _filled(path: Path, table: Shapes, seed: int) -> Path:
    """With numbers of the size that a trained LoRA's have."""
    head, size = _header(table)
    if path.exists() and path.stat().st_size == len(head) + size:
        return path
    import torch  # not before: a child's peak of memory is never below its parent's

    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(head)
        for key, shape in table.items():
            alpha = torch.full((), 64.0) if key.endswith(".alpha") else None
            numbers = torch.randn(shape, generator=generator) * 0.01 if alpha is None else alpha
            file.write(numbers.half().numpy().tobytes())
    return path


if __name__ == "__main__":
    sys.exit(main())
