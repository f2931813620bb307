"""Stable Diffusion 1.x, in-painting included."""

from functools import partial

from ..files.metadata import BaseModel
from . import places
from .dialects import kohya
from .module import Architecture, ComponentTable, Lookup

UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "")
UNET_ROOTS = ("input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out")
_VARIANTS = {9: "inpainting", 8: "instruct-pix2pix"}


def unet_variant(find: Lookup) -> str:
    """By the channels of the first convolution."""
    first = find("input_blocks.0.0.weight")
    return _VARIANTS.get(first.shape[1], "") if first is not None and len(first.shape) == 4 else ""


def projects_by(axes: int, find: Lookup) -> bool:
    """Whether attention's projections are linear (2 axes) or 1×1 convolutions (4), in a UNet without classes."""
    projection = find("input_blocks.1.1.proj_in.weight")
    return projection is not None and len(projection.shape) == axes and find("label_emb.0.0.weight") is None


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
    matches=partial(projects_by, 4),
    variant=unet_variant,
)
