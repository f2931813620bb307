"""The text encoders that may accompany Flux and Stable Diffusion 3: CLIP-L, CLIP-G and T5-XXL, told by a rule.

Source: config.json of openai/clip-vit-large-patch14, laion/CLIP-ViT-bigG-14 and google/t5-v1_1-xxl; huggingface/
transformers models/clip/modeling_clip.py and models/t5/modeling_t5.py.
"""

from __future__ import annotations

Table = dict[str, tuple[int, ...]]

_CLIPS = {"clip_l": (12, 768), "clip_g": (32, 1280)}  # layers, width
_T5_LAYERS, _T5_WIDTH, _T5_HIDDEN = 24, 4096, 10240


def shapes(names: tuple[str, ...]) -> Table:
    """Every key of these encoders (clip_l, clip_g, t5xxl) with its shape, as in a file that holds them all."""
    out: Table = {}
    for name in names:
        table = _t5() if name == "t5xxl" else _clip(*_CLIPS[name])
        out |= {f"text_encoders.{name}.transformer.{key}": shape for key, shape in table.items()}
    return out


def _clip(layers: int, width: int) -> Table:
    table: Table = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        at = f"text_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= _layer(f"{at}self_attn.{name}", (width, width))
        table |= _layer(f"{at}mlp.fc1", (4 * width, width)) | _layer(f"{at}mlp.fc2", (width, 4 * width))
        table |= _layer(f"{at}layer_norm1", (width,)) | _layer(f"{at}layer_norm2", (width,))
    return table | _layer("text_model.final_layer_norm", (width,))


def _t5() -> Table:
    square, norm = (_T5_WIDTH, _T5_WIDTH), (_T5_WIDTH,)
    table: Table = {
        "shared.weight": (32128, _T5_WIDTH),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    }
    for i in range(_T5_LAYERS):
        at = f"encoder.block.{i}.layer."
        table |= {f"{at}0.SelfAttention.{name}.weight": square for name in "qkvo"}
        table |= {f"{at}1.DenseReluDense.{name}.weight": (_T5_HIDDEN, _T5_WIDTH) for name in ("wi_0", "wi_1")}
        table[f"{at}1.DenseReluDense.wo.weight"] = (_T5_WIDTH, _T5_HIDDEN)
        table |= {f"{at}{layer}.layer_norm.weight": norm for layer in (0, 1)}
    table["encoder.final_layer_norm.weight"] = norm
    return table


def _layer(path: str, weight: tuple[int, ...]) -> Table:
    return {f"{path}.weight": weight, f"{path}.bias": weight[:1]}
