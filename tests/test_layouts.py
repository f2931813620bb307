"""Which tensor is which layer, and its name in a LoRA file: all tables, at any width, in any spelling."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import a1111
import pytest

from lib_hypermerge.errors import LayoutError
from lib_hypermerge.files.source import TensorInfo
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import EMBEDDING, LAYER_GROUPS, LORA_KINDS, NORM, PARAMETER
from lib_hypermerge.layouts.tables import NAMES, narrow, shapes

ON_A1111 = ("sd15", "sd15_inpainting", "sd21", "sdxl")

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# layers that no LoRA changes on A1111, whatever it is called
BEYOND_REACH = ("token_embedding", "position_embedding", "positional_embedding", "text_projection", "logit_scale")


def header(table: dict[str, tuple[int, ...]], dtype: str = "F16", name: str = "model.safetensors"):
    """A file as far as recognition looks at it: names, shapes and formats."""
    infos = {k: TensorInfo(k, "I64" if k.endswith("position_ids") else dtype, s, 0) for k, s in table.items()}
    return SimpleNamespace(path=Path(name), tensors=infos)


def model_of(table, dtype: str = "F16"):
    return recognise(header(table, dtype))


def modules_of(model):
    return [module for component in model.components.values() for module in component.values()]


def described(model) -> dict[str, tuple]:
    """Everything but shapes and formats."""
    return {
        f"{m.component}.{m.path}": (m.kind, m.block, m.group, m.name, m.part, m.fused, m.bias is not None)
        for m in modules_of(model)
    }


@pytest.fixture(scope="module", params=NAMES)
def table_name(request):
    return request.param


@pytest.fixture(scope="module")
def model(table_name):
    return model_of(shapes(table_name))


@pytest.fixture(scope="module", params=ON_A1111)
def sd_model(request):
    return model_of(shapes(request.param))


# --- what is recognised -------------------------------------------------------------------------------------

FACTS = {  # architecture, variant, components, layers that a LoRA changes
    "sd15": ("sd1", "", {"unet": 282, "te": 72}),
    "sd15_inpainting": ("sd1", "inpainting", {"unet": 281, "te": 72}),
    "sd21": ("sd2", "", {"unet": 282, "te": 144}),
    "sdxl": ("sdxl", "", {"unet": 794, "te1": 72, "te2": 192}),
    "flux_dev": ("flux", "", {"unet": 19 * 10 + 38 * 3 + 10}),
    "sd3_medium": ("sd3", "medium", {"unet": 24 * 10 - 3 + 8}),
    "sd35_large": ("sd3", "3.5-large", {"unet": 38 * 10 - 3 + 8}),
    "sd35_medium": ("sd3", "3.5-medium", {"unet": 24 * 10 - 3 + 8 + 13 * 2}),
}


def test_architecture_and_counts(model, table_name):
    architecture, variant, counts = FACTS[table_name]
    assert (model.architecture.id, model.variant) == (architecture, variant)
    reached = Counter(m.component for m in modules_of(model) if m.name and m.kind in LORA_KINDS)
    assert reached == counts


def test_every_tensor_is_accounted_for(model, table_name):
    table = shapes(table_name)
    held = [info.name for m in modules_of(model) for info in (m.weight, m.bias) if info]
    vae = [VAE + path for path in model.vae]
    position_ids = [key for key in table if key.endswith("position_ids")]
    assert set(held) | set(vae) | set(position_ids) == set(table)
    shared = Counter(held + vae)  # only a fused attention weight is held more than once, by q, k and v
    assert all(n == (3 if ".in_proj_" in key else 1) for key, n in shared.items())
    assert not model.ignored


def test_fused_parts_are_thirds_in_order(model, table_name):
    table = shapes(table_name)
    for m in modules_of(model):
        if m.part:
            n, k = table[m.weight.name]
            assert m.weight.shape == (n // 3, k) and m.bias.shape == (n // 3,)
            assert m.weight.offset == "qkv".index(m.part) * (n // 3) * k * 2


def test_names_are_unique(model):
    names = [m.name for m in modules_of(model) if m.name]
    assert len(set(names)) == len(names)
    assert not any("." in name for name in names)


def test_groups_and_blocks(model):
    for m in modules_of(model):
        assert m.block
        assert m.group in (LAYER_GROUPS if m.name and m.kind in LORA_KINDS else ("",))


def test_blocks_of_a_unet(sd_model):
    model = sd_model
    blocks = {m.block for m in modules_of(model) if m.component == "unet"}
    last = "08" if "label_emb.0.0" in model.components["unet"] else "11"
    assert {"IN00", f"IN{last}", "MID", "OUT00", f"OUT{last}", "TIME", "OUT"} <= blocks


# --- names --------------------------------------------------------------------------------------------------

TE1 = "cond_stage_model.transformer.text_model."
TE2 = "cond_stage_model.model.transformer."
XL1, XL2 = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.transformer."
KNOWN = {  # as they stand in LoRA files that people use
    "sd15": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": UNET + "input_blocks.1.1.proj_in",
        "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q":
            UNET + "input_blocks.2.1.transformer_blocks.0.attn1.to_q",
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_0_attn2_to_out_0":
            UNET + "input_blocks.8.1.transformer_blocks.0.attn2.to_out.0",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_ff_net_0_proj":
            UNET + "input_blocks.4.1.transformer_blocks.0.ff.net.0.proj",
        "lora_unet_down_blocks_0_downsamplers_0_conv": UNET + "input_blocks.3.0.op",
        "lora_unet_down_blocks_2_downsamplers_0_conv": UNET + "input_blocks.9.0.op",
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut": UNET + "input_blocks.4.0.skip_connection",
        "lora_unet_down_blocks_3_resnets_1_conv2": UNET + "input_blocks.11.0.out_layers.3",
        "lora_unet_mid_block_attentions_0_proj_out": UNET + "middle_block.1.proj_out",
        "lora_unet_mid_block_resnets_0_conv1": UNET + "middle_block.0.in_layers.2",
        "lora_unet_mid_block_resnets_1_time_emb_proj": UNET + "middle_block.2.emb_layers.1",
        "lora_unet_up_blocks_0_upsamplers_0_conv": UNET + "output_blocks.2.1.conv",
        "lora_unet_up_blocks_2_upsamplers_0_conv": UNET + "output_blocks.8.2.conv",
        "lora_unet_up_blocks_1_attentions_0_proj_in": UNET + "output_blocks.3.1.proj_in",
        "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_ff_net_2":
            UNET + "output_blocks.11.1.transformer_blocks.0.ff.net.2",
        "lora_unet_conv_in": UNET + "input_blocks.0.0",
        "lora_unet_conv_out": UNET + "out.2",
        "lora_unet_time_embedding_linear_1": UNET + "time_embed.0",
        "lora_unet_time_embedding_linear_2": UNET + "time_embed.2",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": TE1 + "encoder.layers.0.self_attn.q_proj",
        "lora_te_text_model_encoder_layers_11_mlp_fc2": TE1 + "encoder.layers.11.mlp.fc2",
        "lora_te_text_model_encoder_layers_5_layer_norm1": TE1 + "encoder.layers.5.layer_norm1",
    },
    "sd21": {
        "lora_unet_down_blocks_0_attentions_0_proj_in": UNET + "input_blocks.1.1.proj_in",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k":
            UNET + "middle_block.1.transformer_blocks.0.attn2.to_k",
        "lora_te_text_model_encoder_layers_0_mlp_fc1": TE2 + "resblocks.0.mlp.c_fc",
        "lora_te_text_model_encoder_layers_22_mlp_fc2": TE2 + "resblocks.22.mlp.c_proj",
        "lora_te_text_model_encoder_layers_7_self_attn_out_proj": TE2 + "resblocks.7.attn.out_proj",
        "lora_te_text_model_encoder_layers_7_self_attn_q_proj": TE2 + "resblocks.7.attn.in_proj_weight[0]",
        "lora_te_text_model_encoder_layers_7_self_attn_k_proj": TE2 + "resblocks.7.attn.in_proj_weight[1]",
        "lora_te_text_model_encoder_layers_7_self_attn_v_proj": TE2 + "resblocks.7.attn.in_proj_weight[2]",
    },
    "sdxl": {
        "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_v":
            UNET + "input_blocks.4.1.transformer_blocks.1.attn1.to_v",
        "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj":
            UNET + "middle_block.1.transformer_blocks.9.ff.net.0.proj",
        "lora_unet_output_blocks_5_2_conv": UNET + "output_blocks.5.2.conv",
        "lora_unet_input_blocks_1_0_in_layers_2": UNET + "input_blocks.1.0.in_layers.2",
        "lora_unet_input_blocks_3_0_op": UNET + "input_blocks.3.0.op",
        "lora_unet_label_emb_0_2": UNET + "label_emb.0.2",
        "lora_unet_time_embed_0": UNET + "time_embed.0",
        "lora_unet_out_2": UNET + "out.2",
        "lora_te1_text_model_encoder_layers_3_self_attn_v_proj": XL1 + "encoder.layers.3.self_attn.v_proj",
        "lora_te2_text_model_encoder_layers_31_mlp_fc1": XL2 + "resblocks.31.mlp.c_fc",
        "lora_te2_text_model_encoder_layers_31_self_attn_v_proj": XL2 + "resblocks.31.attn.in_proj_weight[2]",
    },
}  # fmt: skip


@pytest.mark.parametrize("table_name", KNOWN, indirect=True)
def test_names_as_in_real_files(model, table_name):
    ours = {m.name: m for m in modules_of(model)}
    for name, key in KNOWN[table_name].items():
        m = ours[name]
        found = f"{m.weight.name}[{'qkv'.index(m.part)}]" if m.part else m.weight.name.removesuffix(".weight")
        assert found == key


def test_a1111_resolves_every_name_to_the_layer_that_is_meant(sd_model):
    model = sd_model
    layers = a1111.host_layers(list(model.file.tensors))
    for m in modules_of(model):
        if m.name:
            key = m.weight.name.removesuffix(".weight").removesuffix(".in_proj_weight")
            assert a1111.resolve(m.name, layers) == (key, m.part or ""), m.name


def test_nothing_that_a1111_could_reach_is_left_without_a_name(sd_model):
    for m in modules_of(sd_model):
        if m.name:
            continue
        open_clip_norm = m.kind == NORM and ".model." in m.weight.name and "diffusion" not in m.weight.name
        nine_channels = m.path == "input_blocks.0.0" and m.weight.shape[1] == 9  # it pads them to fourteen
        beyond = m.path.split(".")[-1] in BEYOND_REACH
        assert open_clip_norm or nine_channels or beyond, m.path
        assert not beyond or m.kind in (EMBEDDING, PARAMETER)


# --- widths, formats, spellings -----------------------------------------------------------------------------


@pytest.mark.parametrize("divisor", [32, 16])
def test_width_does_not_matter(model, table_name, divisor):
    slim = model_of(narrow(shapes(table_name), divisor))
    assert slim.title == model.title and described(slim) == described(model)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E4M3", "F64"])
def test_format_does_not_matter(model, table_name, dtype):
    assert described(model_of(shapes(table_name), dtype)) == described(model)


def test_a_unet_under_the_prefix_of_its_own(sd_model):
    table = {"unet." + k[len(UNET) :]: i.shape for k, i in sd_model.file.tensors.items() if k.startswith(UNET)}
    assert described(model_of(table)).items() <= described(sd_model).items()


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_a_denoiser_alone_under_any_prefix(model, table_name, prefix):
    table = {prefix + k[len(UNET) :]: s for k, s in shapes(table_name).items() if k.startswith(UNET)}
    alone = model_of(table)
    assert alone.title == model.title and not alone.vae and not alone.ignored
    expected = {key: v for key, v in described(model).items() if key.startswith("unet.")}
    assert described(alone) == expected


def test_old_names_ema_copies_and_schedules(model, table_name):
    table = {k.replace("transformer.text_model.", "transformer."): s for k, s in shapes(table_name).items()}
    table = {k: s for k, s in table.items() if not k.endswith("position_ids")}
    ema = {"model_ema." + k.replace(".", ""): s for k, s in table.items() if k.startswith(UNET)}
    spelled = model_of({**table, **ema, "betas": (1000,), "v_pred": (0,), "model_ema.decay": ()})
    assert described(spelled) == described(model)
    assert spelled.ignored == {"EMA copies": len(ema) + 1, "other tensors": 2}


def test_text_encoders_alone(sd_model):
    model = sd_model
    table = {k: i.shape for k, i in model.file.tensors.items() if not k.startswith((UNET, VAE))}
    alone = model_of(table)
    assert alone.architecture is model.architecture and "unet" not in alone.components


def test_other_variants():
    table = shapes("sd15")
    table[UNET + "input_blocks.0.0.weight"] = (320, 8, 3, 3)
    assert model_of(table).variant == "instruct-pix2pix"


# --- what is refused ----------------------------------------------------------------------------------------

REFUSED = {
    "is a LoRA": [
        ["lora_unet_conv_in.lora_up.weight", "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.alpha"],
        ["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"],
        ["lora_unet_mid_block_resnets_0_conv1.hada_w1_a"],
        ["lora_unet_mid_block_resnets_0_conv1.lokr_w1"],
        ["unet.mid_block.attentions.0.processor.to_q_lora.up.weight"],
    ],
    "Flux": [["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], ["double_blocks.0.img_mod.lin.bias"]],
    "Stable Diffusion 3": [["model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"]],
    "diffusers": [["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"]],
    "a VAE": [["decoder.up.0.block.0.conv1.weight"], [VAE + "decoder.up.0.block.0.conv1.weight"]],
    "None of its tensors": [[], ["some.other.weight"]],
}


@pytest.mark.parametrize(("said", "keys"), [(said, keys) for said, sets in REFUSED.items() for keys in sets])
def test_other_files_are_refused_and_named(said, keys):
    with pytest.raises(LayoutError) as caught:
        model_of({key: (8, 8) for key in keys})
    assert said in f"{caught.value.what} {caught.value.why}"
    assert "model.safetensors" in caught.value.what


def test_a_refiner_and_an_unclip_are_refused():
    for source in ("sd15", "sd21"):
        with pytest.raises(LayoutError) as caught:
            model_of(shapes(source) | {UNET + "label_emb.0.0.weight": (1280, 2560)})
        assert "refiner" in caught.value.why and "unCLIP" in caught.value.why


def test_a_unet_without_attention_is_refused():
    with pytest.raises(LayoutError, match="no Stable Diffusion"):
        model_of({UNET + "input_blocks.0.0.weight": (320, 4, 3, 3)})


@pytest.mark.parametrize("stored", ["I8", "U8"])
@pytest.mark.parametrize("part", ["attn1.to_q.weight", "attn.in_proj_weight", "mlp.c_fc.bias"])
def test_integers_for_weights_are_refused(stored, part):
    file = header(shapes("sd21"))
    chosen = [key for key in file.tensors if key.endswith(part)]
    for key in chosen:
        file.tensors[key] = TensorInfo(key, stored, file.tensors[key].shape, 0)
    with pytest.raises(LayoutError, match="is quantised") as caught:
        recognise(file)
    assert stored in caught.value.why and "unquantised" in caught.value.hint
    assert ", ".join(chosen[:3]) + f" and {len(chosen) - 3} more" in caught.value.why


@pytest.mark.parametrize("source", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "key",
    ["scaled_fp8", "time_embed.0.scale_weight", "time_embed.0.weight_scale", "time_embed.0.SCB",
     "time_embed.0.weight.absmax", "time_embed.0.comfy_quant"],
)  # fmt: skip
def test_weights_that_need_factors_beside_them_are_refused(source, key):
    with pytest.raises(LayoutError, match="is quantised") as caught:
        model_of(shapes(source) | {UNET + key: ()}, "F8_E4M3")
    assert UNET + key in caught.value.why and "unquantised" in caught.value.hint


def test_other_integers_are_no_obstacle():
    file = header(shapes("sd15"))
    for key in ("num_batches_tracked", "model_ema.num_updates", VAE + "quant_conv.weight"):
        file.tensors[key] = TensorInfo(key, "I64", (), 0)
    assert recognise(file).architecture.id == "sd1"
