"""Stable Diffusion 2.x: linear projections around attention, an open_clip text encoder."""

from functools import partial

from ..files.metadata import BaseModel
from . import places
from .dialects import kohya
from .module import Architecture, ComponentTable
from .sd1 import UNET, projects_by, unet_variant

SD2 = Architecture(
    id="sd2",
    title="Stable Diffusion 2",
    base=BaseModel("sd_v2", "stable-diffusion-v2-768-v", 768, is_v2=True),
    components=(
        UNET,
        ComponentTable(
            id="te",
            title="text encoder",
            prefixes=("cond_stage_model.model.",),
            probe="transformer.resblocks.0.mlp.c_fc.weight",
            rename=partial(kohya.open_clip, "lora_te"),
            describe=places.text_encoder,
            norms_reachable=False,
        ),
    ),
    matches=partial(projects_by, 2),
    variant=unet_variant,
)
