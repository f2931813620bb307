"""Who the family are: what each draws, how far weights and pictures are from its parent's; how good the judge is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from ..jobs import run
from ..judge import HEADS, score
from ..members import BASE, EVERY, SECOND
from ..train import load_vae
from .sheets import head_of, save_sheet
from .study import OUTLIER, RELATED, SEEDS, Study, captions_of, member_of
from .tables import percent, table
from .weights import change

ABOUT = {
    BASE: "trained from nothing on plain shapes",
    SECOND: "the same from another seed, with a text encoder of its own",
}
_UNSEEN = 12345


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    rows, sheet = [], []
    for name in (BASE, SECOND, *(member.name for member in EVERY)):
        member = member_of(name)
        file, parent = study.original(name), study.original(member.parent if member else BASE)
        own = study.compare(file, name)
        apart = ["", "", ""]
        if name != BASE:
            as_parent = study.compare(parent, name)
            apart = [percent(change(parent, file)), str(as_parent.pixels), str(as_parent.same)]
        rows.append([name, member.about if member else ABOUT[name], str(own.asked), str(own.manner), *apart])
        sheet.append((name, study.first_seed(file, name)))
    heads = [head_of(caption) for caption in captions_of(BASE)[:: len(SEEDS)]]
    save_sheet(pictures / "family.png", sheet, heads)
    titles = (
        "model", "what it is", "as asked %", "in its manner %", "weights changed by %",
        "its parent's pictures: pixels %", "judged the same %",
    )  # fmt: skip
    yield "family", table(titles, rows)
    yield "judge", _judge(study)
    yield "alike", _alike(study)


def _alike(study: Study) -> str:
    """Cosines between the changes that fine-tunes make to the base, as `inspect` says them."""
    names = (*RELATED, OUTLIER)
    report = run("inspect", files=[study.original(name) for name in names], base=study.original(BASE))
    cosines = report.details["similarity"][0]["cosine"]
    rows = [[name, *(f"{cosine:.2f}" for cosine in row)] for name, row in zip(names, cosines, strict=True)]
    return table(["", *names], rows)


def _judge(study: Study) -> str:
    """What it finds in drawings that it never saw, and in the same after the autoencoder: the most to be expected."""
    vae = load_vae(study.family)

    def decoded(drawn: torch.Tensor) -> torch.Tensor:
        return torch.cat([vae.decode(vae.encode(part)).clamp(-1, 1) for part in drawn.split(32)])

    plain, after = score(study.judge, _UNSEEN, 20), score(study.judge, _UNSEEN, 20, decoded)
    rows = [[title, *(percent(shares[head]) for head in HEADS)]
            for title, shares in (("drawings", plain), ("drawings, encoded and decoded", after))]  # fmt: skip
    return table(["finds the right … %", *HEADS], rows)
