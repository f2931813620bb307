"""A LoRA of ours, loaded by diffusers, transformers and peft into a model converted by diffusers, gives the fine-tune.

The conversion of the checkpoints' names and the reading of the LoRA are both diffusers' own; ours is the LoRA alone.
"""

import re

import a1111
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from models import base_weights, extract, rank_change, save_pair, tuned_weights
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RANK = 6  # of the change; narrow layers allow less
TIGHT = 3e-6  # of a weight's norm: float32, through two additions

# What diffusers 0.31 does not read under any kohya name: its converter turns every underscore of an unknown
# name into a dot (conv.in), and for SDXL wants a block number as the third word.
UNREAD = {
    "sd15": r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12])",
    "sd21": r"lora_unet_(conv_in|conv_out|time_embedding_linear_[12])"
    # diffusers drops SD2's last text layer, which no image depends on
    r"|lora_te_text_model_encoder_layers_23_.*",
    "sdxl": r"lora_unet_(input_blocks_0_0|out_2|time_embed_[02]|label_emb_0_[02])",
}
FAMILIES = tuple(UNREAD)

SMALL = {"block_out_channels": (10, 20, 40, 40), "norm_num_groups": 5, "layers_per_block": 2, "attention_head_dim": 2}
UNETS = {
    "sd15": {**SMALL, "cross_attention_dim": 24},
    "sd21": {**SMALL, "cross_attention_dim": 32, "use_linear_projection": True},
    "sdxl": {
        **SMALL, "block_out_channels": (10, 20, 40), "cross_attention_dim": 64, "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 88,
    },
}  # fmt: skip
CLIP_L = {"hidden_size": 24, "intermediate_size": 96, "num_hidden_layers": 12}
TEXT = {  # component: (class, configuration)
    "sd15": {"text_encoder": (CLIPTextModel, CLIP_L)},
    "sd21": {"text_encoder": (CLIPTextModel, {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 23})},
    "sdxl": {
        "text_encoder": (CLIPTextModel, CLIP_L),
        "text_encoder_2": (
            CLIPTextModelWithProjection,
            {"hidden_size": 40, "intermediate_size": 160, "num_hidden_layers": 32, "projection_dim": 40},
        ),
    },
}
PREFIX = {"text_encoder": "cond_stage_model.model.", "text_encoder_2": "conditioner.embedders.1.model."}


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(family, base checkpoint, tuned checkpoint, LoRA), float32 throughout."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    base = base_weights(family)
    tuned = tuned_weights(base, rank_change(RANK))
    paths = save_pair(folder, base, tuned)
    report = extract(*paths, folder / "lora", "--rank", RANK, "--dtype", "fp32")
    assert report["relative_error"] < 1e-5  # the files' own float32 rounding, as a share of a change of a tenth
    return family, base, tuned, load_file(folder / "lora.safetensors")


