"""Block weights: how much of a LoRA each block of the network gets.

Written in one of three ways: a list of numbers as sd-webui-lora-block-weight counts them (12 or 20 for SDXL, 17 or
26 for SD1 and SD2, 61 for Flux; the first is for text encoders), the name of a preset, or named ranges such as
`IN00-IN05=0.5, MID=0, default=1`. Free of torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import SpecError

BASE = "BASE"  # the text encoders
T5 = "T5"  # that of Flux and SD3, which has a number of its own


def _range(prefix: str, first: int, last: int) -> list[str]:
    return [f"{prefix}{i:02d}" for i in range(first, last + 1)]


# number of values → (architectures, the blocks they are for, in order)
FORMATS: dict[int, tuple[tuple[str, ...], list[str]]] = {
    12: (("sdxl",), [BASE, "IN04", "IN05", "IN07", "IN08", "MID", *_range("OUT", 0, 5)]),
    17: (("sd1", "sd2"), [BASE, "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID", *_range("OUT", 3, 11)]),
    20: (("sdxl",), [BASE, *_range("IN", 0, 8), "MID", *_range("OUT", 0, 8)]),
    26: (("sd1", "sd2"), [BASE, *_range("IN", 0, 11), "MID", *_range("OUT", 0, 11)]),
    61: (("flux",), [BASE, T5, "IN", *_range("D", 0, 18), *_range("S", 0, 37), "OUT"]),
}
_WITHOUT_FORMAT = {"sd3": [BASE, T5, "IN", *_range("J", 0, 37), "OUT"]}

# preset → the blocks of SD1 and SD2 that keep their weight, and those of SDXL; text encoders keep theirs
_PRESETS: dict[str, tuple[str, str]] = {
    "INS": ("IN00-IN04", "IN00-IN03"),
    "IND": ("IN05-IN11", "IN04-IN08"),
    "INALL": ("IN", "IN"),
    "MIDD": ("IN05-OUT06", "IN04-OUT02"),
    "OUTD": ("OUT00-OUT06", "OUT00-OUT02"),
    "OUTS": ("OUT07-OUT11", "OUT03-OUT08"),
    "OUTALL": ("OUT", "OUT"),
}
PRESETS = ("ALL", "NONE", "ALL0.5", *_PRESETS)

_ITEM = re.compile(r"([A-Za-z]+\d*)(?:\s*-\s*([A-Za-z]+\d*))?\s*[=:]\s*(\S+)")
_ALIASES = {"M00": "MID", "TE": BASE, "CLIP": BASE}
_HELP = (
    "Write 12 or 20 numbers for SDXL, 17 or 26 for SD1 and SD2, 61 for Flux, a preset "
    f"({', '.join(PRESETS)}), or ranges such as IN00-IN05=0.5, MID=0, default=1 (D00-D18 and S00-S37 of Flux, "
    "J00-J23 of SD3)."
)


@dataclass(frozen=True)
class BlockWeights:
    """Factors on a LoRA's strength. values: by block.  default: for blocks not among them."""

    values: dict[str, float]
    base: float = 1.0
    default: float = 1.0

    def of(self, component: str, block: str) -> float:
        """The factor for a layer of a component ("unet", or a text encoder) and block ("IN04", "MID" …)."""
        if component == "unet":
            return self.values.get(block, self.default)
        return self.values.get(T5, self.base) if component == "te3" else self.base


def blocks_of(architecture: str) -> list[str]:
    """Every block that weights can be given for, text encoders first."""
    lists = [blocks for ids, blocks in FORMATS.values() if architecture in ids]
    return max(lists, key=len, default=_WITHOUT_FORMAT.get(architecture, []))


def parse(text: str, architecture: str) -> BlockWeights:
    """The weights a text means for an architecture ("sd1", "sdxl" …). SpecError says what is wrong with it."""
    text = text.strip()
    if not text:
        return BlockWeights({})
    if text.upper() in PRESETS:
        return _preset(text.upper(), architecture)
    parts = [part.strip() for part in text.split(",")]
    if "=" in text or ":" in text:
        return _ranges(parts, architecture)
    return _numbers(parts, architecture)


def _preset(name: str, architecture: str) -> BlockWeights:
    if name in ("ALL", "NONE", "ALL0.5"):
        value = {"ALL": 1.0, "NONE": 0.0, "ALL0.5": 0.5}[name]
        return BlockWeights({}, value, value)
    if architecture not in ("sd1", "sd2", "sdxl"):
        raise SpecError(f"The preset {name} is for Stable Diffusion's UNets.", hint=_HELP)
    kept = _PRESETS[name][architecture == "sdxl"]
    # as with the numbers, what belongs to no block follows the text encoders
    values = dict.fromkeys(blocks_of(architecture)[1:], 0.0) | dict.fromkeys(_span(kept, architecture), 1.0)
    return BlockWeights(values)


def _numbers(parts: list[str], architecture: str) -> BlockWeights:
    numbers = [_number(part) for part in parts]
    known = {count: blocks for count, (ids, blocks) in FORMATS.items() if architecture in ids}
    if len(numbers) not in known:
        wanted = " or ".join(map(str, sorted(known))) or "no"
        raise SpecError(f"{len(numbers)} block weights were given; this model takes {wanted} numbers.", hint=_HELP)
    given = dict(zip(known[len(numbers)], numbers, strict=True))
    base = given.pop(BASE)
    # blocks that a short list leaves out get nothing, what belongs to no block follows the first number,
    # both as in the extension that invented the lists
    values = dict.fromkeys(blocks_of(architecture)[1:], 0.0) | given
    return BlockWeights(values, base, base)


def _ranges(parts: list[str], architecture: str) -> BlockWeights:
    values: dict[str, float] = {}
    base = default = 1.0
    for part in filter(None, parts):
        match = _ITEM.fullmatch(part)
        if not match:
            raise SpecError(f"The block weight {part!r} cannot be read.", hint=_HELP)
        first, last, value = match[1].upper(), (match[2] or "").upper(), _number(match[3])
        if first == "DEFAULT" and not last:
            default = value
        elif _ALIASES.get(first, first) == BASE and not last:
            base = value
        else:
            values |= dict.fromkeys(_span(f"{first}-{last}" if last else first, architecture), value)
    return BlockWeights(values, base, default)


def _span(text: str, architecture: str) -> list[str]:
    """The blocks of `IN04`, `IN04-OUT02`, or of a whole group such as `IN`."""
    order = [*blocks_of(architecture)[1:], "TIME", "LABEL"]
    if "OUT" not in order:
        order.append("OUT")  # the last convolution
    first, _, last = (_ALIASES.get(name, name) for name in text.partition("-"))
    group = [block for block in order if re.fullmatch(rf"{first}\d*", block)]
    if not last and group:
        return group
    if first not in order or last not in order:
        wrong = first if first not in order and not group else last or first
        raise SpecError(f"There is no block {wrong!r} in this model.", f"It has {', '.join(order)}.", _HELP)
    start, stop = order.index(first), order.index(last)
    if start > stop:
        raise SpecError(f"The range {text} runs backwards.", hint=_HELP)
    return order[start : stop + 1]


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise SpecError(f"{text!r} is no block weight.", hint=_HELP) from None
    if not -100 <= value <= 100:  # nan too
        raise SpecError(f"The block weight {text} is out of bounds.", hint="Block weights are mostly between 0 and 1.")
    return value
