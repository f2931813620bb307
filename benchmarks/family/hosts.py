"""What programs need beside the family's checkpoints: configurations for the WebUI and diffusers, the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from .captions import END, START, Tokenizer
from .model import HEADS, TEXT_HEADS, TEXT_WIDTH, VAE_WIDTHS, WIDTHS
from .text_encoder import TOKENS

_WEBUI = """\
model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.00085
    linear_end: 0.0120
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: 8
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    monitor: val/simple_loss_ema
    scale_factor: 0.18215
    use_ema: False
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 8
        in_channels: 4
        out_channels: 4
        model_channels: {channels}
        attention_resolutions: [4, 2, 1]
        num_res_blocks: 2
        channel_mult: {multiples}
        num_heads: {heads}
        use_spatial_transformer: True
        transformer_depth: 1
        context_dim: {context}
        use_checkpoint: False
        legacy: False
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 64
          in_channels: 3
          out_ch: 3
          ch: {vae_channels}
          ch_mult: {vae_multiples}
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: ldm.modules.encoders.modules.FrozenCLIPEmbedder
      params:
        version: {text}
"""


def write_configurations(folder: Path, checkpoints: list[str]) -> None:
    """`NAME.yaml` beside each checkpoint, for the WebUI, and the folder `diffusers`, `config` of `from_single_file`."""
    pipeline = folder.resolve() / "diffusers"
    _write_diffusers(pipeline)
    text = folder.resolve() / "text"  # the WebUI reads tokenizer and configuration from one folder
    Tokenizer().save(text)
    _write(text / "tokenizer_config.json", _tokenizer())
    _write(text / "config.json", _text_encoder())
    for name in checkpoints:
        (folder / f"{name}.yaml").write_text(
            _WEBUI.format(
                channels=WIDTHS[0], multiples=[width // WIDTHS[0] for width in WIDTHS], heads=HEADS, context=TEXT_WIDTH,
                vae_channels=VAE_WIDTHS[0], vae_multiples=[width // VAE_WIDTHS[0] for width in VAE_WIDTHS],
                text=json.dumps(str(text)),
            ),
            encoding="utf-8",
        )  # fmt: skip


def _write_diffusers(folder: Path) -> None:
    Tokenizer().save(folder / "tokenizer")
    _write(folder / "tokenizer" / "tokenizer_config.json", _tokenizer())
    _write(folder / "text_encoder" / "config.json", _text_encoder())
    attends = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    _write(folder / "unet" / "config.json", {
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": WIDTHS, "layers_per_block": 2,
        "cross_attention_dim": TEXT_WIDTH, "attention_head_dim": HEADS, "down_block_types": attends,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(attends)],
    })  # fmt: skip
    _write(folder / "vae" / "config.json", {
        "_class_name": "AutoencoderKL", "block_out_channels": VAE_WIDTHS, "layers_per_block": 2, "latent_channels": 4,
        "sample_size": 64, "scaling_factor": 0.18215, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    })  # fmt: skip
    _write(folder / "scheduler" / "scheduler_config.json", {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    })  # fmt: skip
    _write(folder / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.31.0",
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None], "feature_extractor": [None, None],
        "requires_safety_checker": False,
    })  # fmt: skip


def _tokenizer() -> dict[str, object]:
    return {
        "tokenizer_class": "CLIPTokenizer", "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "do_lower_case": True, "model_max_length": TOKENS, "add_prefix_space": False, "errors": "replace",
    }  # fmt: skip


def _text_encoder() -> dict[str, object]:
    numbers = Tokenizer().numbers
    return {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "vocab_size": len(numbers),
        "hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": 12,
        "num_attention_heads": TEXT_HEADS, "max_position_embeddings": TOKENS, "projection_dim": TEXT_WIDTH,
        "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "bos_token_id": numbers[START],
        "eos_token_id": numbers[END], "pad_token_id": numbers[END],
    }  # fmt: skip


def _write(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
