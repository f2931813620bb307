"""A small classifier of the family's pictures: which subject, colour, size, paper and manner it finds in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .captions import COLOURS, GROUNDS, NUMBERS, SIZES, SUBJECTS, Scene, by_lot
from .drawing import MANNERS, draw, scenes_in

HEADS = {
    "subject": len(SUBJECTS) + len(NUMBERS), "colour": len(COLOURS), "size": len(SIZES), "ground": len(GROUNDS),
    "manner": len(MANNERS),
}  # fmt: skip
_WIDTHS = (32, 48, 64, 96)


class Judge(nn.Module):
    """Pictures [n, 3, 64, 64] -> scores of each head; `features` is what the heads see, [n, 2·96]."""

    def __init__(self) -> None:
        super().__init__()
        wides = (3, *_WIDTHS[:-1])
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(wide, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.ReLU(),
                              nn.Conv2d(out, out, 3, padding=1), nn.ReLU())
                for wide, out in zip(wides, _WIDTHS, strict=True)
            )
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(2 * _WIDTHS[-1], count) for name, count in HEADS.items()})

    def features(self, pictures: Tensor) -> Tensor:
        h = self.layers(pictures)
        return torch.cat([h.mean((2, 3)), h.amax((2, 3))], 1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def find(self, pictures: Tensor) -> dict[str, Tensor]:
        """The class that each head finds, [n]."""
        return {name: scores.argmax(1) for name, scores in self(pictures).items()}


def answers(scenes: list[Scene], manner: int) -> dict[str, Tensor]:
    """What is right for pictures of these scenes; −100, which no loss counts, where there is no answer."""
    rows = {
        "subject": [s.subject + len(SUBJECTS) * s.number for s in scenes],
        "colour": [-100 if s.number else s.colour for s in scenes],
        "size": [-100 if s.number else s.size for s in scenes],
        "ground": [-100 if s.number else s.ground for s in scenes],
        "manner": [manner] * len(scenes),
    }
    return {name: torch.tensor(row) for name, row in rows.items()}


def train(seed: int, say: Callable[[str], None], steps: int, each: int = 5) -> Judge:
    """On pictures of all manners, slightly blurred and with noise by lot, as an autoencoder leaves them."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    judge = Judge()
    optimiser = torch.optim.AdamW(judge.parameters(), 2e-3)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps + 1)
    for step in range(1, steps + 1):
        pictures, right = _batch(each, random)
        if step % 2:
            pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        strength = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=random)
        pictures = pictures + strength * torch.randn(pictures.shape, generator=random)
        scores = judge(pictures)
        loss = sum(
            (F.cross_entropy(scores[name], right[name], ignore_index=-100) for name in HEADS), start=torch.zeros(())
        )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rates.step()
        if step % 200 == 0:
            say(f"judge {step}/{steps}: loss {float(loss.detach()):.3f}")
    judge.eval().requires_grad_(False)
    for name, share in score(judge, seed + 1).items():
        say(f"judge finds the {name} of {100 * share:.1f} % of unseen drawings")
    return judge


def score(
    judge: Judge, seed: int, each: int = 100, through: Callable[[Tensor], Tensor] = lambda drawn: drawn
) -> dict[str, float]:
    """The share of new drawings, of all manners, in which each head is right; `through` changes them first."""
    pictures, right = _batch(each, torch.Generator().manual_seed(seed))
    found = judge.find(through(pictures))
    shares = {}
    for name, classes in found.items():
        counted = right[name] >= 0
        shares[name] = float((classes[counted] == right[name][counted]).double().mean())
    return shares


def _batch(each: int, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    pictures, right = [], []
    for number, manner in enumerate(MANNERS):
        scenes = by_lot(scenes_in(manner), each, random)
        pictures.append(draw(scenes, manner, random))
        right.append(answers(scenes, number))
    return torch.cat(pictures), {name: torch.cat([r[name] for r in right]) for name in HEADS}
