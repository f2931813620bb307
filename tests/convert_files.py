"""LoRA files in kohya's spelling for narrow checkpoints, and the convert command run on them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
from models import last_json, run_cli
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_hypermerge.files.source import TensorInfo
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.dialects import diffusers
from lib_hypermerge.layouts.module import LORA_KINDS, NORM, Module
from lib_hypermerge.layouts.reference import Outline
from lib_hypermerge.layouts.tables import narrow, shapes

Tensors = dict[str, torch.Tensor]
ARCHITECTURE = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "flux_dev": "flux", "sd35_medium": "sd3"}
SOME = r"middle_block|(in|out)put_blocks\.[1458]\.|_emb|out\.2|input_blocks\.0|(layers|resblocks|block)\.(3|22)\."
TEXTS = {
    "ss_output_name": "before", "ss_base_model_version": "said by its trainer", "ss_tag_frequency": '{"a": {"b": 1}}',
    "modelspec.title": "before", "modelspec.author": "somebody", "sshs_model_hash": "0" * 64, "ss_network_dim": "7",
}  # fmt: skip


@functools.cache
def layers(family: str, divisor: int = 32) -> list[Module]:
    """Every layer that kohya's files can name, of a narrow model."""
    outline = Outline(family, narrow(shapes(family), divisor) if divisor > 1 else shapes(family))
    return [m for modules in recognise(outline).components.values() for m in modules.values() if m.name and m.weight]


def size(module: Module) -> tuple[int, ...]:
    assert isinstance(module.weight, TensorInfo)
    return module.weight.shape


def linear_or_conv(module: Module) -> bool:
    return module.kind in LORA_KINDS


def is_norm(module: Module) -> bool:
    return module.kind == NORM


def some(module: Module) -> bool:
    """About a tenth of the layers, of every kind and component."""
    return re.search(SOME, f"{module.component}.{module.path}") is not None


def lora(
    family: str,
    *,
    dtype: torch.dtype = torch.float16,
    alpha: Callable[[int], float | None] = lambda i: 2.0,
    alpha_dtype: torch.dtype = torch.float32,
    rank: Callable[[int], int] = lambda i: 4,
    only: Callable[[Module], bool] = lambda module: True,
    divisor: int = 32,
    seed: int = 0,
) -> Tensors:
    """A LoRA of all layers that one reaches; alpha and rank by the layer's number."""
    generator = torch.Generator().manual_seed(seed)
    out: Tensors = {}
    chosen = [m for m in layers(family, divisor) if linear_or_conv(m) and only(m)]
    for index, module in enumerate(chosen):
        n, *rest = size(module)
        r, ones = rank(index), [1] * (len(rest) - 1)
        out[f"{module.name}.lora_down.weight"] = (torch.randn(r, *rest, generator=generator) * 0.1).to(dtype)
        out[f"{module.name}.lora_up.weight"] = (torch.randn(n, r, *ones, generator=generator) * 0.1).to(dtype)
        if (value := alpha(index)) is not None:
            out[f"{module.name}.alpha"] = torch.tensor(value, dtype=alpha_dtype)
    return out


def save(path: Path, tensors: Tensors, texts: dict[str, str] | None = None) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, TEXTS if texts is None else texts)
    return path


def arguments(source, out, *more) -> list:
    return ["convert", "--lora", source, "--out", out, "--json", "--quiet", *more]


def convert(source, out, *more) -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    result = run_cli(arguments(source, out, *more))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def refusal(source, out, *more) -> dict:
    """The error of a run that must be refused before anything is computed."""
    result = run_cli(arguments(source, out, *more))
    assert result.returncode == 2, result.stdout or result.stderr
    return last_json(result)["error"]


def texts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_bits(a: Tensors, b: Tensors) -> bool:
    """Whether two files hold the same tensors to the bit."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape
        and torch.equal(a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8))
        for k in a
    )  # fmt: skip


def load(path: Path) -> Tensors:
    return load_file(path)


def deltas(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What a file of kohya's adds to each module, float64 (n, k): alpha / rank · up · down."""
    out = {}
    for key in tensors:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = tensors[key].double().flatten(1), tensors[f"{name}.lora_up.weight"].double().flatten(1)
            alpha = float(tensors[f"{name}.alpha"]) if f"{name}.alpha" in tensors else len(down)
            out[name] = up @ down * (alpha / len(down))
    return out


def diffusers_names(family: str, module: Module) -> list[tuple[str, int, int]]:
    """(name, first row, last row) of the layers that a module is in diffusers."""
    return [(n, p.start, p.stop) for n, p in diffusers.names(ARCHITECTURE[family], module)]
