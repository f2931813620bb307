"""Stable Diffusion XL: one UNet, CLIP-L and CLIP-G."""

from functools import partial

from ..files.metadata import BaseModel
from . import places
from .dialects import kohya
from .module import Architecture, ComponentTable, Lookup
from .sd1 import UNET_PREFIXES, UNET_ROOTS, unet_variant


def _matches(find: Lookup) -> bool:
    """Class embeddings and nine input blocks; the refiner and SD2 unCLIP have twelve."""
    classes, tenth = find("label_emb.0.0.weight"), find("input_blocks.9.0.in_layers.0.weight")
    return classes is not None and tenth is None and find("input_blocks.9.0.op.weight") is None


SDXL = Architecture(
    id="sdxl",
    title="Stable Diffusion XL",
    base=BaseModel("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", 1024),
    components=(
        ComponentTable(
            "unet", "UNet", UNET_PREFIXES, "input_blocks.0.0.weight", kohya.unet_path, places.unet, roots=UNET_ROOTS
        ),
        ComponentTable(
            id="te1",
            title="text encoder 1 (CLIP-L)",
            prefixes=("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."),
            probe="encoder.layers.0.mlp.fc1.weight",
            rename=partial(kohya.clip, "lora_te1"),
            describe=places.text_encoder,
        ),
        ComponentTable(
            id="te2",
            title="text encoder 2 (CLIP-G)",
            prefixes=("conditioner.embedders.1.model.",),
            probe="transformer.resblocks.0.mlp.c_fc.weight",
            rename=partial(kohya.open_clip, "lora_te2"),
            describe=places.text_encoder,
            norms_reachable=False,
        ),
    ),
    matches=_matches,
    variant=unet_variant,
)
