"""cloneofsimo/lora: modules go by number, in the order in which a traversal of the model meets them.

A `.safetensors` has `unet:0:up`, `unet:0:down`, … and names the classes whose layers are counted in its metadata; a
`.pt` is a list up, down, up, down, … with the usual classes. Tensors marked "<embed>" are embeddings of tokens.

The order is that of nn.Module.modules() in diffusers: down_blocks, up_blocks, mid_block (registered last); in a block
attentions before resnets. Inside a transformer block it changed: attn1, ff, attn2 up to diffusers 0.11, later attn1,
attn2, ff; only shapes tell which.
Source: cloneofsimo/lora lora_diffusion/lora.py (_find_modules_v2, save_safeloras_with_embeds, save_lora_weight).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from ...files.source import TensorFile

_EMBED = "<embed>"
_USUAL = {
    "unet": frozenset(("CrossAttention", "Attention", "GEGLU")),
    "text_encoder": frozenset(("CLIPAttention",)),
}
_INDEXED = re.compile(r"(\w+):\d+:(?:up|down)")

# ends of the paths of layers, in the order in which their parent has them
_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "time_emb_proj", "conv2", "conv_shortcut",
    "k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2",
)  # fmt: skip
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")
_SLOTS = ("attentions", "resnets", "downsamplers", "upsamplers")
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))

_ANCESTOR = (  # what the path of a layer begins with if an ancestor is of these classes
    (re.compile(r".*\.attn[12](?=\.)"), frozenset(("CrossAttention", "Attention"))),
    (re.compile(r".*\.ff\.net\.0(?=\.)"), frozenset(("GEGLU",))),
    (re.compile(r".*\.ff(?=\.)"), frozenset(("FeedForward",))),
    (re.compile(r".*\.transformer_blocks\.\d+(?=\.)"), frozenset(("BasicTransformerBlock",))),
    (re.compile(r".*resnets\.\d+(?=\.)"), frozenset(("ResnetBlock2D",))),
    (re.compile(r".*\.self_attn(?=\.)"), frozenset(("CLIPAttention", "CLIPSdpaAttention"))),
    (re.compile(r".*\.mlp(?=\.)"), frozenset(("CLIPMLP",))),
    (re.compile(r".*\.layers\.\d+(?=\.)"), frozenset(("CLIPEncoderLayer",))),
)


def is_embedding(file: TensorFile, key: str) -> bool:
    return file.metadata.get(key) == _EMBED


def spell(file: TensorFile) -> dict[str, str]:
    """For a flat list of tensors, the names that its tensors have in a .safetensors of this dialect."""
    count = len(file.tensors)
    if not count or count % 2 or set(file.tensors) != {str(i) for i in range(count)}:
        return {}
    component = "text_encoder" if "text_encoder" in file.path.name or _is_square(file) else "unet"
    return {str(i): f"{component}:{i // 2}:{'down' if i % 2 else 'up'}" for i in range(count)}


def _is_square(file: TensorFile) -> bool:
    """Whether all layers are as wide as they are high, and equal: CLIP's attention."""
    sizes = {max(info.shape, default=0) for info in file.tensors.values()}
    return len(sizes) == 1


def classes(file: TensorFile) -> dict[str, frozenset[str]]:
    """The classes whose layers are counted, by component; empty if the file is not of this dialect."""
    spelled = spell(file)
    found = {match[1] for key in (spelled.values() or file.tensors) if (match := _INDEXED.fullmatch(key))}
    out = {}
    for component in found:
        try:
            listed = json.loads(file.metadata.get(component, ""))
        except (ValueError, RecursionError):
            listed = None
        named = frozenset(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else None
        out[component] = named or _USUAL.get(component, _USUAL["unet"])
    return out


def orders(paths: Iterable[str], counted: frozenset[str]) -> list[list[str]]:
    """The counted layers of a model in the possible orders. paths: of all its layers, in diffusers' names."""
    kept = [path for path in paths if any(p.match(path) and names & counted for p, names in _ANCESTOR)]
    by_version = [sorted(kept, key=lambda path: _position(path, order)) for order in _ORDERS]
    return by_version[:1] if by_version[0] == by_version[1] else by_version


def _position(path: str, order: tuple[str, ...]) -> list[int]:
    """Where a traversal meets a layer: one number for each step into the tree."""
    out = []
    last = next((i for i, end in enumerate(_LAYERS) if path.endswith(f".{end}")), 0)
    for step in path.removesuffix(f".{_LAYERS[last]}").split("."):
        for table in (_BLOCKS, _SLOTS, order, ("self_attn", "mlp")):
            if step in table:
                out.append(table.index(step))
        if step.isdigit():
            out.append(int(step))
    return [*out, last]
