"""Narrow pipelines saved by diffusers and transformers themselves, with random weights; and how we read them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from lib_hypermerge.layouts.opening import open_checkpoint

WIDTHS = (32, 64, 96, 96)  # they change where those of real models do
ATTEND, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def unet(kind: str, deepest: int = 3) -> UNet2DConditionModel:
    """As in SD1, SD2 or SDXL: their blocks, layers and kinds of projection; SDXL itself is 10 deep."""
    downs = [PLAIN, ATTEND, ATTEND] if kind == "sdxl" else [ATTEND] * 3 + [PLAIN]
    more: dict = {"use_linear_projection": kind != "sd1"}
    if kind == "sdxl":
        more |= {
            "transformer_layers_per_block": [1, 2, deepest], "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
        }  # fmt: skip
    return UNet2DConditionModel(
        block_out_channels=WIDTHS[: len(downs)], down_block_types=downs,
        up_block_types=[block.replace("Down", "Up") for block in reversed(downs)], layers_per_block=2,
        cross_attention_dim=24, attention_head_dim=8, **more,
    )  # fmt: skip


def vae(with_quant_conv: bool = True) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=WIDTHS, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2, latent_channels=4, use_quant_conv=with_quant_conv, use_post_quant_conv=with_quant_conv,
    )  # fmt: skip


def clip(width: int, projection: int = 0, layers: int = 2) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=77, projection_dim=projection or width,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )


def flux(double: int = 2, single: int = 3) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=double, num_single_layers=single, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def sd3(kind: str = "sd3_medium") -> SD3Transformer2DModel:
    more = {
        "sd3_medium": {}, "sd35_large": {"qk_norm": "rms_norm"},
        "sd35_medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    }[kind]  # fmt: skip
    return SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
        caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=6, **more,
    )  # fmt: skip


PARTS = {
    "sd1": lambda: {"unet": unet("sd1"), "text_encoder": clip(24), "vae": vae()},
    "sd2": lambda: {"unet": unet("sd2"), "text_encoder": clip(24), "vae": vae()},
    "sdxl": lambda: {"unet": unet("sdxl"), "text_encoder": clip(16), "text_encoder_2": clip(32, 40), "vae": vae()},
    "flux": lambda: {"transformer": flux(), "text_encoder": clip(20), "text_encoder_2": t5(), "vae": vae(False)},
    "sd3": lambda: {
        "transformer": sd3(), "text_encoder": clip(16, 16), "text_encoder_2": clip(32, 40), "text_encoder_3": t5(),
        "vae": vae(False),
    },
}  # fmt: skip


def parts(kind: str, seed: int = 0) -> dict[str, torch.nn.Module]:
    """The components of a pipeline; every number random, norms and biases too."""
    torch.manual_seed(seed)
    models = PARTS[kind]()
    with torch.no_grad():
        for model in models.values():
            for weight in model.parameters():
                weight.copy_(torch.randn_like(weight))
    return models


def save(folder: Path, models: dict[str, torch.nn.Module], **options) -> Path:
    """A pipeline's folder; options go to every save_pretrained, e.g. max_shard_size or variant."""
    for name, model in models.items():
        model.save_pretrained(folder / name, **options)
    index = {"_class_name": "SomePipeline", "_diffusers_version": "0.31.0", "scheduler": ["diffusers", "Some"]}
    index |= {name: ["some_library", type(model).__name__] for name, model in models.items()}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def single_view(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its single-file name, as a job reads it."""
    model = open_checkpoint(path)
    with model.file as file:
        return {name: file.read(info) for name, info in file.tensors.items()}
