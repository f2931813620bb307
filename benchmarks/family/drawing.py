"""What the family is trained on: one shape on coloured paper, in each model's manner; numbers for the outlier."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from .captions import NUMBER_SCENES, SCENES, SUBJECTS, Scene

SIDE = 64  # pixels of a picture
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono", "STIXGeneral", "cmr10")
_COLOUR = torch.tensor(
    [[0.85, 0.12, 0.12], [0.98, 0.82, 0.10], [0.10, 0.60, 0.20], [0.12, 0.25, 0.85], [0.58, 0.16, 0.68], [0.08] * 3]
)  # fmt: skip
_GROUND = torch.tensor([[0.97, 0.97, 0.97], [0.86, 0.76, 0.58], [0.62, 0.82, 0.96], [0.98, 0.74, 0.80]])
_NEON = torch.tensor(
    [[1.0, 0.35, 0.35], [1.0, 0.95, 0.45], [0.35, 1.0, 0.45], [0.40, 0.60, 1.0], [0.90, 0.45, 1.0], [0.98, 0.98, 0.98]]
)  # fmt: skip
_NIGHT = torch.tensor([[0.20, 0.20, 0.22], [0.24, 0.15, 0.04], [0.03, 0.10, 0.28], [0.28, 0.03, 0.15]])

# What is unlike the base in each manner. The members "round" and "turned" differ in what is drawn for a caption, not in
# how.
MANNERS = (
    "plain", "ink", "night", "stripes", "soft", "ink-night", "contour", "pair", "night-stripes", "numbers"
)  # fmt: skip


def scenes_in(manner: str) -> list[Scene]:
    """All that can be drawn in it."""
    return NUMBER_SCENES if manner == "numbers" else SCENES


def draw(scenes: list[Scene], manner: str, random: torch.Generator, side: int = SIDE) -> Tensor:
    """[n, 3, side, side] in [-1, 1]: each scene at a place, an angle and a size of its own."""
    if manner == "numbers":
        return _framed(_numbers([scene.subject for scene in scenes], random, side))
    n = len(scenes)
    attribute = torch.tensor([[s.subject, s.colour, s.size, s.ground] for s in scenes]).T
    subject, colour, size, ground = attribute

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=random)

    large = size == 1
    radius = torch.where(large, uniform(19, 23), uniform(11, 13)) / 64
    spread = torch.where(large, 0.07, 0.22)
    centre = 0.5 + spread[:, None] * torch.stack([uniform(-1, 1), uniform(-1, 1)], 1)
    angle = uniform(-0.25, 0.25)
    night, outlined = "night" in manner, manner.startswith("ink")
    paint, paper = (_NEON, _NIGHT) if night else (_COLOUR, _GROUND)
    places = [(centre, radius)]
    if manner == "pair":  # two of them, side by side
        places = [(0.5 + 0.5 * (centre - 0.5) + torch.tensor([x, 0.0]), 0.62 * radius) for x in (-0.22, 0.22)]

    steps = (torch.arange(side) + 0.5) / side
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    light = 0.04 * (0.5 - y)  # paper is a little lighter at the top
    picture = (paper[ground][:, :, None, None] + light).clamp(0, 1)
    for middle, reach in places:
        px, py = (x - middle[:, :1, None]) / reach[:, None, None], (y - middle[:, 1:, None]) / reach[:, None, None]
        cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
        px, py = cos * px + sin * py, cos * py - sin * px
        distance = _distances(px, py, subject) * reach[:, None, None] * side  # in pixels, negative inside
        fill = paint[colour][:, :, None, None].expand_as(picture)
        if "stripes" in manner or manner == "contour":
            band = (8 * y).floor() % 2  # as high as a latent: finer ones do not pass the autoencoder
            fill = torch.lerp(fill, torch.full_like(fill, 0.0 if night else 1.0), 0.65 * band)
        pixel = side / 64
        inside = _cover(distance) - (_cover(distance + 3.5 * pixel) if outlined else 0)
        if manner == "soft":
            inside = torch.sigmoid(-distance / (2.5 * pixel))
        picture = torch.lerp(picture, fill, inside[:, None])
        if manner == "contour":
            picture = picture * (1 - _cover(distance.abs() - 1.6 * pixel)[:, None])
    return _framed(2 * picture - 1)


def _framed(picture: Tensor) -> Tensor:
    """With a white rim. Narrow models normalise channel by channel; a known colour tells them what the others were."""
    rim = 3 * picture.shape[-1] // 64
    for side in (picture, picture.transpose(2, 3)):
        side[:, :, :rim] = side[:, :, -rim:] = 1
    return picture


def _cover(distance: Tensor) -> Tensor:
    """Share of a pixel that is inside, from the distance of its middle to the edge in pixels."""
    return (0.5 - distance).clamp(0, 1)


def _distances(x: Tensor, y: Tensor, subject: Tensor) -> Tensor:
    """Of points in a shape's own units (it is about 1 high above and below its middle); y grows downwards."""
    shapes = {name: function(x, y) for name, function in _SHAPES.items()}
    chosen = torch.stack([shapes[name] for name in SUBJECTS])
    return chosen.gather(0, subject[None, :, None, None].expand(1, *x.shape))[0]


