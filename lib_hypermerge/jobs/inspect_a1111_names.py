"""How AUTOMATIC1111 1.10 finds the layer for a module's name in an adapter file (extensions-builtin/Lora/networks.py).

Its layers are called by their path with underscores, from the text encoder or from the UNet's parent on; names in the
manner of diffusers are turned into these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# what a layer is; the host never calls the norms of open_clip in a way that a change of them would be seen
LINEAR, CONV, NORM, EMBEDDING, ATTENTION, DEAF, CONTAINER = (
    "linear layer", "convolution", "norm", "table of embeddings", "fused attention", "norm of open_clip",
    "group of layers",
)  # fmt: skip


def layers_of(checkpoint: Shapes) -> dict[str, str]:
    """The host's name of everything in a checkpoint that could bear a LoRA → what it is."""
    out: dict[str, str] = {}
    for key, shape in checkpoint.items():
        local = re.sub(r"^(model\.(?=diffusion_model\.)|cond_stage_model\.|conditioner\.embedders\.)", "", key)
        path, _, last = local.rpartition(".")
        if local == key or not path:
            continue
        above = path.split(".")
        for end in range(1, len(above)):
            out.setdefault("_".join(above[:end]), CONTAINER)
        name = "_".join(above)
        if last == "in_proj_weight":
            out[name] = ATTENTION
        elif last == "weight":
            out[name] = _kind(name, above[-1], shape)
        else:
            out.setdefault(name, CONTAINER)
    return out


def _kind(name: str, last: str, shape: Shape) -> str:
    if len(shape) == 4:
        return CONV
    if len(shape) == 2:
        # the host wraps token embeddings in a layer of its own that has no weight
        return CONTAINER if last == "token_embedding" else EMBEDDING if last.endswith("_embedding") else LINEAR
    return DEAF if "_resblocks_" in name or last == "ln_final" else NORM


class Finder:
    """The way from a module's name in a file to the host's layer."""

    def __init__(self, layers: dict[str, str], architecture: str):
        self.layers = layers
        self.is_sd2 = "model_transformer_resblocks" in layers
        self.sd3 = dict(_sd3_names(layers)) if architecture == "sd3" else None

    def find(self, name: str) -> str | None:
        """The key under which the host files the module; None if it has no such layer."""
        for key in self._attempts(name):
            if key in self.layers or self._whole(key) is not None:
                return key
        return None

    def _attempts(self, name: str) -> Iterator[str]:
        """Only the first may be the q, k or v of a fused layer."""
        yield self.sd3.get(name, name) if self.sd3 is not None else _compvis(name, self.is_sd2)
        if "lora_unet" in name:
            others = [name.replace("lora_unet", "diffusion_model")]
        elif "lora_te1_text_model" in name:
            others = [name.replace("lora_te1", start) for start in ("0_transformer", "transformer")]
        elif "oft_unet" in name:
            others = [name.replace("oft_unet", "diffusion_model")]
        else:
            others = []
        yield from (other for other in others if other in self.layers)

    def _whole(self, key: str) -> str | None:
        """The fused layer that a key ending in q_proj, k_proj or v_proj belongs to."""
        match = re.fullmatch(r"(.*)_[qkv]_proj", key)
        return match[1] if match and match[1] in self.layers else None

    def layer(self, key: str) -> str:
        """What the layer filed under a key is."""
        own = self.layers.get(key)
        return own if own is not None else self.layers[self._whole(key) or ""]

    def all_or_none(self, key: str, groups: Mapping[str, object]) -> str:
        """Why a part of a fused layer is left out: some of its fellows are missing; "" if none is."""
        match = re.fullmatch(r"(.*)_(q|k|v|out)_proj", key)
        if match is None:
            return ""
        fused = self.layers.get(match[1])
        if fused == ATTENTION:
            fellows = ("q", "k", "v", "out")
        elif fused is not None and key not in self.layers:
            fellows = ("q", "k", "v")
        else:
            return ""
        missing = [f for f in fellows if f"{match[1]}_{f}_proj" not in groups]
        return f"{' and '.join(missing)} of the fused attention missing" if missing else ""

    def is_wide_input(self, key: str, parts: dict[str, str], tensors: Shapes) -> bool:
        """Whether this is all nine channels of an in-painting model's first layer."""
        if key != "diffusion_model_input_blocks_0_0":
            return False
        return any(len(tensors[tensor]) == 4 and tensors[tensor][1] == 9 for tensor in parts.values())


