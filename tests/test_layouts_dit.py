"""Transformers instead of UNets: Flux.1 and Stable Diffusion 3 in all spellings, and LoRAs extracted from pairs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from models import (
    base_weights,
    cast,
    extract,
    extract_arguments,
    last_json,
    lora_deltas,
    rank_change,
    relative_error,
    run_cli,
    save_checkpoint,
    save_pair,
    true_deltas,
    tuned_weights,
)
from safetensors import safe_open
from test_layouts import model_of, modules_of

from lib_hypermerge.errors import LayoutError
from lib_hypermerge.layouts.detect import ARCHITECTURES
from lib_hypermerge.layouts.module import LAYER_GROUPS, LORA_KINDS
from lib_hypermerge.layouts.tables import NAMES, mmdit, shapes

UNET = "model.diffusion_model."
CLIP_L, CLIP_G = "text_encoders.clip_l.transformer.text_model.", "text_encoders.clip_g.transformer.text_model."
T5 = "text_encoders.t5xxl.transformer."


def clip(prefix: str, width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a Hugging Face CLIP text model."""
    table = {"embeddings.token_embedding.weight": (49408, width), "embeddings.position_embedding.weight": (77, width)}
    for i in range(layers):
        at = f"encoder.layers.{i}."
        linears = {f"self_attn.{x}_proj": (width, width) for x in "qkv"} | {"self_attn.out_proj": (width, width)}
        linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
        for path, shape in linears.items():
            table |= {f"{at}{path}.weight": shape, f"{at}{path}.bias": shape[:1]}
        for norm in ("layer_norm1", "layer_norm2"):
            table |= {f"{at}{norm}.weight": (width,), f"{at}{norm}.bias": (width,)}
    table |= {"final_layer_norm.weight": (width,), "final_layer_norm.bias": (width,)}
    return {prefix + key: shape for key, shape in table.items()}