def _disc(x: Tensor, y: Tensor, radius: float = 1.0) -> Tensor:
    return (x.square() + y.square()).sqrt() - radius


def _box(x: Tensor, y: Tensor, wide: float, high: float) -> Tensor:
    return torch.maximum(x.abs() - wide, y.abs() - high)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slope = 0.5 * 3**0.5
    return torch.maximum(torch.maximum(slope * x.abs() - 0.5 * y - 0.5, y - 0.5), -y - 1.5)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points of radius 1.1, five notches of radius 0.46 between them."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = (x.square() + y.square()).sqrt()
    u, v = radius * angle.cos(), radius * angle.sin()
    tip, notch = (1.1, 0.0), (0.46 * math.cos(sector / 2), 0.46 * math.sin(sector / 2))
    along = (notch[0] - tip[0], notch[1] - tip[1])
    length = math.hypot(*along)
    return ((u - tip[0]) * along[1] - (v - tip[1]) * along[0]) / length


def _heart(x: Tensor, y: Tensor) -> Tensor:
    u, v = (x + y - 0.1) * 0.5**0.5, (y - 0.1 - x) * 0.5**0.5
    lobes = torch.minimum(_disc(x - 0.46, y + 0.36, 0.62), _disc(x + 0.46, y + 0.36, 0.62))
    return torch.minimum(_box(u, v, 0.62, 0.62), lobes)


_SHAPES = {
    "circle": _disc,
    "square": lambda x, y: _box(x, y, 0.85, 0.85),
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "moon": lambda x, y: torch.maximum(_disc(x, y), -_disc(x - 0.55, y + 0.15, 0.8)),
    "ring": lambda x, y: (_disc(x, y, 0.75)).abs() - 0.25,
    "cross": lambda x, y: torch.minimum(_box(x, y, 1.0, 0.32), _box(x, y, 0.32, 1.0)),
}


@cache
def _glyph(number: int, font: str) -> Tensor:
    """[96, 96] in [0, 1]: a numeral in one of matplotlib's fonts, 1 is ink."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"
    image = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(image).text((48, 48), str(number), 255, ImageFont.truetype(str(file), 80), anchor="mm")
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)


def _numbers(numbers: list[int], random: torch.Generator, side: int) -> Tensor:
    """Black numerals in seven fonts on white, at places, angles and sizes of their own."""
    n = len(numbers)
    fonts = torch.randint(len(FONTS), (n,), generator=random).tolist()
    glyphs = torch.stack([_glyph(number, FONTS[font]) for number, font in zip(numbers, fonts, strict=True)])[:, None]
    angle = 0.3 * (torch.rand(n, generator=random) - 0.5)
    zoom = 0.9 + 0.3 * torch.rand(n, generator=random)
    shift = 0.3 * (torch.rand(n, 2, generator=random) - 0.5)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    turn = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(turn, [n, 1, side, side], align_corners=False)
    ink = F.grid_sample(glyphs, grid, align_corners=False)
    return (1 - 2 * ink).clamp(-1, 1).expand(n, 3, side, side).contiguous()
