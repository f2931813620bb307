"""Models in memory, made of torch modules whose parameters have a checkpoint's names."""

from __future__ import annotations

import torch


def module_tree(weights: dict[str, torch.Tensor], wrapped: tuple[str, ...] = ()) -> torch.nn.Module:
    """Nested modules whose parameters have these names; paths of `wrapped` get a `.wrapped` after them."""
    root = torch.nn.Module()
    for key, tensor in weights.items():
        for path in wrapped:
            key = key.replace(f"{path}.", f"{path}.wrapped.", 1) if key.startswith(f"{path}.") else key
        *path, name = key.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key.replace(".wrapped", ""): value.clone() for key, value in model.named_parameters()}
