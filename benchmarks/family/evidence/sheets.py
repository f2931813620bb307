"""Sheets of pictures with a name beside each row."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

_ZOOM, _GAP = 1.5, 4


def head_of(caption: str) -> str:
    """A caption in lines as wide as a picture: a large red star on sky → large red / star / on sky."""
    _, *words = caption.split()
    return " ".join(words[:2]) + f"\n{words[2]}\n" + " ".join(words[3:])


def save_sheet(file: Path, rows: list[tuple[str, Tensor]], heads: list[str] | None = None, label: int = 170) -> None:
    """rows: a name (lines by newline) and [n, 3, h, w] in [-1, 1]; heads: a line above each column."""
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), 13)
    shown = [(name, F.interpolate(pictures, scale_factor=_ZOOM, mode="bilinear")) for name, pictures in rows]
    high, wide = shown[0][1].shape[2] + _GAP, shown[0][1].shape[3] + _GAP
    top = 18 * max(head.count("\n") + 1 for head in heads) if heads else 0
    columns = max(len(pictures) for _, pictures in shown)
    sheet = Image.new("RGB", (label + columns * wide, top + len(rows) * high), "white")
    pen = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads or []):
        pen.multiline_text((label + column * wide + 2, 2), head, "black", font, spacing=2)
    for row, (name, pictures) in enumerate(shown):
        y = top + row * high
        pen.multiline_text((4, y + high // 2), name, "black", font, anchor="lm", spacing=2)
        for column, picture in enumerate(pictures):
            pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            sheet.paste(Image.fromarray(np.ascontiguousarray(pixels)), (label + column * wide, y))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)