def t5(layers: int = 24, width: int = 4096) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a T5 encoder."""
    table = {"shared.weight": (32128, width), "encoder.final_layer_norm.weight": (width,)}
    table["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 64)
    for i in range(layers):
        at = f"encoder.block.{i}.layer."
        table |= {f"{at}0.SelfAttention.{x}.weight": (width, width) for x in "qkvo"}
        table |= {f"{at}1.DenseReluDense.wi_{n}.weight": (10240, width) for n in (0, 1)}
        table |= {f"{at}1.DenseReluDense.wo.weight": (width, 10240)}
        table |= {f"{at}{n}.layer_norm.weight": (width,) for n in (0, 1)}
    return {T5 + key: shape for key, shape in table.items()}


def reached(model) -> Counter:
    return Counter(m.component for m in modules_of(model) if m.name and m.kind in LORA_KINDS)


# --- Flux ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    return shapes("flux_dev")


FLUX_NAMES = {  # as sd-scripts writes them: name → key, block, group
    "lora_unet_double_blocks_0_img_attn_qkv": ("double_blocks.0.img_attn.qkv", "D00", "attention"),
    "lora_unet_double_blocks_18_txt_mlp_2": ("double_blocks.18.txt_mlp.2", "D18", "feedforward"),
    "lora_unet_double_blocks_3_img_mod_lin": ("double_blocks.3.img_mod.lin", "D03", "embedding"),
    "lora_unet_single_blocks_0_linear1": ("single_blocks.0.linear1", "S00", "attention"),
    "lora_unet_single_blocks_37_linear2": ("single_blocks.37.linear2", "S37", "attention"),
    "lora_unet_single_blocks_5_modulation_lin": ("single_blocks.5.modulation.lin", "S05", "embedding"),
    "lora_unet_img_in": ("img_in", "IN", "inout"),
    "lora_unet_txt_in": ("txt_in", "IN", "inout"),
    "lora_unet_time_in_in_layer": ("time_in.in_layer", "IN", "embedding"),
    "lora_unet_vector_in_out_layer": ("vector_in.out_layer", "IN", "embedding"),
    "lora_unet_guidance_in_in_layer": ("guidance_in.in_layer", "IN", "embedding"),
    "lora_unet_final_layer_linear": ("final_layer.linear", "OUT", "inout"),
    "lora_unet_final_layer_adaLN_modulation_1": ("final_layer.adaLN_modulation.1", "OUT", "embedding"),
}


def test_flux_names_blocks_and_groups(flux):
    found = {m.name: m for m in modules_of(model_of(flux)) if m.name}
    for name, (path, block, group) in FLUX_NAMES.items():
        m = found[name]
        assert (m.weight.name, m.block, m.group) == (f"{UNET}{path}.weight", block, group)
    blocks = {m.block for m in found.values()}
    assert {f"D{i:02d}" for i in range(19)} | {f"S{i:02d}" for i in range(38)} < blocks


def test_flux_all_in_one(flux):
    encoders = clip(CLIP_L, 768, 12) | t5()
    rest = {"text_encoders.clip_l.logit_scale": (), "text_encoders.clip_l.transformer.text_projection.weight": (8, 8)}
    model = model_of(flux | encoders | rest | {"vae.encoder.conv_in.weight": (128, 3, 3, 3)})
    assert model.title == "Flux.1" and reached(model) == {"unet": 314, "te1": 72, "te3": 24 * 7}
    assert set(model.vae) == {"encoder.conv_in.weight"} and model.ignored == {"other tensors": 2}
    names = {m.name: m for m in modules_of(model) if m.name}
    q = names["lora_te3_encoder_block_3_layer_0_SelfAttention_q"]
    assert (q.weight.name, q.block, q.group) == (
        f"{T5}encoder.block.3.layer.0.SelfAttention.q.weight",
        "L03",
        "attention",
    )
    assert names["lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_1"].group == "feedforward"
    assert "lora_te1_text_model_encoder_layers_11_mlp_fc2" in names
    assert "lora_te1_text_model_final_layer_norm" in names
    assert not any(m.name for m in modules_of(model) if "shared" in m.path or "relative_attention" in m.path)
    alone = model_of(encoders)
    assert alone.architecture is model.architecture and set(alone.components) == {"te1", "te3"}


def test_flux_variants(flux):
    schnell = {key: shape for key, shape in flux.items() if "guidance_in" not in key}
    assert model_of(schnell).title == "Flux.1 schnell"
    assert model_of(schnell).base.architecture == "flux-1-schnell" and model_of(flux).base.architecture == "flux-1-dev"
    for channels, title in ((384, "Flux.1 Fill"), (128, "Flux.1 Canny or Depth")):
        tool = model_of(flux | {UNET + "img_in.weight": (3072, channels)})
        assert tool.title == title and not tool.is_kind_of(model_of(flux))
    assert model_of(schnell).is_kind_of(model_of(flux)) and not model_of(flux).is_kind_of(model_of(shapes("sd15")))


@pytest.mark.parametrize("mark", ["img_in.", "vector_in.", "double_blocks.0.img_mod.", "single_blocks.0.linear1."])
def test_relatives_of_flux_are_refused(flux, mark):
    """Chroma has no vector_in and no modulations, Flux.2 no modulation per block, Hunyuan another img_in."""
    with pytest.raises(LayoutError, match="relative of Flux") as caught:
        model_of({key: shape for key, shape in flux.items() if not key.startswith(UNET + mark)} | t5())
    assert "Flux.1" in caught.value.what


def test_the_norms_of_flux_by_either_name(flux):
    """ComfyUI saves `query_norm.weight` where Black Forest Labs' files have `query_norm.scale`."""
    renamed = {key.replace("_norm.scale", "_norm.weight"): shape for key, shape in flux.items()}
    assert reached(model_of(renamed)) == reached(model_of(flux))


# --- Stable Diffusion 3 ---------------------------------------------------------------------------------------

