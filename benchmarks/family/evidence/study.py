"""What every question is asked with: jobs on files, pictures at fixed prompts and seeds, how far pictures differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean, stdev

import torch
from torch import Tensor

from ..captions import NUMBER_SCENES, Scene
from ..drawing import MANNERS
from ..jobs import run
from ..judge import HEADS, Judge, answers
from ..members import BASE, EVERY, FINE_TUNES, Member
from ..model import load
from ..sampling import pictures
from ..train import file_of, load_judge
from .weights import missed

# Chosen before any model was trained: each subject once; colours, sizes and papers by a rule; seeds in a row.
PROMPTS = [Scene(i, (5 * i + 1) % 6, i % 2, 3 * i % 4) for i in range(8)]
SEEDS = range(1000, 1004)
RELATED = [member.name for member in FINE_TUNES if member.manner != "numbers"]
OUTLIER = next(member.name for member in FINE_TUNES if member.manner == "numbers")


@dataclass(frozen=True)
class Spread:
    """A share by seed; shown as its mean and the standard deviation between seeds, in %."""

    by_seed: tuple[float, ...]

    @staticmethod
    def over_seeds(values: Tensor) -> Spread:
        """values: [prompts · seeds], the seeds of a prompt side by side."""
        return Spread(tuple(values.double().reshape(-1, len(SEEDS)).mean(0).tolist()))

    @property
    def mean(self) -> float:
        return fmean(self.by_seed)

    @property
    def deviation(self) -> float:
        return stdev(self.by_seed)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Drawn:
    """One model's pictures of all prompts and seeds in 8 bits, and what the judge makes of them."""

    pictures: Tensor
    features: Tensor
    found: dict[str, Tensor]


@dataclass(frozen=True)
class Likeness:
    """Of a model to an original: of its weights, and of its pictures at the same prompts and seeds.

    missed: ‖original − model‖ / ‖original − base‖ over all weights but the autoencoder's; the base has 1. pixels: mean
    absolute difference, of the range from black to white. unlike: the same, of the base's difference from the original,
    which has 1 then. features: distance of what the judge's heads see, of that between two seeds of the original. same:
    the judge finds the same subject, colour, size, paper and manner. asked: it finds the subject, colour, size and
    paper that were asked for. manner: it finds the original's manner of drawing.
    """

    missed: Spread
    pixels: Spread
    unlike: Spread
    features: Spread
    same: Spread
    asked: Spread
    manner: Spread


def average(likenesses: Sequence[Likeness]) -> Likeness:
    """Means over several models, seed by seed: the deviation stays that between seeds."""

    def one(name: str) -> Spread:
        by_model = [getattr(likeness, name).by_seed for likeness in likenesses]
        return Spread(tuple(fmean(shares) for shares in zip(*by_model, strict=True)))

    return Likeness(*(one(f.name) for f in fields(Likeness)))


def member_of(name: str) -> Member | None:
    return next((member for member in EVERY if member.name == name), None)


def scenes_of(name: str) -> list[Scene]:
    """What the model of that name is asked for."""
    member = member_of(name)
    return NUMBER_SCENES[: len(PROMPTS)] if member and member.manner == "numbers" else PROMPTS


def captions_of(name: str) -> list[str]:
    return [str(scene) for scene in scenes_of(name) for _ in SEEDS]


def numbers_of(file: Path) -> int:
    """Bytes of the tensors in a .safetensors or container file, without its header.

    Names and shapes are a good part of a narrow model's LoRA and nothing of a real one's: sizes are compared without.
    """
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def at_size(make: Callable[[float], int], wanted: float) -> None:
    """Run `make` (a target in MiB → bytes of numbers written) so that as many numbers as wanted (MiB) are written."""
    written = make(wanted) / 2**20
    make(wanted + (wanted - written))


