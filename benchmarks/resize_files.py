"""A LoRA of true widths with decaying spectra, written module by module. Made once, then kept.

python benchmarks/resize_files.py sd15|sd21|sdxl|flux RANK FILE [--conv] [--kind fp16|bf16|fp32]

All layers that sd-scripts trains: of SD the linear layers and 1×1 convolutions of UNet and text encoders, with --conv
the 3×3 ones too; of Flux the transformer's blocks, at rank 128 some 1.2 GB.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lib_hypermerge.adapters import lora
from lib_hypermerge.files.writer import SafetensorsWriter, header_bytes
from lib_hypermerge.layouts.module import CONV, LORA_KINDS, Module
from lib_hypermerge.layouts.reference import reference_model

ARCHITECTURES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "flux": "flux"}
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_LEFT_OUT = ("embedding", "inout", "resnet", "sampling")  # groups that sd-scripts gives factors only with conv_dim


def modules(model: str, conv: bool) -> Iterator[Module]:
    """Those that get factors."""
    for component in reference_model(ARCHITECTURES[model]).components.values():
        for module in component.values():
            if module.kind not in LORA_KINDS or not module.name or (model == "flux" and module.component != "unet"):
                continue
            if model == "flux":
                wanted = "_blocks_" in module.name
            else:
                wanted = module.component != "unet" or module.group not in _LEFT_OUT or (conv and module.kind == CONV)
            if wanted:
                yield module


def factors(module: Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up (n, r) and down (r, k) in float32 of a change with σ_i ∝ i^−p, p in 0.4…1.2 and another in each module.

    As training leaves them: the directions are mixed, each column of up holds some of all. The change is about 5 % of
    what a weight of that size is.
    """
    assert module.name is not None
    n, k = module.matrix_shape
    r = min(rank, n, k)
    generator = torch.Generator().manual_seed(zlib.crc32(module.name.encode()))
    power = 0.4 + 0.8 * float(torch.rand(1, generator=generator))
    S = torch.arange(1, r + 1).float() ** -power
    S *= 0.05 * 0.7 * n**0.5 / S.norm()  # a weight of 0.7/√k each has a norm of 0.7·√n
    mix = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
    up = torch.randn(n, r, generator=generator) @ ((S / n).sqrt()[:, None] * mix) / n**0.25
    down = (mix.mT * (S / k).sqrt()) @ torch.randn(r, k, generator=generator) * n**0.25
    balance = (down.norm() / up.norm()).sqrt()
    return up * balance, down / balance


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    dtype, found = _DTYPES[options.kind], list(modules(options.model, options.conv))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(options.rank)}
    metadata["ss_network_alpha"] = str(options.rank)
    names = [f"{module.name}.{part}" for module in found for part in (lora.UP, lora.DOWN, "alpha")]
    entry = {"dtype": "BF16", "shape": [10**6] * 4, "data_offsets": [10**12, 10**12]}
    reserve = len(header_bytes(dict.fromkeys(names, entry), metadata))
    options.file.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(options.file, reserve) as writer:
        for module in found:
            assert module.name is not None and module.weight is not None
            up, down = factors(module, options.rank)
            for name, tensor in lora.tensors(module.name, up.to(dtype), down.to(dtype), module.weight.shape):
                writer.add(name, tensor)
        writer.commit(lambda *_: metadata)
    size = options.file.stat().st_size / 2**20
    print(f"{options.file}: {len(found)} modules, {size:.0f} MiB", file=sys.stderr)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=ARCHITECTURES)
    parser.add_argument("rank", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--conv", action="store_true", help="3×3 convolutions and ResNets too")
    parser.add_argument("--kind", choices=_DTYPES, default="fp16", help="number format (default: fp16)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