def models_of(family: str, checkpoint: dict) -> dict[str, torch.nn.Module]:
    """UNet and text encoders with a checkpoint's weights, brought over by diffusers."""
    unet = UNet2DConditionModel(**UNETS[family])
    unet.load_state_dict(convert_ldm_unet_checkpoint(dict(checkpoint), unet.config))
    out = {"unet": unet}
    for component, (kind, settings) in TEXT[family].items():
        heads = {"num_attention_heads": 2, "vocab_size": 49408 // 32, "max_position_embeddings": 77}
        model = kind(CLIPTextConfig(**settings, **heads))
        if PREFIX[component] + "positional_embedding" in checkpoint:
            source = {k: v for k, v in checkpoint.items() if k != "cond_stage_model.model.text_projection"}
            # it takes the width of SD2 from the projection of a full-sized model
            model.config.projection_dim = settings["hidden_size"]
            weights = convert_open_clip_checkpoint(model, source, prefix=PREFIX[component])
        else:
            weights = convert_ldm_clip_checkpoint(dict(checkpoint))
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not missing
        assert all(k.endswith(("position_ids", "text_projection.weight", "logit_scale")) for k in unexpected)
        out[component] = model
    return out


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights under the names that they have without peft's wrappers."""
    return {k.replace(".base_layer.", "."): v.double() for k, v in state.items() if ".lora_" not in k}


def fuse(family: str, models: dict[str, torch.nn.Module], lora: dict[str, torch.Tensor]) -> None:
    """Load by diffusers' own steps, and add the LoRA to the weights."""
    xl = family == "sdxl"
    loader = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin
    more = {"unet_config": models["unet"].config} if xl else {}
    state, alphas = loader.lora_state_dict(dict(lora), **more)
    loader.load_lora_into_unet(state, network_alphas=alphas, unet=models["unet"], adapter_name="ours")
    for component in TEXT[family]:
        part = {k: v for k, v in state.items() if k.startswith(f"{component}.")}
        loader.load_lora_into_text_encoder(
            part, network_alphas=alphas, text_encoder=models[component], prefix=component, adapter_name="ours"
        )
    for model in models.values():
        for layer in model.modules():
            if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
                layer.merge()


def split(family: str, lora: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """What diffusers reads, and what it does not."""
    parts: tuple[dict, dict] = ({}, {})
    for key, tensor in lora.items():
        parts[bool(re.fullmatch(UNREAD[family], key.split(".")[0]))][key] = tensor
    return parts


def test_diffusers_makes_the_fine_tune_of_the_base(case):
    family, base, tuned, lora = case
    read, unread = split(family, lora)
    models, goal = models_of(family, base), models_of(family, tuned)
    fuse(family, models, read)
    left = {name.split(".")[0] for name in unread}
    changed = 0
    for component, model in models.items():
        before, after = plain(models_of(family, base)[component].state_dict()), plain(model.state_dict())
        wanted = plain(goal[component].state_dict())
        assert after.keys() == wanted.keys()
        for key, weight in wanted.items():
            off = (after[key] - weight).norm() / weight.norm().clamp_min(1e-9)
            if off > TIGHT:
                assert torch.equal(after[key], before[key]), key  # not read at all, rather than wrongly
                assert is_unread(key), key
            changed += not torch.equal(after[key], before[key])
    assert changed == len([k for k in read if k.endswith(".lora_up.weight")])
    assert left and len(left) == len([k for k in unread if k.endswith(".lora_up.weight")])


def is_unread(key: str) -> bool:
    """Whether a diffusers weight is one of those under UNREAD, or beyond every LoRA."""
    beyond = ("time_embedding.", "add_embedding.", "conv_in.", "conv_out.", "text_projection.")
    return key.startswith(beyond)


def test_diffusers_reads_none_of_what_is_excepted(case):
    """So that the list of exceptions grows no longer than it must be."""
    family, base, _, lora = case
    _, unread = split(family, lora)
    for name in sorted({key.split(".")[0] for key in unread if key.startswith("lora_unet")}):
        models = models_of(family, base)
        one = {k: v for k, v in lora.items() if k.split(".")[0] == name}
        before = plain(models["unet"].state_dict())
        try:
            fuse(family, {"unet": models["unet"], **{c: models[c] for c in TEXT[family]}}, one)
        except (ValueError, KeyError, AttributeError):
            continue
        after = plain(models["unet"].state_dict())
        assert all(torch.equal(after[key], before[key]) for key in before), name


def test_a1111s_rule_makes_the_fine_tune_of_the_base(case):
    """The second reader, which knows every name: tests/a1111.py and alpha / rank · up · down."""
    family, base, tuned, lora = case
    layers = a1111.host_layers([key for key in base if not key.startswith("first_stage_model.")])
    made = {key: weight.double().clone() for key, weight in base.items()}
    for name in {key.split(".")[0] for key in lora}:
        path, part = a1111.resolve(name, layers)
        up, down, alpha = (lora[f"{name}.{end}"].double() for end in ("lora_up.weight", "lora_down.weight", "alpha"))
        delta = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
        weight = made[path + (".in_proj_weight" if part else ".weight")]
        rows = "qkv".index(part) * len(delta) if part else 0
        weight[rows : rows + len(delta)] += delta.reshape(weight[rows : rows + len(delta)].shape)
    for key, weight in tuned.items():
        if key.endswith("text_projection"):  # a parameter that no LoRA reaches
            assert torch.equal(made[key], base[key].double())
        elif weight.is_floating_point():
            assert (made[key] - weight.double()).norm() <= TIGHT * weight.double().norm(), key