SD3_NAMES = {  # as sd-scripts writes them
    "lora_unet_joint_blocks_0_context_block_attn_qkv": ("joint_blocks.0.context_block.attn.qkv", "J00", "attention"),
    "lora_unet_joint_blocks_23_x_block_mlp_fc2": ("joint_blocks.23.x_block.mlp.fc2", "J23", "feedforward"),
    "lora_unet_joint_blocks_12_x_block_attn2_proj": ("joint_blocks.12.x_block.attn2.proj", "J12", "attention"),
    "lora_unet_joint_blocks_7_x_block_adaLN_modulation_1":
        ("joint_blocks.7.x_block.adaLN_modulation.1", "J07", "embedding"),
    "lora_unet_x_embedder_proj": ("x_embedder.proj", "IN", "inout"),
    "lora_unet_context_embedder": ("context_embedder", "IN", "inout"),
    "lora_unet_t_embedder_mlp_0": ("t_embedder.mlp.0", "IN", "embedding"),
    "lora_unet_y_embedder_mlp_2": ("y_embedder.mlp.2", "IN", "embedding"),
    "lora_unet_final_layer_linear": ("final_layer.linear", "OUT", "inout"),
    "lora_unet_final_layer_adaLN_modulation_1": ("final_layer.adaLN_modulation.1", "OUT", "embedding"),
}  # fmt: skip


def test_sd3_names_blocks_and_groups():
    found = {m.name: m for m in modules_of(model_of(shapes("sd35_medium"))) if m.name}
    for name, (path, block, group) in SD3_NAMES.items():
        m = found[name]
        assert (m.weight.name, m.block, m.group) == (f"{UNET}{path}.weight", block, group)


def test_sd3_all_in_one():
    encoders = clip(CLIP_L, 768, 12) | clip(CLIP_G, 1280, 32) | t5()
    vae = {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)}
    model = model_of(shapes("sd3_medium") | encoders | vae)
    assert (
        model.title == "Stable Diffusion 3 medium"
        and not model.ignored
        and set(model.vae) == {"encoder.conv_in.weight"}
    )
    assert reached(model) == {"unet": 245, "te1": 72, "te2": 192, "te3": 168}
    names = [m.name for m in modules_of(model) if m.name]
    assert len(set(names)) == len(names)
    assert {f"lora_te{i}_text_model_final_layer_norm" for i in (1, 2)} <= set(names)
    without_t5 = model_of(clip(CLIP_L, 768, 12) | clip(CLIP_G, 1280, 32))
    assert (
        without_t5.title == "Stable Diffusion 3"
        and without_t5.architecture is model.architecture
        and set(without_t5.components) == {"te1", "te2"}
    )


def test_a_t5_in_a_file_of_its_own():
    model = model_of({key.removeprefix(T5): shape for key, shape in t5().items()})
    assert model.title == "Flux.1" and reached(model) == {"te3": 168} and not model.ignored


def test_sd3_variants_are_no_pairs():
    models = [model_of(shapes(name)) for name in ("sd3_medium", "sd35_medium", "sd35_large")]
    assert [m.title for m in models] == [f"Stable Diffusion {v}" for v in ("3 medium", "3.5 medium", "3.5 large")]
    assert [[one.is_kind_of(other) for other in models] for one in models] == torch.eye(3).bool().tolist()


@pytest.mark.parametrize("name", mmdit.MODELS)
def test_the_tables_of_sd3_are_what_diffusers_builds(name):
    """Every key and shape, through diffusers' own converter and its model at full width, without memory.

    But for the grid of positions, which diffusers computes, slowly: it is made small in both.
    """
    depth, side, norms, dual = mmdit.MODELS[name]
    with torch.device("meta"):
        table = {key: torch.empty(shape) for key, shape in shapes(name).items()}
        assert table[UNET + "pos_embed"].shape == (1, side * side, 64 * depth)
        table[UNET + "pos_embed"] = torch.empty(1, 16, 64 * depth)
        converted = convert_sd3_transformer_checkpoint_to_diffusers(table)
        model = SD3Transformer2DModel(
            num_layers=depth, num_attention_heads=depth, caption_projection_dim=64 * depth, pos_embed_max_size=4,
            sample_size=8,
            qk_norm="rms_norm" if norms else None, dual_attention_layers=tuple(range(dual)),
        )  # fmt: skip
    built = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in converted.items()} == built