def _sd3_names(layers: dict[str, str]) -> Iterator[tuple[str, str]]:
    """diffusers' names that the host knows in SD3; those of the text stream's q, k and v it misspells."""
    for name in layers:
        if match := re.fullmatch(r"diffusion_model_joint_blocks_(\d+)_x_block_attn_(qkv|proj)", name):
            theirs = f"transformer.transformer_blocks.{match[1]}.attn."
            if match[2] == "qkv":
                yield from ((f"{theirs}to_{part}", f"{name}_{part}_proj") for part in "qkv")
            else:
                yield theirs + "to_out.0", name
        elif match := re.fullmatch(r"diffusion_model_joint_blocks_(\d+)_context_block_attn_proj", name):
            yield f"transformer.transformer_blocks.{match[1]}.attn.add_out_proj.0", name


_RESNET = {
    "conv1": "in_layers_2", "conv2": "out_layers_3", "norm1": "in_layers_0", "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip
_MLP = {"mlp_fc1": "mlp_c_fc", "mlp_fc2": "mlp_c_proj"}


def _open_clip(part: str) -> str:
    for theirs, ours in _MLP.items():
        if theirs in part:
            return part.replace(theirs, ours)
    return part.replace("self_attn", "attn")


def _blocks(side: str, first: int) -> Callable[[re.Match], str]:
    def convert(match: re.Match) -> str:
        block, kind, layer, part = int(match[1]), match[2], int(match[3]), match[4]
        if kind == "resnets":
            part = _RESNET.get(part, part)
        return f"diffusion_model_{side}_blocks_{first + 3 * block + layer}_{int(kind == 'attentions')}_{part}"

    return convert


def _middle(match: re.Match) -> str:
    if match[1] == "attentions":
        return f"diffusion_model_middle_block_1_{match[3]}"
    return f"diffusion_model_middle_block_{2 * int(match[2])}_{_RESNET.get(match[3], match[3])}"


# diffusers' names of UNet blocks as the host turns them into its own; the first that matches counts
_UNET: tuple[tuple[str, Callable[[re.Match], str]], ...] = (
    (r"lora_unet_conv_in(.*)", lambda m: f"diffusion_model_input_blocks_0_0{m[1]}"),
    (r"lora_unet_conv_out(.*)", lambda m: f"diffusion_model_out_2{m[1]}"),
    (r"lora_unet_time_embedding_linear_(\d+)(.*)", lambda m: f"diffusion_model_time_embed_{2 * int(m[1]) - 2}{m[2]}"),
    (r"lora_unet_down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", _blocks("input", 1)),
    (r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", _middle),
    (r"lora_unet_up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", _blocks("output", 0)),
    (
        r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv",
        lambda m: f"diffusion_model_input_blocks_{3 + 3 * int(m[1])}_0_op",
    ),
    (
        r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv",
        lambda m: f"diffusion_model_output_blocks_{2 + 3 * int(m[1])}_{2 if int(m[1]) else 1}_conv",
    ),
)
_RULES = tuple((re.compile(pattern), convert) for pattern, convert in _UNET)
_TEXT = re.compile(r"lora_(te|te2)_text_model_encoder_layers_(\d+)_(.+)")


def _compvis(name: str, is_sd2: bool) -> str:
    """The host's own name for one of diffusers' block names; any other name is returned as it is."""
    for pattern, convert in _RULES:
        if match := pattern.match(name):
            return convert(match)
    if match := _TEXT.match(name):
        encoder, layer, part = match.groups()
        if encoder == "te" and not is_sd2:
            return f"transformer_text_model_encoder_layers_{layer}_{part}"
        return f"{'1_' if encoder == 'te2' else ''}model_transformer_resblocks_{layer}_{_open_clip(part)}"
    return name
