"""LoRAs for Flux and Stable Diffusion 3: split layers onto fused ones, every dialect onto the same rows."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib_hypermerge.adapters.swapped import swap
from lib_hypermerge.errors import FormatError
from lib_hypermerge.jobs.adapter_inputs import open_lora
from lib_hypermerge.layouts.adapter_file import open_adapter
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.dialects import diffusers
from lib_hypermerge.layouts.module import Model
from lib_hypermerge.layouts.reference import Outline
from lib_hypermerge.layouts.resolve import identify, nearest
from lib_hypermerge.layouts.tables import narrow, shapes
from lib_hypermerge.layouts.tables.text_encoders import shapes as text_encoders

RANK = 2


def outline(name: str) -> Model:
    """A narrow model without numbers, with its text encoders."""
    table = shapes(name) | text_encoders(
        ("clip_l", "clip_g", "t5xxl") if name.startswith("sd3") else ("clip_l", "t5xxl")
    )
    return recognise(Outline(name, narrow(table)))


def save(path, modules: dict[str, tuple[int, int]], up: str, down: str):
    """A LoRA with the given ends of names. modules: name → (rows, columns)."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (n, k) in modules.items():
        tensors[name + up] = torch.randn(n, RANK, generator=generator)
        tensors[name + down] = torch.randn(RANK, k, generator=generator)
    save_file(tensors, path)
    return path


PEFT = (".lora_B.weight", ".lora_A.weight")
KOHYA = (".lora_up.weight", ".lora_down.weight")
H = 96  # the narrow Flux's width
FLUX = [
    # names in several dialects → place, first row, rows, columns
    (("transformer.transformer_blocks.3.attn.to_q", "lycoris_transformer_blocks_3_attn_to_q",
      "lora_transformer_transformer_blocks_3_attn_to_q"), "double_blocks.3.img_attn.qkv", 0, H, H),
    (("transformer.transformer_blocks.3.attn.to_k", "transformer_blocks.3.attn.to_k"),
     "double_blocks.3.img_attn.qkv", H, H, H),
    (("transformer.transformer_blocks.3.attn.to_v",), "double_blocks.3.img_attn.qkv", 2 * H, H, H),
    (("transformer.transformer_blocks.3.attn.add_k_proj",), "double_blocks.3.txt_attn.qkv", H, H, H),
    (("transformer.transformer_blocks.3.attn.to_out.0", "lora_unet_double_blocks_3_img_attn_proj",
      "diffusion_model.double_blocks.3.img_attn.proj"), "double_blocks.3.img_attn.proj", 0, H, H),
    (("transformer.transformer_blocks.3.attn.to_add_out",), "double_blocks.3.txt_attn.proj", 0, H, H),
    (("transformer.transformer_blocks.3.ff.net.0.proj",), "double_blocks.3.img_mlp.0", 0, 4 * H, H),
    (("transformer.transformer_blocks.3.ff_context.net.2",), "double_blocks.3.txt_mlp.2", 0, H, 4 * H),
    (("transformer.transformer_blocks.3.norm1_context.linear",), "double_blocks.3.txt_mod.lin", 0, 6 * H, H),
    (("lora_unet_double_blocks_3_img_attn_qkv", "diffusion_model.double_blocks.3.img_attn.qkv"),
     "double_blocks.3.img_attn.qkv", 0, 3 * H, H),
    (("transformer.single_transformer_blocks.5.attn.to_q",), "single_blocks.5.linear1", 0, H, H),
    (("transformer.single_transformer_blocks.5.attn.to_v",), "single_blocks.5.linear1", 2 * H, H, H),
    (("transformer.single_transformer_blocks.5.proj_mlp",), "single_blocks.5.linear1", 3 * H, 4 * H, H),
    (("lora_unet_single_blocks_5_linear1",), "single_blocks.5.linear1", 0, 7 * H, H),
    (("transformer.single_transformer_blocks.5.proj_out", "lora_unet_single_blocks_5_linear2"),
     "single_blocks.5.linear2", 0, H, 5 * H),
    (("transformer.single_transformer_blocks.5.norm.linear",), "single_blocks.5.modulation.lin", 0, 3 * H, H),
    (("transformer.x_embedder", "lora_unet_img_in"), "img_in", 0, H, 64),
    (("transformer.time_text_embed.guidance_embedder.linear_2",), "guidance_in.out_layer", 0, H, H),
    (("transformer.proj_out", "lora_unet_final_layer_linear"), "final_layer.linear", 0, 64, H),
    (("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1",
      "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"), "encoder.layers.0.mlp.fc1", 0, 96, 24),
    (("lora_te3_encoder_block_1_layer_0_SelfAttention_q", "text_encoder_2.encoder.block.1.layer.0.SelfAttention.q",
      "t5xxl.encoder.block.1.layer.0.SelfAttention.q"), "encoder.block.1.layer.0.SelfAttention.q", 0, 128, 128),
]  # fmt: skip
W = 48  # the narrow SD3 medium's width
SD3 = [
    (("transformer.transformer_blocks.2.attn.to_k", "lora_transformer_transformer_blocks_2_attn_to_k"),
     "joint_blocks.2.x_block.attn.qkv", W, W, W),
    (("transformer.transformer_blocks.2.attn.add_v_proj",), "joint_blocks.2.context_block.attn.qkv", 2 * W, W, W),
    (("transformer.transformer_blocks.2.attn.to_out.0", "lora_unet_joint_blocks_2_x_block_attn_proj"),
     "joint_blocks.2.x_block.attn.proj", 0, W, W),
    (("transformer.transformer_blocks.2.norm1.linear",), "joint_blocks.2.x_block.adaLN_modulation.1", 0, 6 * W, W),
    (("transformer.transformer_blocks.2.ff_context.net.0.proj",), "joint_blocks.2.context_block.mlp.fc1", 0, 4 * W, W),
    (("transformer.context_embedder",), "context_embedder", 0, W, 128),
    (("text_encoder_2.text_model.encoder.layers.5.self_attn.q_proj",
      "lora_te2_text_model_encoder_layers_5_self_attn_q_proj"), "encoder.layers.5.self_attn.q_proj", 0, 40, 40),
    (("text_encoder_3.encoder.block.1.layer.1.DenseReluDense.wo", "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo"),
     "encoder.block.1.layer.1.DenseReluDense.wo", 0, 128, 320),
]  # fmt: skip
CASES = [("flux_dev", *case) for case in FLUX] + [("sd3_medium", *case) for case in SD3]