# --- every architecture ---------------------------------------------------------------------------------------


def test_every_architecture_has_a_table():
    assert {model_of(shapes(name)).architecture.id for name in NAMES} == {a.id for a in ARCHITECTURES}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_a_lora_reaches_has_one_name_one_block_and_a_group(name):
    modules = [m for m in modules_of(model_of(shapes(name))) if m.name]
    assert len({m.name for m in modules}) == len(modules)
    assert all(m.block and m.group in LAYER_GROUPS for m in modules if m.kind in LORA_KINDS)
    assert len({a.id for a in ARCHITECTURES}) == len(ARCHITECTURES)


# --- extract --------------------------------------------------------------------------------------------------

_STABILITY = "https://github.com/Stability-AI/generative-models"
PAIRS = {
    "flux_dev": ("flux1", "flux-1-dev/lora", "https://github.com/black-forest-labs/flux"),
    "sd3_medium": ("medium", "stable-diffusion-3-medium/lora", _STABILITY),
    "sd35_medium": ("5-medium", "stable-diffusion-3-5-medium/lora", _STABILITY),
}


@pytest.fixture(scope="module", params=PAIRS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def weights(family):
    base = base_weights(family, 128)
    return base, tuned_weights(base, rank_change(2))


def test_extract_end_to_end(tmp_path, family, weights):
    base, tuned = save_pair(tmp_path, *weights)
    answer = extract(base, tuned, tmp_path / "lora", "--rank", 2, "--dtype", "fp32")
    stored, expected = lora_deltas(tmp_path / "lora.safetensors"), true_deltas(base, tuned)
    assert stored.keys() == expected.keys() and relative_error(expected, stored) < 1e-5
    assert answer["modules"] == len(expected)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    said = ("ss_base_model_version", "modelspec.architecture", "modelspec.implementation")
    assert tuple(metadata[key] for key in said) == PAIRS[family]


def test_scaled_and_integer_weights_are_refused(tmp_path, family, weights):
    base, _ = weights
    odd = next(key for key in base if base[key].dim() == 2)
    for name, change in {
        "scaled": {odd.replace(".weight", ".scale_weight"): torch.ones(())},
        "marked": {"scaled_fp8": torch.zeros(2)},
        "integer": {odd: torch.ones(base[odd].shape, dtype=torch.int8)},
    }.items():
        path = save_checkpoint(tmp_path / f"{name}.safetensors", base | change)
        result = run_cli(extract_arguments(path, path.with_name("t.safetensors"), tmp_path / "o"))
        answer = last_json(result)
        assert result.returncode == 2 and f"{name}.safetensors is quantised" in answer["error"]["what"]


def test_plain_fp8_is_read(tmp_path, family, weights):
    base, tuned = (cast(side, torch.float8_e4m3fn) for side in weights)
    paths = save_pair(tmp_path, base, tuned, torch.float8_e4m3fn)
    extract(*paths, tmp_path / "lora", "--rank", 24, "--dtype", "fp32", "--layers", "inout")
    key = UNET + "final_layer.linear.weight"
    expected = tuned[key].double() - base[key].double()
    stored = lora_deltas(tmp_path / "lora.safetensors")["lora_unet_final_layer_linear"]
    assert torch.allclose(stored, expected, atol=1e-5 * float(expected.abs().max()))


def test_two_architectures_are_no_pair(tmp_path, family, weights):
    other = save_checkpoint(tmp_path / "sd1.safetensors", base_weights("sd15"))
    mine = save_checkpoint(tmp_path / "mine.safetensors", weights[0])
    result = run_cli(extract_arguments(mine, other, tmp_path / "o"))
    assert result.returncode == 2 and "of different kinds" in last_json(result)["error"]["what"]


def test_a_component_that_an_architecture_lacks(tmp_path, weights):
    paths = save_pair(tmp_path, *weights)
    result = run_cli(extract_arguments(*paths, tmp_path / "o", "--components", "te"))
    assert result.returncode == 2, result.stdout
