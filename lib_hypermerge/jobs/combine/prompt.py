"""LoRAs and weights in a prompt, read as AUTOMATIC1111 v1.10 reads them. Free of torch.

`<lora:NAME:TE:UNET:DYN>`: all but the name may be left out; TE, the weight in text encoders, comes first and is 1
without, UNET is as TE without. Each may also be written by its name: te=, unet=, dyn=. `<lyco:…>` is the same.
Source: AUTOMATIC1111/stable-diffusion-webui modules/extra_networks.py, extensions-builtin/Lora/extra_networks_lora.py.
`lbw=`: block weights, as hako-mikan/sd-webui-lora-block-weight has them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from ...errors import SpecError
from ..spec import MOST_WEIGHT, WeightedLora

_TAG = re.compile(r"<(\w+):([^>]+)>")
_OPEN = re.compile(r"<(?:lora|lyco):[^>]*?(?=<\w+:|\Z)")  # where the next begins, or the text ends
_KINDS = ("lora", "lyco")
_NAMED = ("te", "unet", "dyn", "lbw")
_IN_TIME = ("start", "stop", "step")  # of sd-webui-lora-block-weight: steps of the sampler
_SHOWN = 40  # signs of a tag that goes on to the end
_EXAMPLE = "A LoRA is written <lora:name:0.7>, or <lora:name:0.1:0.7> with a weight of its own in text encoders."


@dataclass(frozen=True)
class Mention:
    """A LoRA in a prompt. unet, te: its weights.  dyn: only so many of its directions, the first ones.

    blocks: block weights, as WeightedLora has them.
    """

    name: str
    unet: float = 1.0
    te: float = 1.0
    dyn: int | None = None
    blocks: str = ""

    def weighted(self, name: str) -> WeightedLora:
        """The same under the name that a list has for it; dyn has no place there."""
        te = None if self.te == self.unet else self.te
        return WeightedLora.from_json({"lora": name, "weight": self.unet, "te_weight": te, "blocks": self.blocks})


@dataclass(frozen=True)
class Read:
    """loras: in the order in which they are applied.  notes: what was passed over, one sentence each."""

    loras: tuple[Mention, ...]
    notes: tuple[str, ...] = ()


def read(prompt: str) -> Read:
    """All LoRAs of a prompt. SpecError if there is none, one is not closed or stands there twice, or has no weight."""
    _refuse_open(prompt)
    found: dict[str, list[str]] = {}
    for match in _TAG.finditer(prompt):
        found.setdefault(match[1], []).append(match[2])
    notes = [f"<{kind}:…> is no LoRA; passed over." for kind in found if kind not in _KINDS]
    loras = []
    for kind in (kind for kind in found if kind in _KINDS):  # A1111 takes one kind after the other
        for text in found[kind]:
            loras.append(_mention(f"<{kind}:{text}>", text, notes))
    if not loras:
        raise SpecError("There is no LoRA in the prompt.", hint=_EXAMPLE)
    _refuse_twice(loras)
    return Read(tuple(loras), tuple(dict.fromkeys(notes)))


def _refuse_open(prompt: str) -> None:
    """A1111 takes such a tag for words, or swallows the next one: nobody means that."""
    found = _OPEN.search(prompt)
    if found:
        tag = found[0].strip()
        shown = tag if len(tag) <= _SHOWN else tag[:_SHOWN] + "…"
        raise SpecError(f"{shown} is not closed.", "There is no > behind it.", _EXAMPLE)


def _mention(tag: str, text: str, notes: list[str]) -> Mention:
    given: list[str] = []
    named: dict[str, str] = {}
    for item in text.split(":"):
        pieces = item.split("=", 2)
        if len(pieces) == 2:
            named[pieces[0]] = pieces[1]
        else:
            given.append(item)
    if not given or not given[0].strip():
        raise SpecError(f"{tag} has no name.", hint=_EXAMPLE)
    in_time = [name for name in named if name in _IN_TIME]
    if in_time:
        raise SpecError(
            f"{tag} changes its weight while a picture is made.", f"It says {in_time[0]}={named[in_time[0]]}.",
            "A file has one weight: leave that out.",
        )  # fmt: skip
    notes += [f"{tag}: {name}= means nothing here; passed over." for name in named if name not in _NAMED]
    if len(given) > 4:
        notes.append(f"{tag}: what stands behind the fourth place means nothing; passed over.")
    places = dict(zip(("te", "unet", "dyn"), given[1:], strict=False)) | named  # a name goes before the place
    te = _weight(tag, places.get("te", "1"))
    unet = _weight(tag, places["unet"]) if "unet" in places else te
    dyn = places.get("dyn")
    return Mention(given[0], unet, te, None if dyn is None else _count(tag, dyn), named.get("lbw", ""))


def _weight(tag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpecError(f"{text!r} in {tag} is no weight.", hint=_EXAMPLE)
    if abs(value) > MOST_WEIGHT:
        raise SpecError(f"The weight {text} in {tag} is beyond ±{MOST_WEIGHT:g}.", hint="Was a point left out?")
    return value


def _count(tag: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise SpecError(
            f"dyn in {tag} must be a whole number of directions.", f"Got {text!r}.", "Leave it out for all of them."
        )
    return value


def _refuse_twice(loras: list[Mention]) -> None:
    """What it means is the host's own: AUTOMATIC1111 holds a LoRA once, and applies that as often as it is named."""
    name, count = Counter(lora.name for lora in loras).most_common(1)[0]
    if count > 1:
        own = [lora for lora in loras if lora.name == name]
        raise SpecError(
            f"{name!r} stands {count} times in the prompt.",
            f"Hosts do not agree on that: AUTOMATIC1111 applies it {count} times with the last weight, "
            f"{own[-1].unet:g}.",
            "Write it once, with the weight that is meant.",
        )
