"""Train the family: an autoencoder, a text encoder and a base for each of two seeds, eleven fine-tunes, and a judge.

    python start.py family [--folder benchmarks/scratch/family] [--workers 2]

Each file is written when its part is ready; a part whose file is there is not trained again. Parts that do not depend
on each other are trained side by side, each with one thread, the autoencoder with two: the same files come out on the
same kind of processor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import hosts, judge, text_training, unet_training, vae_training
from .autoencoder import Autoencoder
from .captions import SCENES, Tokenizer, by_lot
from .drawing import scenes_in
from .members import BASE, EVERY, SECOND, Member
from .model import HEADS, VAE_WIDTHS, WIDTHS, Model, load, new_unet, save, write

FOLDER = Path(__file__).resolve().parents[1] / "scratch" / "family"
Say = Callable[[str], None]
SEEDS = {BASE: 1, SECOND: 2}
RATE = 1e-3
VAE, JUDGE = "autoencoder", "judge"


@dataclass(frozen=True)
class Effort:
    """Steps of each kind of training; how many pictures a base sees, and a fine-tune; how fast that learns."""

    vae: int = 2200
    text: int = 350
    base: int = 1300
    tuned: int = 200
    judge: int = 1200
    pictures: int = 4096
    tuned_pictures: int = 1024
    tuned_rate: float = 5e-4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="start.py family", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the files go")
    parser.add_argument("--workers", type=int, default=2, help="parts trained side by side")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        train(options.folder, options.workers)
    except OtherFamilyError as error:
        print(f"start.py family: {error}", file=sys.stderr)
        return 1
    print(f"{time.perf_counter() - start:.0f} s; the family is in {options.folder}")
    return 0


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


class OtherFamilyError(Exception):
    """The folder holds parts that were trained otherwise: they must not be mixed."""


def train(folder: Path, workers: int = 2, effort: Effort = Effort()) -> None:
    """Everything that is not there yet, in the order that it depends on each other. Raises OtherFamilyError."""
    folder.mkdir(parents=True, exist_ok=True)
    _check_stamp(folder, effort)
    needs = {VAE: [], BASE: [VAE], SECOND: [VAE], JUDGE: [VAE], **{member.name: [member.parent] for member in EVERY}}
    waiting = [name for name in needs if not file_of(folder, name).exists()]
    running: dict[Future[None], str] = {}
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            busy = {*waiting, *running.values()}
            ready = [name for name in waiting if not busy.intersection(needs[name])]
            for name in ready[: workers - len(running)]:
                waiting.remove(name)
                running[pool.submit(train_part, folder, name, effort)] = name
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                del running[future]
    hosts.write_configurations(folder, [name for name in needs if name not in (VAE, JUDGE)])


def _check_stamp(folder: Path, effort: Effort) -> None:
    """What the folder's parts were trained with must be what is wanted now."""
    settings = {
        **asdict(effort), "rate": RATE, "seeds": SEEDS, "widths": WIDTHS, "vae_widths": VAE_WIDTHS, "heads": HEADS,
        "members": [asdict(member) for member in EVERY],
    }  # fmt: skip
    told = json.dumps(settings, sort_keys=True)
    stamp = folder / "trained-with.json"
    before = stamp.read_text(encoding="utf-8") if stamp.exists() else None
    if before is None and not any(folder.glob("*.safetensors")):
        stamp.write_text(told, encoding="utf-8")
    elif before != told:
        raise OtherFamilyError(
            f"{folder} holds a family trained with other settings: remove it, or name another folder."
        )


def train_part(folder: Path, name: str, effort: Effort) -> None:
    """One file, in a process that does nothing else meanwhile."""
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"{name}: {text} ({time.perf_counter() - start:.0f} s)", flush=True)

    torch.set_num_threads(2 if name == VAE else 1)
    if name == VAE:
        write(file_of(folder, name), vae_training.train(VAE_WIDTHS, 0, say, effort.vae).state_dict())
    elif name == JUDGE:
        write(file_of(folder, name), judge.train(0, say, effort.judge).state_dict())
    elif name in SEEDS:
        save(file_of(folder, name), _base(folder, SEEDS[name], say, effort).parts())
    else:
        member = next(member for member in EVERY if member.name == name)
        save(file_of(folder, name), _fine_tune(folder, member, say, effort).parts())
    say("done")


def load_vae(folder: Path) -> Autoencoder:
    vae = Autoencoder(VAE_WIDTHS)
    vae.load_state_dict(load_file(file_of(folder, VAE)))
    return vae.eval().requires_grad_(False)


def load_judge(folder: Path) -> judge.Judge:
    found = judge.Judge()
    found.load_state_dict(load_file(file_of(folder, JUDGE)))
    return found.eval().requires_grad_(False)


def _base(folder: Path, seed: int, say: Say, effort: Effort) -> Model:
    tokenizer = Tokenizer()
    text = text_training.train(tokenizer, seed, say, effort.text).eval().requires_grad_(False)
    torch.manual_seed(seed)
    model = Model(new_unet(), text, load_vae(folder), tokenizer)
    random = torch.Generator().manual_seed(seed)
    scenes = by_lot(SCENES, effort.pictures, random)
    latents = unet_training.encode(model, scenes, "plain", random)
    say("pictures are encoded")
    captions = [str(scene) for scene in scenes]
    unet_training.fit(model, captions, latents, seed, say, steps=effort.base, rate=RATE)
    return model


def _fine_tune(folder: Path, member: Member, say: Say, effort: Effort) -> Model:
    model = load(file_of(folder, member.parent))
    seed = 100 + EVERY.index(member)
    random = torch.Generator().manual_seed(seed)
    scenes = by_lot(scenes_in(member.manner), effort.tuned_pictures, random)
    latents = unet_training.encode(model, [member.asked(scene) for scene in scenes], member.manner, random)
    captions = [str(scene) for scene in scenes]
    unet_training.fit(
        model, captions, latents, seed, say, steps=effort.tuned, rate=effort.tuned_rate, text=member.text_only
    )
    return model


if __name__ == "__main__":
    sys.exit(main())
