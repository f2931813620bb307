"""Stable Diffusion 1.x, in-painting included."""

from functools import partial

from ..files.metadata import BaseModel
from . import places
from .dialects import kohya
from .module import Architecture, ComponentTable

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
UNET_ROOTS = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")

UNET = ComponentTable(
    "unet", "UNet", UNET_PREFIXES, "input_blocks.0.0.weight", kohya.unet_diffusers, places.unet, roots=UNET_ROOTS
)

SD1 = Architecture(
    id="sd1",
    title="Stable Diffusion 1",
    base=BaseModel("sd_v1", "stable-diffusion-v1", 512),
    components=(
        UNET,
        ComponentTable(
            id="te",
            title="text encoder",
            # the oldest files lack `text_model.`
            prefixes=("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.", "text_model."),
            probe="encoder.layers.0.mlp.fc1.weight",
            rename=partial(kohya.clip, "lora_te"),
            describe=places.text_encoder,
        ),
    ),
)
