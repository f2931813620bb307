"""diffusers loads our diffusers files and PEFT our PEFT folders: every key, no other, and the change is the LoRA's."""

import logging

import pytest
import torch
from convert_files import convert, deltas, diffusers_names, layers, lora, save, some
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin, StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from models import base_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from pipelines import flux
from safetensors.torch import load_file
from test_independent_readers import TEXT, models_of, plain

FAMILIES = tuple(TEXT)
ODD = {"rank": lambda i: 2 + i % 3, "alpha": lambda i: (1.0, 3.0, 4.0, None)[i % 4]}


def changes(family: str, tensors: dict) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each of diffusers' weights, float64 (n, k), by component and path."""
    by_name, out = deltas(tensors), {}
    for module in layers(family, 96 if family == "flux_dev" else 32):
        for name, start, stop in diffusers_names(family, module) if module.name in by_name else []:
            out[name] = by_name[module.name][start:stop]
    return {k: d for k, d in out.items() if family != "sd21" or "text_model.encoder.layers.23." not in k}


def merge(model: torch.nn.Module) -> int:
    """Add all adapters to the weights; how many layers have one."""
    found = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in found:
        layer.merge()
    return len(found)


def check(component: str, before: dict, after: dict, wanted: dict[str, torch.Tensor]) -> None:
    """after = before + wanted in every weight, float32's rounding aside."""
    own = {k.removeprefix(f"{component}."): d for k, d in wanted.items() if k.startswith(f"{component}.")}
    assert own
    for key, weight in before.items():
        goal = weight + own.pop(key.removesuffix(".weight"), torch.zeros(1)).reshape(
            weight.shape if key.removesuffix(".weight") in own or f"{component}.{key}"[:-7] in wanted else 1
        )
        assert (after[key] - goal).norm() <= 3e-6 * goal.norm() + 1e-9, key
    assert not own


@pytest.fixture
def warnings(caplog):
    """What diffusers tells of keys that it did not expect, or missed."""
    logger = logging.getLogger("diffusers")
    logger.propagate = True
    yield lambda: [
        r.getMessage() for r in caplog.records if "unexpected" in r.getMessage() or "missing" in r.getMessage()
    ]
    logger.propagate = False


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_loads_our_files(tmp_path, warnings, family, low_memory):
    tensors = lora(family, only=some if low_memory else lambda m: True, **ODD)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "diffusers")
    wanted, models = changes(family, tensors), models_of(family, base_weights(family))
    before = {name: plain(model.state_dict()) for name, model in models.items()}
    loader = StableDiffusionXLLoraLoaderMixin if family == "sdxl" else StableDiffusionLoraLoaderMixin
    more = {"unet_config": models["unet"].config} if family == "sdxl" else {}
    state, alphas = loader.lora_state_dict(str(tmp_path), weight_name="b.safetensors", **more)
    assert alphas is None and len(state) == 2 * len(wanted)
    options = {"network_alphas": alphas, "adapter_name": "ours", "low_cpu_mem_usage": low_memory}
    loader.load_lora_into_unet(state, unet=models["unet"], **options)
    for name in TEXT[family]:
        part = {k: v for k, v in state.items() if k.startswith(f"{name}.")}
        loader.load_lora_into_text_encoder(part, text_encoder=models[name], prefix=name, **options)
    assert warnings() == []
    assert sum(merge(model) for model in models.values()) == len(wanted)
    for name, model in models.items():
        check(name, before[name], plain(model.state_dict()), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_our_folders(tmp_path, family):
    tensors = lora(family, only=some, **({} if family == "sdxl" else ODD))  # PEFT takes long over many patterns
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "peft")
    wanted, models = changes(family, tensors), models_of(family, base_weights(family))
    assert {p.name for p in (tmp_path / "b").iterdir()} == set(models)
    loaded = 0
    for name, model in models.items():
        before = plain(model.state_dict())
        wrapped = PeftModel.from_pretrained(model, str(tmp_path / "b" / name))
        again = set_peft_model_state_dict(wrapped, load_peft_weights(str(tmp_path / "b" / name), device="cpu"))
        assert again.unexpected_keys == [] and not [k for k in again.missing_keys if "lora_" in k]
        loaded += merge(wrapped)
        check(name, before, plain(wrapped.get_base_model().state_dict()), wanted)
    assert loaded == len(wanted)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_text_encoders_mlp_alone_is_loaded(tmp_path, to):
    """diffusers 0.31 takes such a file only by its own old names."""
    tensors = lora("sd15", only=lambda m: m.component == "te" and ".mlp." in m.path)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", to)
    wanted, models = changes("sd15", tensors), models_of("sd15", base_weights("sd15"))
    model = models["text_encoder"]
    before = plain(model.state_dict())
    if to == "diffusers":
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="b.safetensors")
        StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(state, alphas, model, adapter_name="ours")
    else:
        model = PeftModel.from_pretrained(model, str(tmp_path / "b" / "text_encoder"))
    assert merge(model) == len(wanted)
    check("text_encoder", before, plain((model if to == "diffusers" else model.get_base_model()).state_dict()), wanted)