@pytest.mark.parametrize(("model", "names", "path", "start", "rows", "columns"), CASES, ids=[c[1][0] for c in CASES])
def test_every_name_reaches_its_rows(tmp_path, model, names, path, start, rows, columns):
    for name in names:
        ends = KOHYA if name.startswith(("lora_", "lycoris_")) else PEFT
        file = save(tmp_path / "a.safetensors", {name: (rows, columns)}, *ends)
        with open_lora(file, outline(model)) as lora:
            ((_, target),) = lora.resolution.targets
            assert (target.module.path, target.start, target.stop, target.swapped) == (path, start, start + rows, False)


@pytest.mark.parametrize(
    ("model", "name", "path", "rows"),
    [
        ("flux_dev", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1", 2 * H),
        ("sd3_medium", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1", 2 * W),
        ("sd3_medium", "transformer.transformer_blocks.23.norm1_context.linear",
         "joint_blocks.23.context_block.adaLN_modulation.1", 2 * W),
    ],
)  # fmt: skip
def test_swapped_halves_are_swapped_back(tmp_path, model, name, path, rows):
    k = rows // 2
    file = save(tmp_path / "a.safetensors", {name: (rows, k)}, *PEFT)
    stored = load_file(file)
    delta = stored[f"{name}.lora_B.weight"].double() @ stored[f"{name}.lora_A.weight"].double()
    with open_lora(file, outline(model)) as lora:
        ((entry, target),) = lora.resolution.targets
        assert (target.module.path, target.start, target.stop, target.swapped) == (path, 0, rows, True)
        adapter = lora.load(entry)
        expected = torch.cat([delta[k:], delta[:k]])
        assert torch.allclose(adapter.change(torch.zeros(rows, k, dtype=torch.float64)), expected)
        low = adapter.low_rank()
        assert torch.allclose((low.scale * low.up @ low.down).double(), expected, atol=1e-5)
        assert adapter.family == "lora"


def test_magnitudes_of_swapped_rows_are_swapped_too(tmp_path):
    name, rows, k = "transformer.norm_out.linear", 2 * H, H
    file = save(tmp_path / "a.safetensors", {name: (rows, k)}, *PEFT)
    generator = torch.Generator().manual_seed(4)
    magnitude, weight = torch.rand(rows, generator=generator) + 1, torch.randn(rows, k, generator=generator).double()
    stored = load_file(file) | {f"{name}.lora_magnitude_vector": magnitude}
    file = tmp_path / "b.safetensors"  # what load_file gives is a view of the first one
    save_file(stored, file)
    theirs = swap(weight)  # the weight as diffusers has it
    V = theirs + stored[f"{name}.lora_B.weight"].double() @ stored[f"{name}.lora_A.weight"].double()
    expected = magnitude.double()[:, None] * V / V.norm(dim=1, keepdim=True) - theirs
    with open_lora(file, outline("flux_dev")) as lora:
        ((entry, _),) = lora.resolution.targets
        assert torch.allclose(lora.load(entry).change(weight), swap(expected), atol=1e-9)


def test_xlabs_names(tmp_path):
    modules = {
        "double_blocks.7.processor.qkv_lora1": (3 * H, H), "double_blocks.7.processor.proj_lora2": (H, H),
    }  # fmt: skip
    file = save(tmp_path / "a.safetensors", modules, ".up.weight", ".down.weight")
    with open_lora(file, outline("flux_dev")) as lora:
        assert lora.file.dialect == "xlabs"
        found = {target.module.path for _, target in lora.resolution.targets}
        assert found == {"double_blocks.7.img_attn.qkv", "double_blocks.7.txt_attn.proj"}


def test_a_fused_layer_beside_its_parts_is_refused(tmp_path):
    modules = {
        "diffusion_model.double_blocks.3.img_attn.qkv": (3 * H, H),
        "transformer.transformer_blocks.3.attn.to_k": (H, H),
    }
    file = save(tmp_path / "a.safetensors", modules, *PEFT)
    with pytest.raises(FormatError, match=r"the same layer twice.*unet\.double_blocks\.3\.img_attn\.qkv"):
        open_lora(file, outline("flux_dev"))


def test_a_plain_lora_on_a_tool_changes_the_first_channels(tmp_path):
    table = narrow(shapes("flux_dev")) | {"model.diffusion_model.img_in.weight": (H, 384)}
    model = recognise(Outline("fill", table))
    assert model.variant == "Fill"
    file = save(tmp_path / "a.safetensors", {"transformer.x_embedder": (H, 64)}, *PEFT)
    tensors = load_file(file)
    delta = tensors["transformer.x_embedder.lora_B.weight"] @ tensors["transformer.x_embedder.lora_A.weight"]
    with open_lora(file, model) as lora:
        ((entry, target),) = lora.resolution.targets
        assert (target.channels, target.shape) == (64, (H, 64))
        change = lora.load(entry).change(torch.ones(H, 384))
        assert torch.equal(change[:, :64], delta) and not change[:, 64:].any()
        low = lora.load(entry).low_rank()
        assert torch.equal(low.up @ low.down, change)


def test_every_layer_of_a_split_lora_tiles_the_fused_one(tmp_path):
    """All of diffusers' layers of Flux together cover each row of each layer once."""
    model = outline("flux_dev")
    modules = {}
    for module in model.components["unet"].values():
        for name, piece in diffusers.names("flux", module):
            if module.name and len(module.weight.shape) == 2:
                modules[name] = (piece.stop - piece.start, module.weight.shape[1])
    file = save(tmp_path / "a.safetensors", modules, *PEFT)
    with open_lora(file, model) as lora:
        rows: dict[str, list[tuple[int, int]]] = {}
        for _, target in lora.resolution.targets:
            rows.setdefault(target.module.path, []).append((target.start, target.stop))
        for module in model.components["unet"].values():
            if module.path in rows:
                edges = sorted(rows[module.path])
                assert [start for start, _ in edges] == [0, *(stop for _, stop in edges[:-1])]
                assert edges[-1][1] == module.weight.shape[0]
        assert len(rows) == 304 + 10  # 19 double blocks of ten layers, 38 single ones of three; img_in … final_layer
        assert lora.resolution.unmatched == []


# --- telling members apart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "columns", "title"),
    [
        ("transformer.transformer_blocks.3.attn.to_q", 1536, 1536, "Stable Diffusion 3 medium"),
        ("transformer.transformer_blocks.3.attn2.to_q", 1536, 1536, "Stable Diffusion 3.5 medium"),
        ("transformer.transformer_blocks.3.attn.to_q", 2432, 2432, "Stable Diffusion 3.5 large"),
        ("transformer.transformer_blocks.3.attn.to_q", 3072, 3072, "Flux.1"),
        ("transformer.single_transformer_blocks.3.attn.to_q", 48, 48, "Flux.1"),
    ],
)
def test_members_of_an_architecture_are_told_by_their_sizes(tmp_path, name, rows, columns, title):
    file = save(tmp_path / "a.safetensors", {name: (rows, columns)}, *PEFT)
    with open_adapter(file) as adapter:
        model, share = nearest(adapter)
        assert (model.title, share) == (title, 1.0)
        assert identify(adapter) == (model.architecture.id, 1.0)


def test_a_peft_folder_of_a_transformer(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    name = "base_model.model.single_transformer_blocks.2.proj_mlp"
    save(folder / "adapter_model.safetensors", {name: (4 * H, H)}, *PEFT)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 1}))
    with open_lora(tmp_path, outline("flux_dev")) as lora:
        ((entry, target),) = lora.resolution.targets
        assert (target.module.path, target.start, target.stop) == ("single_blocks.2.linear1", 3 * H, 7 * H)
        assert lora.load(entry).scale == 0.5
