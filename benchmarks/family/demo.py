"""The main job on models that draw: fine-tune the small base that comes along, extract a LoRA, compare what they draw.

python start.py demo [--folder demo]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from lib_hypermerge.render import as_text, mib, percent

from . import hosts, unet_training
from .captions import SCENES, by_lot
from .evidence.sheets import head_of, save_sheet
from .jobs import run
from .model import Model, from_tensors, load, save
from .pack import FILE, unpack
from .sampling import pictures

_FOLDER = Path(__file__).resolve().parents[2] / "demo"
_MANNER, _STEPS, _RATE, _PICTURES, _RANK = "night", 80, 1e-3, 384, 8
_PROMPTS = [SCENES[number] for number in (24, 79, 101, 158, 203, 262, 321, 370)]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 if base and LoRA do not draw what the fine-tune draws."""
    parser = argparse.ArgumentParser(prog="start.py demo", description="Extract a LoRA from small models that draw.")
    parser.add_argument("--folder", type=Path, default=_FOLDER, help="where the files go")
    parser.add_argument("--steps", type=int, default=_STEPS, help=f"of the fine-tuning (default: {_STEPS})")
    options = parser.parse_args(arguments)
    folder: Path = options.folder
    base, tuned, lora, again = (
        folder / f"{name}.safetensors" for name in ("base", "night", "night-lora", "night-again")
    )

    model = from_tensors(unpack(FILE.read_bytes()))
    save(base, model.parts())
    print(f"A narrow SD1.5 with true key names, {mib(base.stat().st_size)}, trained to draw shapes on paper.")
    print(f"Fine-tuning all weights of its U-Net on {_PICTURES} pictures of a night: under a minute.", flush=True)
    start = time.perf_counter()
    _fine_tune(model, options.steps)
    save(tuned, model.parts())
    hosts.write_configurations(folder, ["base", "night", "night-again"])
    print(f"That took {time.perf_counter() - start:.0f} s.\n")

    print(as_text(run("extract", base=base, tuned=tuned, out=lora, rank=_RANK)))
    run("merge", checkpoint=base, loras=[{"lora": lora}], out=again)
    print("\nDrawing with the base, the fine-tune, and base + LoRA, same prompts, same seeds …", flush=True)
    of_base, of_tuned, of_both = (_pictures(file) for file in (base, tuned, again))
    rows = [("the base", of_base), ("fine-tuned,\nall weights", of_tuned), (f"base + LoRA\nof rank {_RANK}", of_both)]
    heads = [head_of(str(scene)) for scene in _PROMPTS]
    save_sheet(folder / "pictures.png", rows, heads, label=110)
    apart, left = (float((drawn - of_tuned).abs().mean()) / 2 for drawn in (of_base, of_both))
    close = left < apart / 2
    print(f"The fine-tune's pictures differ from the base's by {percent(apart)} of full range, and from those of")
    print(f"base + LoRA by {percent(left)}{'.' if close else ': too much.'}", end=" ")
    print(f"The LoRA has {mib(lora.stat().st_size)}, the fine-tune {mib(tuned.stat().st_size)}.")
    print(f"Side by side: {folder / 'pictures.png'}")
    print(f"The WebUI loads the checkpoints in {folder} with the .yaml beside each; draw 64×64 pixels.")
    return 0 if close else 1


def _pictures(file: Path) -> Tensor:
    return pictures(load(file), list(map(str, _PROMPTS)), list(range(len(_PROMPTS))))


def _fine_tune(model: Model, steps: int) -> None:
    random = torch.Generator().manual_seed(0)
    scenes = by_lot(SCENES, _PICTURES, random)
    latents = unet_training.encode(model, scenes, _MANNER, random)
    captions = list(map(str, scenes))

    def say(text: str) -> None:
        print(f"  {text}", flush=True)

    unet_training.fit(model, captions, latents, 0, say, steps=steps, rate=_RATE, average=0.9, every=20)


if __name__ == "__main__":
    sys.exit(main())
