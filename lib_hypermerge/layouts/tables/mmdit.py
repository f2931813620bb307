"""The transformers of Stable Diffusion 3 and 3.5, which are regular enough to be told by a rule.

Source: Stability-AI/sd3.5 mmditx.py and sd3_infer.py; pos_embed_max_size and dual_attention_layers as in the models'
transformer/config.json.
"""

from __future__ import annotations

Table = dict[str, tuple[int, ...]]

_PREFIX = "model.diffusion_model."
_HEAD, _TEXT, _POOLED, _CHANNELS, _PATCH = 64, 4096, 2048, 16, 2
# depth, side of the grid of positions, normalised queries and keys, blocks with a second attention
MODELS = {
    "sd3_medium": (24, 192, False, 0),
    "sd35_large": (38, 192, True, 0),
    "sd35_medium": (24, 384, True, 13),
}


def shapes(name: str) -> Table:
    """Every key of the transformer with its shape."""
    depth, side, norms, dual = MODELS[name]
    width = _HEAD * depth
    table: Table = {"pos_embed": (1, side * side, width)}
    table |= _layer("x_embedder.proj", (width, _CHANNELS, _PATCH, _PATCH))
    for root, entering in (("t_embedder", 256), ("y_embedder", _POOLED)):
        table |= _layer(f"{root}.mlp.0", (width, entering)) | _layer(f"{root}.mlp.2", (width, width))
    table |= _layer("context_embedder", (width, _TEXT))
    for i in range(depth):
        at = f"joint_blocks.{i}."
        table |= _block(f"{at}context_block.", width, norms, ends=i == depth - 1)
        table |= _block(f"{at}x_block.", width, norms, dual=i < dual)
    table |= _layer("final_layer.linear", (_PATCH * _PATCH * _CHANNELS, width))
    table |= _layer("final_layer.adaLN_modulation.1", (2 * width, width))
    return {_PREFIX + key: shape for key, shape in table.items()}


def _block(at: str, width: int, norms: bool, ends: bool = False, dual: bool = False) -> Table:
    """One stream of a block. ends: the last text stream, of which only keys and values are used."""
    table: Table = {}
    for attention in ("attn", "attn2") if dual else ("attn",):
        table |= _layer(f"{at}{attention}.qkv", (3 * width, width))
        if norms:
            table |= {f"{at}{attention}.{norm}.weight": (_HEAD,) for norm in ("ln_q", "ln_k")}
        if not ends:
            table |= _layer(f"{at}{attention}.proj", (width, width))
    if not ends:
        table |= _layer(f"{at}mlp.fc1", (4 * width, width)) | _layer(f"{at}mlp.fc2", (width, 4 * width))
    modulations = 2 if ends else 9 if dual else 6
    return table | _layer(f"{at}adaLN_modulation.1", (modulations * width, width))


def _layer(path: str, shape: tuple[int, ...]) -> Table:
    return {f"{path}.weight": shape, f"{path}.bias": shape[:1]}
