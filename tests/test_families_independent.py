"""What other programs make of the same tensors: LyCORIS' modules and PEFT's layers, run forward, are the judges.

A layer is wrapped and its parameters filled; what the wrapped layer does to unit inputs is its weight W', and the
tensors that the program would save are what we read.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from lib_hypermerge.adapters import families

TOLERANCE = 1e-5  # all of it in float32
N, C, K = 96, 64, 3
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(C, N),
    "conv1x1": lambda: nn.Conv2d(C, N, 1),
    "conv3x3": lambda: nn.Conv2d(C, N, K),
}


def effective(forward: Callable[[torch.Tensor], torch.Tensor], layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) of what is affine: by a zero input and by every unit input."""
    shape = layer.weight.shape
    units = torch.eye(shape[1:].numel()).reshape(-1, *shape[1:])
    with torch.no_grad():
        bias = forward(torch.zeros(1, *shape[1:])).reshape(shape[0])
        weight = (forward(units).reshape(-1, shape[0]) - bias).mT.reshape(shape)
    return weight, bias


def fill(module: nn.Module, size: float) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "dora_scale" in name or "magnitude" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif "rescale" in name or "ia3_l" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(size * torch.randn_like(parameter))


def assert_same(tensors: dict[str, torch.Tensor], family: str, base, wrapped, alpha: float | None = None) -> None:
    """Our change of the base's weight and bias is what the wrapped layer's differ by."""
    (weight, bias), (tuned, tuned_bias) = base, wrapped
    adapter = families.build({name: tensor.detach().clone() for name, tensor in tensors.items()}, alpha)
    assert adapter.family == family
    assert adapter.fits(adapter.shapes, tuple(weight.shape))
    assert (tuned - weight).norm() > 0.01 * weight.norm()
    miss = (weight + adapter.change(weight) - tuned).norm()
    assert miss <= TOLERANCE * (tuned.norm() + weight.norm())
    change = adapter.bias_change()
    torch.testing.assert_close(tuned_bias, bias if change is None else bias + change, rtol=1e-4, atol=1e-4)