@dataclass
class Study:
    """The family's folder, a folder for what jobs make of it, and what was drawn already."""

    family: Path
    work: Path
    _drawn: dict[tuple[Path, str], Drawn] = field(default_factory=dict)
    _judge: Judge | None = None

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def judge(self) -> Judge:
        if self._judge is None:
            self._judge = load_judge(self.family)
        return self._judge

    def original(self, name: str) -> Path:
        return file_of(self.family, name)

    def made(self, name: str) -> Path:
        return self.work / f"{name}.safetensors"

    def applied(self, base: Path, lora: Path) -> Path:
        """The base with this LoRA in it, a checkpoint beside the LoRA."""
        out = self.made(f"{lora.stem}-applied")
        run("merge", checkpoint=base, loras=[{"lora": lora}], out=out)
        return self.new(out)

    def new(self, file: Path) -> Path:
        """A file that was written, perhaps anew: pictures of an earlier one of that name are forgotten."""
        for key in [key for key in self._drawn if key[0] == file]:
            del self._drawn[key]
        return file

    def draw(self, file: Path, name: str) -> Drawn:
        """What a checkpoint draws for the prompts of the model of that name."""
        key = (file, ",".join(captions_of(name)))
        if key not in self._drawn:
            drawn = pictures(load(file), captions_of(name), [seed for _ in scenes_of(name) for seed in SEEDS])
            eighths = ((drawn + 1) * 127.5).round().to(torch.uint8)
            self._drawn[key] = Drawn(eighths, self.judge.features(drawn), self.judge.find(drawn))
        return self._drawn[key]

    def first_seed(self, file: Path, name: str) -> Tensor:
        """[prompts, 3, 64, 64] in [-1, 1]: the first seed's pictures, for a sheet."""
        return self.draw(file, name).pictures[:: len(SEEDS)].float() / 127.5 - 1

    def compare(self, file: Path, name: str, like: Path | None = None, manner: str | None = None) -> Likeness:
        """A checkpoint against the original of that name, or against the one that it should be like.

        manner: the one that counts as right; without it that of the original. A checkpoint that was made is deleted
        afterwards, its pictures are kept.
        """
        original = like or self.original(name)
        ours, theirs = self.draw(file, name), self.draw(original, name)
        member = member_of(name)
        scenes = [scene for scene in scenes_of(name) for _ in SEEDS]
        wanted = MANNERS.index(manner or (member.manner if member else "plain"))
        right = answers([member.asked(scene) for scene in scenes] if member else scenes, wanted)
        correct = torch.stack([(ours.found[h] == right[h]) | (right[h] < 0) for h in HEADS if h != "manner"]).all(0)
        same = torch.stack([ours.found[head] == theirs.found[head] for head in HEADS]).all(0)
        other_seed = theirs.features.unflatten(0, (-1, len(SEEDS))).roll(1, 1).flatten(0, 1)
        scale = (theirs.features - other_seed).norm(dim=1).mean()
        apart = _apart(ours, theirs)
        base = self.original(BASE)
        weights, yardstick = float("nan"), torch.tensor(float("nan"))
        if original != base:  # from itself, nothing can be missed
            weights, yardstick = missed(base, original, file), _apart(self.draw(base, name), theirs).mean()
        if file.parent == self.work:
            file.unlink()
        return Likeness(
            Spread((weights,) * len(SEEDS)),
            Spread.over_seeds(apart),
            Spread.over_seeds(apart / yardstick),
            Spread.over_seeds((ours.features - theirs.features).norm(dim=1) / scale),
            Spread.over_seeds(same.float()),
            Spread.over_seeds(correct.float()),
            Spread.over_seeds((ours.found["manner"] == wanted).float()),
        )


def _apart(ours: Drawn, theirs: Drawn) -> Tensor:
    """[prompts · seeds] in [0, 1]: mean absolute difference of each two pictures."""
    return (ours.pictures.float() - theirs.pictures.float()).abs().mean((1, 2, 3)) / 255
