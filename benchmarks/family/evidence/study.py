"""What every question is asked with: jobs on files, pictures at fixed prompts and seeds, how far pictures differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.report import Report
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import VERBS

from ..captions import NUMBER_SCENES, Scene
from ..drawing import MANNERS
from ..judge import HEADS, Judge, answers
from ..members import BASE, EVERY, FINE_TUNES, Member
from ..model import load
from ..sampling import pictures
from ..train import file_of, load_judge

# Chosen before any model was trained: each subject once; colours, sizes and papers by a rule; eight seeds in a row.
PROMPTS = [Scene(i, (5 * i + 1) % 6, i % 2, 3 * i % 4) for i in range(8)]
SEEDS = range(1000, 1008)


@dataclass(frozen=True)
class Spread:
    """A mean, and the standard deviation between seeds."""

    mean: float
    deviation: float

    @staticmethod
    def over_seeds(values: Tensor) -> Spread:
        """values: [prompts · seeds], the seeds of a prompt side by side."""
        by_seed = values.double().reshape(-1, len(SEEDS)).mean(0)
        return Spread(float(by_seed.mean()), float(by_seed.std()))

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.deviation:.1f}"


@dataclass(frozen=True)
class Drawn:
    """One model's pictures of all prompts and seeds, and what the judge makes of them."""

    pictures: Tensor
    features: Tensor
    found: dict[str, Tensor]


@dataclass(frozen=True)
class Likeness:
    """Of a model's pictures to an original's, at the same prompts and seeds; shares from 0 to 1.

    pixels: mean absolute difference, of the range from black to white. features: distance of what the judge's heads
    see, of that between two seeds of the original. same: the judge finds the same subject, colour, size, paper and
    manner. asked: it finds the subject, colour, size and paper that were asked for. manner: it finds the original's
    manner of drawing.
    """

    pixels: Spread
    features: Spread
    same: Spread
    asked: Spread
    manner: Spread


def member_of(name: str) -> Member | None:
    return next((member for member in EVERY if member.name == name), None)


def scenes_of(name: str) -> list[Scene]:
    """What the model of that name is asked for."""
    member = member_of(name)
    return NUMBER_SCENES[: len(PROMPTS)] if member and member.manner == "numbers" else PROMPTS


def captions_of(name: str) -> list[str]:
    return [str(scene) for scene in scenes_of(name) for _ in SEEDS]


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

    def run(self, verb: str, **params: Any) -> Report:
        """One of Hypermerge's jobs, as the command line runs it; paths become names."""
        plain = json.loads(json.dumps(params, default=str))
        return execute(VERBS[verb], VERBS[verb].spec.from_json({**plain, "overwrite": True}), PathHost(), Context())

    def merged(self, base: Path, loras: list[tuple[Path, float]], name: str) -> Path:
        """The base with these LoRAs in it."""
        self.run(
            "merge",
            checkpoint=base,
            loras=[{"lora": str(lora), "weight": weight} for lora, weight in loras],
            out=self.made(name),
        )
        return self.made(name)

    def draw(self, file: Path, name: str) -> Drawn:
        """What a checkpoint draws for the prompts of the model of that name."""
        key = (file, ",".join(captions_of(name)))
        if key not in self._drawn:
            scenes = scenes_of(name)
            drawn = pictures(load(file), captions_of(name), [seed for _ in scenes for seed in SEEDS])
            self._drawn[key] = Drawn(drawn, self.judge.features(drawn), self.judge.find(drawn))
        return self._drawn[key]

    def forget(self, file: Path) -> None:
        """Before a file of that name is written anew."""
        for key in [key for key in self._drawn if key[0] == file]:
            del self._drawn[key]

    def compare(self, file: Path, name: str, target: str | None = None) -> Likeness:
        """A checkpoint's pictures against those of the original of that name.

        target: the manner that counts as right; without it that of the original.
        """
        ours, theirs = self.draw(file, name), self.draw(self.original(name), name)
        member = member_of(name)
        scenes = [scene for scene in scenes_of(name) for _ in SEEDS]
        asked = [member.asked(scene) for scene in scenes] if member else scenes
        manner = MANNERS.index(target or (member.manner if member else "plain"))
        right = answers(asked, manner)
        heads = [head for head in HEADS if head != "manner"]
        correct = torch.stack([(ours.found[h] == right[h]) | (right[h] < 0) for h in heads]).all(0)
        same = torch.stack([ours.found[head] == theirs.found[head] for head in HEADS]).all(0)
        other_seed = theirs.features.unflatten(0, (-1, len(SEEDS))).roll(1, 1).flatten(0, 1)
        scale = (theirs.features - other_seed).norm(dim=1).mean()
        return Likeness(
            pixels=Spread.over_seeds((ours.pictures - theirs.pictures).abs().mean((1, 2, 3)) / 2),
            features=Spread.over_seeds((ours.features - theirs.features).norm(dim=1) / scale),
            same=Spread.over_seeds(same.float()),
            asked=Spread.over_seeds(correct.float()),
            manner=Spread.over_seeds((ours.found["manner"] == manner).float()),
        )


def average(likenesses: list[Likeness]) -> Likeness:
    """Means over several models; the deviation is that between models."""

    def one(attribute: str) -> Spread:
        means = torch.tensor([getattr(likeness, attribute).mean for likeness in likenesses], dtype=torch.float64)
        return Spread(float(means.mean()), float(means.std()) if len(means) > 1 else 0.0)

    return Likeness(*(one(attribute) for attribute in ("pixels", "features", "same", "asked", "manner")))


RELATED = [member.name for member in FINE_TUNES if member.manner != "numbers"]
OUTLIER = next(member.name for member in FINE_TUNES if member.manner == "numbers")
__all__ = ["BASE", "OUTLIER", "PROMPTS", "RELATED", "SEEDS", "Drawn", "Likeness", "Spread", "Study", "average"]