def magnitudes(tensors: dict, weights: dict, family: str) -> dict:
    """DoRA over output rows beside every LoRA: a tenth off the norm of W + ΔW."""
    by_name, out = deltas(tensors), {}
    for module in layers(family):
        if module.name in by_name:
            W = weights[diffusers_names(family, module)[0][0]]
            V = W.flatten(1) + by_name[module.name]
            m = V.square().sum(1).sqrt() * (1 + 0.1 * torch.sin(torch.arange(len(V))))
            out[f"{module.name}.dora_scale"] = m.reshape(-1, *[1] * (W.dim() - 1)).float()
    return out


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_dora_over_output_rows_is_loaded(tmp_path, to):
    """Linear layers and convolutions; PEFT's own definition gives the same weights as ours."""
    tensors = lora(
        "sd15", dtype=torch.float32, only=lambda m: m.component == "unet" and m.path.startswith("middle_block")
    )
    unet = models_of("sd15", base_weights("sd15"))["unet"]
    before = plain(unet.state_dict())
    weights = {f"unet.{k.removesuffix('.weight')}": w for k, w in before.items()}
    tensors |= magnitudes(tensors, weights, "sd15")
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", to)
    if to == "diffusers":
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="b.safetensors")
        StableDiffusionLoraLoaderMixin.load_lora_into_unet(state, alphas, unet, adapter_name="ours")
    else:
        unet = PeftModel.from_pretrained(unet, str(tmp_path / "b" / "unet"))
    assert merge(unet) == len(deltas(tensors))
    after = plain((unet if to == "diffusers" else unet.get_base_model()).state_dict())
    by_name = deltas(tensors)
    for module in layers("sd15"):
        if module.name in by_name:
            name = diffusers_names("sd15", module)[0][0]
            V = weights[name].flatten(1) + by_name[module.name]
            m = tensors[f"{module.name}.dora_scale"].double().flatten()[:, None]
            goal = m * V / V.square().sum(1, keepdim=True).sqrt()
            made = after[name.removeprefix("unet.") + ".weight"].flatten(1)
            assert (made - goal).norm() <= 1e-5 * goal.norm(), name


def of_blocks(module) -> bool:
    return module.path.startswith(("double_blocks.0.", "double_blocks.1.", "single_blocks.0.", "single_blocks.2."))


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_flux_is_loaded_with_q_k_and_v_apart(tmp_path, warnings, to):
    tensors = lora("flux_dev", divisor=96, only=of_blocks, **ODD)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", to)
    wanted, model = changes("flux_dev", tensors), flux()
    assert any(".attn.to_q" in name for name in wanted) and any("proj_mlp" in name for name in wanted)
    before = plain(model.state_dict())
    if to == "diffusers":
        state, alphas = FluxLoraLoaderMixin.lora_state_dict(
            str(tmp_path), weight_name="b.safetensors", return_alphas=True
        )
        FluxLoraLoaderMixin.load_lora_into_transformer(state, alphas, model, adapter_name="ours")
        assert warnings() == []
    else:
        model = PeftModel.from_pretrained(model, str(tmp_path / "b" / "transformer"))
    assert merge(model) == len(wanted)
    after = model if isinstance(model, FluxTransformer2DModel) else model.get_base_model()
    check("transformer", before, plain(after.state_dict()), wanted)


def test_diffusers_files_have_one_number_format_and_rank_per_component(tmp_path):
    """PEFT multiplies factors of one format only, and diffusers takes the first rank for every alpha."""
    convert(save(tmp_path / "a.safetensors", lora("sd15", **ODD)), tmp_path / "b", "--to", "diffusers")
    stored = load_file(tmp_path / "b.safetensors")
    assert len({t.dtype for t in stored.values()}) == 1
    for component in ("unet", "text_encoder"):
        assert {len(t) for k, t in stored.items() if k.startswith(component) and "lora_A" in k} == {4}
