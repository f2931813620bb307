"""Names of layers in every dialect: against diffusers' own conversion of checkpoints, and against real models."""

from __future__ import annotations

import pytest
import torch
from dialect_files import distinct
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from models import base_weights
from test_independent_readers import FAMILIES, models_of

from lib_hypermerge.adapters.swapped import swap
from lib_hypermerge.files.source import TensorInfo
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.dialects import cloneofsimo, diffusers, parts
from lib_hypermerge.layouts.dialects.parts import split, undress
from lib_hypermerge.layouts.module import EMBEDDING, LINEAR, LORA_KINDS, NORM, Model, Module
from lib_hypermerge.layouts.reference import Outline
from lib_hypermerge.layouts.tables import narrow, shapes


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request) -> tuple[Model, dict, dict[str, torch.Tensor]]:
    """(our view of a checkpoint, its weights, the same weights under diffusers' names, by diffusers)"""
    weights = distinct(base_weights(request.param))
    model = recognise(Outline(request.param, {k: tuple(w.shape) for k, w in weights.items()}))
    theirs = {
        f"{component}.{key}": tensor
        for component, network in models_of(request.param, weights).items()
        for key, tensor in network.state_dict().items()
    }
    return model, weights, theirs


def rows_of(module, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A module's weight; the q, k or v third of a fused one."""
    whole = weights[module.weight.name]
    if module.part is None:
        return whole
    third = len(whole) // 3
    return whole["qkv".index(module.part) * third :][:third]


def test_diffusers_gives_our_names_to_the_same_numbers(converted):
    model, weights, theirs = converted
    seen = set()
    for modules in model.components.values():
        for module in modules.values():
            for name, piece in diffusers.names(model.architecture.id, module):
                if f"{name}.weight" not in theirs:
                    # diffusers leaves out the last layer of SD2's text encoder, on which no image depends
                    assert model.architecture.id == "sd2" and ".layers.23." in name
                    continue
                ours = rows_of(module, weights)[piece.start : piece.stop]
                assert torch.equal(theirs[f"{name}.weight"], ours), name
                seen.add(f"{name}.weight")
    missing = {key for key in theirs if key.endswith("weight")} - seen
    # transposed in transformers
    assert missing <= {"text_encoder_2.text_projection.weight"}


def test_every_layer_that_a_lora_changes_has_a_name(converted):
    model, _, _ = converted
    for modules in model.components.values():
        for module in modules.values():
            if module.kind in (*LORA_KINDS, NORM, EMBEDDING):
                assert len(diffusers.names(model.architecture.id, module)) == 1, module.path


# --- transformers of fused layers ---------------------------------------------------------------------------


def numbered(table: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors whose every row holds one number that no other row of any tensor holds; they take no memory."""
    out, count = {}, 0
    for key, shape in table.items():
        rows = torch.arange(count, count + shape[0], dtype=torch.float64)
        out[key] = rows.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
        count += shape[0]
    return out


SD3 = {
    "pos_embed": (1, 36, 64), "x_embedder.proj.weight": (64, 16, 2, 2), "x_embedder.proj.bias": (64,),
    "context_embedder.weight": (64, 40), "context_embedder.bias": (64,),
    "final_layer.linear.weight": (64, 64), "final_layer.linear.bias": (64,),
    "final_layer.adaLN_modulation.1.weight": (128, 64), "final_layer.adaLN_modulation.1.bias": (128,),
    **{f"{name}_embedder.mlp.{i}.{part}": (64, 64) if part == "weight" else (64,)
       for name in "ty" for i in (0, 2) for part in ("weight", "bias")},
}  # fmt: skip
for _block, _last in ((0, False), (1, True)):
    for _stream in ("x_block", "context_block"):
        _rows = 128 if _last and _stream == "context_block" else 576 if _stream == "x_block" and not _last else 384
        _inner = {"adaLN_modulation.1": (_rows, 64), "attn.qkv": (192, 64), "attn.ln_q": (8,), "attn.ln_k": (8,)}
        if _stream == "x_block" and not _last:
            _inner |= {"attn2.qkv": (192, 64), "attn2.proj": (64, 64), "attn2.ln_q": (8,), "attn2.ln_k": (8,)}
        if not (_last and _stream == "context_block"):
            _inner |= {"attn.proj": (64, 64), "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
        for _path, _shape in _inner.items():
            SD3[f"joint_blocks.{_block}.{_stream}.{_path}.weight"] = _shape
            if len(_shape) > 1:
                SD3[f"joint_blocks.{_block}.{_stream}.{_path}.bias"] = _shape[:1]


def flux_table() -> dict[str, tuple[int, ...]]:
    prefix = "model.diffusion_model."
    table = {
        k.removeprefix(prefix): s for k, s in shapes("flux_dev").items() if "_blocks." not in k or "blocks.0." in k
    }
    return {k: s for k, s in table.items() if not k.startswith(("vae.", "text_encoders."))}


@pytest.mark.parametrize(
    ("architecture", "table", "convert"),
    [
        ("flux", flux_table(), convert_flux_transformer_checkpoint_to_diffusers),
        ("sd3", SD3, convert_sd3_transformer_checkpoint_to_diffusers),
    ],
    ids=["flux", "sd3"],
)
def test_fused_layers_come_apart_as_diffusers_takes_them_apart(architecture, table, convert):
    weights = numbered(table)
    theirs = convert(dict(weights))
    seen = set()
    for key, shape in table.items():
        path = key.removesuffix(".weight")
        if key.endswith("bias"):
            continue
        module = Module("unet", path, LINEAR, "", "", None, TensorInfo(key, "F32", shape, 0))
        for piece in diffusers.pieces(architecture, module):
            ours = weights[key][piece.start : piece.stop]
            name = f"{piece.path}.weight"
            assert torch.equal(theirs[name], swap(ours) if piece.swapped else ours), name
            seen.add(name)
    assert {key for key in theirs if key.endswith("weight")} == seen


# --- spelling ----------------------------------------------------------------------------------------------

UP, DOWN = "lora_up.weight", "lora_down.weight"
SPELLINGS = [
    # key, name, part, dialect
    ("lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight", "unet_down_blocks_0_resnets_0_conv1", UP, "kohya"),
    ("lora_te2_text_model_encoder_layers_3_mlp_fc1.alpha", "te2_text_model_encoder_layers_3_mlp_fc1", "alpha", "kohya"),
    ("oft_unet_mid_block_attentions_0.oft_blocks", "unet_mid_block_attentions_0", "oft_blocks", "kohya"),
    ("lora_unet_single_blocks_0_linear1.lora_mid.weight", "unet_single_blocks_0_linear1", "lora_mid.weight", "kohya"),
    ("lora_transformer_pos_embed_proj.lokr_w1", "unet_pos_embed_proj", "lokr_w1", "kohya"),
    ("lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a", "transformer_blocks_0_attn_to_q", "lokr_w2_a", "lycoris"),
    ("lora_unet_a.a1.weight", "unet_a", "a1.weight", "kohya"),
    ("lora_unet_a.weight", "unet_a", "weight", "kohya"),
    ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet_down_blocks_0_attn1_to_q", DOWN, "diffusers"),
    ("unet.down_blocks.0.attn1.to_q.lora_B.weight", "unet_down_blocks_0_attn1_to_q", UP, "diffusers"),
    ("unet.a.to_q.lora_A.default_0.weight", "unet_a_to_q", DOWN, "diffusers"),
    ("unet.a.to_q.lora_B.bias", "unet_a_to_q", "lora_up.bias", "diffusers"),
    ("unet.a.to_q.lora_magnitude_vector", "unet_a_to_q", "lora_magnitude_vector", "diffusers"),
    ("unet.a.to_q.lora_magnitude_vector.weight", "unet_a_to_q", "lora_magnitude_vector", "diffusers"),
    ("unet.a.to_q.lora_magnitude_vector.default.weight", "unet_a_to_q", "lora_magnitude_vector", "diffusers"),
    ("transformer.single_transformer_blocks.0.proj_out.lora_A.weight", "unet_single_transformer_blocks_0_proj_out",
     DOWN, "diffusers"),
    ("transformer.transformer_blocks.0.attn.to_q.alpha", "unet_transformer_blocks_0_attn_to_q", "alpha", "diffusers"),
    ("text_encoder_2.text_model.a.lora_linear_layer.up.weight", "te2_text_model_a", UP, "diffusers-old"),
    ("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
     "te1_text_model_encoder_layers_0_self_attn_out_proj", DOWN, "diffusers-old"),
    ("unet.a.attn1.processor.to_out_lora.up.weight", "unet_a_attn1_to_out_0", UP, "diffusers-old"),
    ("down_blocks.0.attn1.processor.to_k_lora.down.weight", "down_blocks_0_attn1_to_k", DOWN, "diffusers-old"),
    ("unet.a.attn1.to_v.lora.down.weight", "unet_a_attn1_to_v", DOWN, "diffusers-old"),
    ("base_model.model.down_blocks.0.attn1.to_q.lora_A.weight", "down_blocks_0_attn1_to_q", DOWN, "peft"),
    ("unet.base_model.model.a.to_q.lora_A.weight", "unet_a_to_q", DOWN, "peft"),
    ("base_model.model.a.hada_w1_a", "a", "hada_w1_a", "peft"),
    ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "unet_double_blocks_0_img_attn_qkv", DOWN,
     "comfyui"),
    ("diffusion_model.input_blocks.1.1.proj_in.diff_b", "unet_input_blocks_1_1_proj_in", "diff_b", "comfyui"),
    ("double_blocks.4.processor.qkv_lora2.up.weight", "double_blocks_4_txt_attn_qkv", UP, "xlabs"),
    ("double_blocks.4.processor.proj_lora1.down.weight", "double_blocks_4_img_attn_proj", DOWN, "xlabs"),
    ("unet:13:up", "unet:13", UP, "cloneofsimo"),
    ("text_encoder:0:down", "text_encoder:0", DOWN, "cloneofsimo"),
    ("mid_block.attentions.0.norm.delta", "mid_block_attentions_0_norm", "delta", "svdiff"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "name", "part", "dialect"), SPELLINGS, ids=[row[0] for row in SPELLINGS])
def test_a_name_says_module_part_and_dialect(key, name, part, dialect):
    spelled = split(key)
    assert spelled is not None
    assert (undress(spelled.module), spelled.part, spelled.dialect) == (name, part, dialect)


@pytest.mark.parametrize(
    "key", ["emb_params", "first_stage_model.encoder.conv_in.bias", "<s1>", "unet:x:up", "betas", "model_ema.decay", ""]
)
def test_other_names_say_nothing(key):
    assert split(key) is None


# --- layers that go by number --------------------------------------------------------------------------------


def traversed(network: torch.nn.Module, counted: set[str], kinds: tuple[type, ...]) -> list[str]:
    """The rule of that dialect: under every module of a counted class, every layer of these kinds."""
    return [
        f"{name}.{inner}"
        for name, module in network.named_modules()
        if type(module).__name__ in counted
        for inner, layer in module.named_modules()
        if isinstance(layer, kinds)
    ]


@pytest.mark.parametrize(
    ("component", "counted"),
    [
        ("unet", {"CrossAttention", "Attention", "GEGLU"}),
        ("unet", {"ResnetBlock2D", "Attention", "GEGLU"}),
        ("unet", {"BasicTransformerBlock"}),
        ("text_encoder", {"CLIPAttention", "CLIPSdpaAttention"}),
        ("text_encoder", {"CLIPEncoderLayer"}),
    ],
)
def test_the_order_is_that_of_a_traversal(converted, component, counted):
    model, weights, _ = converted
    network = models_of({"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[model.architecture.id], weights)[component]
    expected = traversed(network, counted, (torch.nn.Linear, torch.nn.Conv2d))
    ours = "unet" if component == "unet" else next(c for c in ("te", "te1") if c in model.components)
    paths = [
        piece.path
        for module in reversed(model.components[ours].values())
        for piece in diffusers.pieces(model.architecture.id, module)
        if module.kind in LORA_KINDS
    ]
    orders = cloneofsimo.orders(paths, frozenset(counted))
    if model.architecture.id == "sd2" and component == "text_encoder":
        assert [path for path in orders[0] if ".layers.23." not in path] == expected
    else:
        assert expected in orders
    assert len(orders) == (2 if component == "unet" else 1)
    if len(orders) == 2:  # the older one differs by the place of the feed-forward layer alone
        assert sorted(orders[0]) == sorted(orders[1])
        first = [path for path in orders[0] if ".transformer_blocks.0." in path][:12]
        kinds = list(dict.fromkeys(path.split(".transformer_blocks.0.")[1].split(".")[0] for path in first))
        assert kinds == ["attn1", "ff", "attn2"]


def test_folders_of_a_pipeline_are_components():
    assert parts.FOLDERS["text_encoder_2"] == "te2"
    assert undress("a.b", "te2") == "te2_a_b"
    assert undress("unet.a.b", "te2") == "unet_a_b"


def test_narrow_models_keep_their_proportions():
    """So that a narrow linear1 of Flux comes apart as a full one does."""
    table = narrow(shapes("flux_dev"))
    key = next(key for key in table if key.endswith("single_blocks.0.linear1.weight"))
    assert table[key][0] == 7 * table[key][1]
