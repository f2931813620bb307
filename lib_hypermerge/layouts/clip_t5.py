"""The text encoders that SD3 and Flux share: CLIP-L, CLIP-G and T5, all by Hugging Face names.

Spelling in all-in-one files: ComfyUI comfy/supported_models.py (`text_encoders.clip_l.` …); may be absent.
"""

from functools import partial

from . import places
from .dialects import kohya
from .module import ComponentTable


def _clip(component: str, title: str, name: str) -> ComponentTable:
    return ComponentTable(
        id=component,
        title=title,
        prefixes=(f"text_encoders.{name}.transformer.text_model.",),
        probe="encoder.layers.0.mlp.fc1.weight",
        rename=partial(kohya.clip, f"lora_{component}"),
        describe=places.text_encoder,
    )


CLIP_L = _clip("te1", "text encoder 1 (CLIP-L)", "clip_l")
CLIP_G = _clip("te2", "text encoder 2 (CLIP-G)", "clip_g")
# te3 in Flux too, which has no second one: so sd-scripts names it, and ComfyUI and Forge read it
T5 = ComponentTable(
    id="te3",
    title="T5",
    prefixes=("text_encoders.t5xxl.transformer.", ""),  # the second: a file of its own
    probe="encoder.block.0.layer.0.SelfAttention.q.weight",
    rename=kohya.t5,
    describe=places.text_encoder,
    norms_reachable=False,
    roots=("encoder", "shared"),
)