LYCORIS = {
    "locon": (LoConModule, "lora", {}),
    "locon-tucker": (LoConModule, "lora", {"use_tucker": True}),
    "locon-rslora": (LoConModule, "lora", {"rs_lora": True}),
    "locon-dora-output": (LoConModule, "dora", {"weight_decompose": True}),
    "locon-dora-input": (LoConModule, "dora", {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, "loha", {}),
    "loha-tucker": (LohaModule, "loha", {"use_tucker": True}),
    "loha-dora-output": (LohaModule, "dora+loha", {"weight_decompose": True}),
    "lokr": (LokrModule, "lokr", {}),
    "lokr-tucker": (LokrModule, "lokr", {"use_tucker": True}),
    "lokr-both": (LokrModule, "lokr", {"decompose_both": True}),
    "lokr-both-tucker": (LokrModule, "lokr", {"decompose_both": True, "use_tucker": True}),
    "lokr-whole": (LokrModule, "lokr", {"full_matrix": True}),
    "lokr-factor": (LokrModule, "lokr", {"factor": 4}),
    "lokr-unbalanced": (LokrModule, "lokr", {"factor": 4, "unbalanced_factorization": True}),
    "lokr-dora-input": (LokrModule, "dora+lokr", {"weight_decompose": True, "wd_on_out": False}),
    "oft": (DiagOFTModule, "oft", {}),
    "oft-bounded": (DiagOFTModule, "oft", {"constraint": 1e-2}),
    "oft-rescaled": (DiagOFTModule, "oft", {"rescaled": True}),
    "boft": (ButterflyOFTModule, "oft", {"lora_dim": 8}),
    "boft-bounded": (ButterflyOFTModule, "oft", {"lora_dim": 8, "constraint": 1e-2, "rescaled": True}),
    "ia3-output": (IA3Module, "ia3", {}),
    "ia3-input": (IA3Module, "ia3", {"train_on_input": True}),
    "glora": (GLoRAModule, "glora", {}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("algorithm", LYCORIS)
def test_lycoris(algorithm, layer):
    torch.manual_seed(0)
    kind, family, options = LYCORIS[algorithm]
    plain = LAYERS[layer]()
    base = effective(plain.forward, plain)
    module = kind("module", plain, **{"lora_dim": 3, "alpha": 2.0} | options)
    fill(module, 0.05 if family == "oft" else 0.3)
    module.apply_to()
    assert_same(module.state_dict(), family, base, effective(plain.forward, plain))


@pytest.mark.parametrize("layer", LAYERS)
def test_lycoris_full(layer):
    torch.manual_seed(0)
    plain = LAYERS[layer]()
    base = effective(plain.forward, plain)
    module = FullModule("module", plain)
    fill(module, 0.3)
    module.apply_to()
    wrapped = (module.weight.detach(), module.bias.detach())  # it takes the layer's own away
    assert_same(module.custom_state_dict(), "full", base, wrapped)


def test_lycoris_norm():
    torch.manual_seed(0)
    plain = nn.LayerNorm(N)
    module = NormModule("module", plain)
    fill(module, 0.3)
    weight, bias = module.make_weight()
    assert_same(module.state_dict(), "norm", (plain.weight.detach(), plain.bias.detach()), (weight, bias))


class Net(nn.Module):
    """A linear layer and convolutions by name, as PEFT wants its targets."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: make() for name, make in LAYERS.items()})


# our name of a part ← PEFT's
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
LAYER_NAMES = list(LAYERS)
PEFT = {
    "lora": ("lora", LoraConfig(r=3, lora_alpha=6, target_modules=LAYER_NAMES), 6.0),
    "rslora": ("lora", LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=LAYER_NAMES), 2 * 4 / 4**0.5),
    "dora": ("dora", LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=LAYER_NAMES), 6.0),
    "loha": ("loha", LoHaConfig(r=3, alpha=6, target_modules=LAYER_NAMES), 6.0),
    "loha-tucker": ("loha", LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, target_modules=LAYER_NAMES), 6.0),
    # this version of PEFT takes no notice of a LoKr's alpha
    "lokr": ("lokr", LoKrConfig(r=2, alpha=6, target_modules=LAYER_NAMES), None),
    "lokr-both": ("lokr", LoKrConfig(r=2, alpha=6, decompose_both=True, target_modules=LAYER_NAMES), None),
    "lokr-tucker": ("lokr", LoKrConfig(r=2, alpha=6, use_effective_conv2d=True, target_modules=LAYER_NAMES), None),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("method", PEFT)
def test_peft(method, layer):
    torch.manual_seed(0)
    family, config, alpha = PEFT[method]
    net = Net()
    plain = net.layers[layer]
    base = effective(plain.forward, plain)
    model = get_peft_model(net, config)
    fill(nn.ParameterList(p for p in model.parameters() if p.requires_grad), 0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    parts = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        head, _, part = key.partition(f"layers.{layer}.")
        if part and head.endswith("model."):
            parts[PARTS.get(part, part)] = tensor
    assert_same(parts, family, base, effective(net.layers[layer].eval().forward, plain), alpha)


@pytest.mark.parametrize("on_input", [False, True])
def test_peft_ia3(on_input):
    """PEFT keeps the factor itself, LyCORIS what it differs from 1."""
    torch.manual_seed(0)
    net = Net()
    plain = net.layers["linear"]
    base = effective(plain.forward, plain)
    targets = ["linear"]
    model = get_peft_model(net, IA3Config(target_modules=targets, feedforward_modules=targets if on_input else []))
    fill(model, 0.3)
    with torch.no_grad():
        plain.weight.copy_(base[0])
        plain.bias.zero_()
    (factor,) = (tensor for key, tensor in get_peft_model_state_dict(model).items() if "ia3_l" in key)
    parts = {"weight": factor.flatten() - 1, "on_input": torch.tensor(int(on_input))}
    weight, _ = effective(net.layers["linear"].eval().forward, plain)
    assert_same(parts, "ia3", base, (weight, base[1]))
