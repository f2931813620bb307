"""What inspect says that WebUIs do with a LoRA: A1111's names against another telling of its rule, and what was seen
of the real one; Forge's names against its table, told anew."""

from __future__ import annotations

import re

import a1111
import pytest
import torch
from models import last_json, run_cli
from safetensors.torch import save_file

from lib_hypermerge.jobs import inspect_a1111, inspect_forge
from lib_hypermerge.layouts.dialects import kohya
from lib_hypermerge.layouts.tables import narrow, shapes

TABLES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl", "sd15_inpainting": "sd1"}
UNET = "model.diffusion_model."


def checkpoint(table: str) -> dict[str, tuple[int, ...]]:
    return narrow(shapes(table), 32)


def names_for(table: str) -> set[str]:
    """Names that trainers give the layers of a checkpoint, right for this architecture or not."""
    found = set()
    for key in checkpoint(table):
        if key.startswith("first_stage_model.") or not key.endswith(("weight", "_weight")):
            continue
        if key.startswith(UNET):
            path = key.removeprefix(UNET).removesuffix(".weight")
            plain = path.replace(".", "_")
            found |= {kohya.unet_diffusers(path), f"lora_unet_{plain}", f"diffusion_model_{plain}", f"{plain}_q_proj"}
            found |= {f"lora_unet_{plain}_zz", f"lora_te_{plain}", kohya.unet_diffusers(path).replace("_0_", "_1_")}
            continue
        path = re.sub(r".*?(text_model|\.model)\.", "", key).removesuffix(".weight")
        for prefix in ("lora_te", "lora_te1", "lora_te2"):
            found.add(f"{prefix}_text_model_{path.replace('.', '_')}")
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                name = kohya.open_clip(prefix, re.sub(r"attn\.\w+$", f"attn.{part}", path))
                found |= {name} if name else set()
    return found


@pytest.mark.parametrize("table", TABLES)
def test_a1111_finds_the_layers_that_its_rule_finds_told_anew(table):
    keys = checkpoint(table)
    layers = a1111.host_layers(list(keys))
    tensors = {f"{name}.diff": (1,) for name in names_for(table)}
    result = inspect_a1111.reach(tensors, keys, TABLES[table])
    while "a group of layers" in result.refused:  # which keeps it from loading anything: not the matter here
        del tensors[result.refused.split()[0]]
        result = inspect_a1111.reach(tensors, keys, TABLES[table])
    assert result.refused == ""
    lost = {key for key, why in result.ignored.items() if why == "no layer of that name"}
    expected = {key for key in tensors if a1111.resolve(key.removesuffix(".diff"), layers) is None}
    assert lost == expected
    assert len(tensors) > len(lost) > 100


LINEAR = {"lora_up.weight": (4, 2), "lora_down.weight": (2, 4), "alpha": ()}
FIRST = "lora_unet_down_blocks_0_attentions_0_proj_in"
SECOND = "lora_unet_down_blocks_0_attentions_1_proj_in"
LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
OLD_GLORA = {"a1.weight": (2, 4), "a2.weight": (4, 2), "b1.weight": (2, 4), "b2.weight": (4, 2), "alpha": ()}
NEW_GLORA = {"a1.weight": (4, 2), "a2.weight": (2, 4), "b1.weight": (4, 2), "b2.weight": (2, 4), "alpha": ()}


def file_of(modules: dict[str, dict]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": shape for name, parts in modules.items() for part, shape in parts.items()}


# what A1111 v1.10.1 did with such files when they were given to it
@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({SECOND: {"diff_b": (4,)}}, "no family with only the parts diff_b"),
        ({"lora_unet_down_blocks_0_resnets_0_norm1": LINEAR}, "its layer is a norm"),
        ({"lora_unet_down_blocks_0_resnets_0_norm1": {"w_norm": (4,)}}, "only the parts w_norm"),
        ({"lora_unet_input_blocks_1_1": LINEAR}, "a group of layers"),
        ({"transformer_text_model_embeddings_position_embedding": LINEAR}, "its layer is a table of embeddings"),
        ({"transformer_text_model_embeddings_token_embedding": LINEAR}, "a group of layers"),
        ({SECOND: {"lora_up.weight": (4, 2)}}, "only the parts lora_up.weight"),
        ({SECOND: {"weight": (4,)}}, "IA3 without on_input"),
        ({SECOND: {p: (2, 2) for p in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")}}, "only the parts a1"),
    ],
)
def test_one_module_that_a1111_does_not_understand_keeps_it_from_loading_the_file(more, why):
    result = inspect_a1111.reach(file_of({FIRST: LINEAR, **more}), checkpoint("sd15"), "sd1")
    assert why in result.refused
    assert inspect_a1111.reach(file_of({FIRST: LINEAR}), checkpoint("sd15"), "sd1").modules == 1


@pytest.mark.parametrize(
    ("table", "modules", "applied", "ignored"),
    [
        ("sd15", {FIRST: {**LINEAR, "diff_b": (4,)}}, 1, {f"{FIRST}.diff_b": "not read beside LoRA"}),
        ("sd15", {FIRST: LINEAR, "bundle_emb": {"token.string_to_param.*": (2, 4)}}, 1,
         {"bundle_emb.token.string_to_param.*": "an embedding, loaded as such"}),
        ("sd15", {"unet.down_blocks.0.attentions.0.proj_in": {"lora_A.weight": (2, 4)}}, 0,
         {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": "dotted names are never found"}),
        ("sd15", {FIRST: {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}}, 1, {}),
        ("sd15", {"lora_unet_conv_in": {"diff": (10, 4, 3, 3)}}, 1, {}),
        ("sd15_inpainting", {"lora_unet_conv_in": {"diff": (10, 9, 3, 3)}}, 0,
         {"lora_unet_conv_in.diff": "it pads every LoRA of an in-painting model's first layer by five channels"}),
        ("sd15_inpainting", {"lora_unet_conv_in": {"diff": (10, 4, 3, 3)}}, 1, {}),
        ("sd15", {FIRST: {"weight": (4, 1), "on_input": ()}}, 0,
         {f"{FIRST}.{p}": "IA3 of a convolution" for p in ("weight", "on_input")}),
        ("sd15", {LAYER: {"weight": (4, 1), "on_input": ()}}, 1, {}),
        ("sd15", {FIRST: OLD_GLORA}, 0, {f"{FIRST}.{p}": "GLoRA of a convolution" for p in OLD_GLORA}),
        ("sd15", {LAYER: OLD_GLORA}, 1, {}),
        ("sd15", {LAYER: NEW_GLORA}, 0, {f"{LAYER}.{p}": "GLoRA as LyCORIS 3 and later write it" for p in NEW_GLORA}),
        ("sdxl", {"1_model_transformer_resblocks_0_ln_1": {"w_norm": (4,), "b_norm": (4,)}}, 0,
         {f"1_model_transformer_resblocks_0_ln_1.{p}_norm": "norms of open_clip are never changed" for p in "wb"}),
    ],
)  # fmt: skip
def test_what_a1111_leaves_out(table, modules, applied, ignored):
    result = inspect_a1111.reach(file_of(modules), checkpoint(table), TABLES[table])
    assert (result.refused, result.modules, result.ignored) == ("", applied, ignored)


@pytest.mark.parametrize("table", ["sd21", "sdxl"])
def test_a1111_applies_a_fused_attention_only_whole(table):
    prefix = f"{'lora_te' if table == 'sd21' else 'lora_te2'}_text_model_encoder_layers_0_self_attn_"
    whole = file_of({f"{prefix}{part}": LINEAR for part in ("q_proj", "k_proj", "v_proj", "out_proj")})
    assert inspect_a1111.reach(whole, checkpoint(table), TABLES[table]).modules == 4
    part = file_of({f"{prefix}{part}": LINEAR for part in ("q_proj", "v_proj")})
    result = inspect_a1111.reach(part, checkpoint(table), TABLES[table])
    assert result.modules == 0
    assert set(result.ignored.values()) == {"k and out of the fused attention missing"}


def test_on_sd3_a1111_stumbles_over_names_of_one_dot_and_misspells_the_text_stream():
    keys = {f"{UNET}joint_blocks.0.{stream}_block.attn.{part}.weight": (12 if part == "qkv" else 4, 4)
            for stream in ("x", "context") for part in ("qkv", "proj")}  # fmt: skip
    block = "transformer.transformer_blocks.0.attn"
    pair = {"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}
    good = {f"{block}.{part}": pair for part in ("to_q", "to_k", "to_v", "to_out.0")}
    lost = {f"{block}.{part}": pair for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    result = inspect_a1111.reach(file_of(good | lost), keys, "sd3")
    assert (result.refused, result.modules) == ("", 4)
    assert set(result.ignored) == set(file_of(lost))
    assert inspect_a1111.reach(file_of({f"{block}.to_q": pair}), keys, "sd3").modules == 0
    kohya_file = file_of({"lora_unet_joint_blocks_0_x_block_attn_qkv": LINEAR})
    assert "too few dots" in inspect_a1111.reach(kohya_file, keys, "sd3").refused


def forge_names(table: str) -> set[str]:
    """A part of Forge's table: UNet layers by their own path and by diffusers', text encoders by both dialects."""
    found = set()
    for key in shapes(table):
        if key.startswith(UNET) and key.endswith(".weight"):
            path = key.removeprefix(UNET).removesuffix(".weight")
            found |= {f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{path}"}
            diffusers = kohya.unet_diffusers(path)
            if re.search(r"_(down|up|mid)_", diffusers):
                found |= {diffusers, diffusers.replace("lora_unet_", "lycoris_")}
    encoders = {"sd15": {"te": 12, "te1": 12}, "sd21": {"te": 24, "te1": 24}, "sdxl": {"te": 12, "te1": 12, "te2": 32}}
    for encoder, layers in encoders[table].items():
        for layer in range(layers):
            for part in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out"))):
                found.add(f"lora_{encoder}_text_model_encoder_layers_{layer}_{part.replace('.', '_')}")
                folder = "text_encoder_2" if encoder == "te2" else "text_encoder"
                found.add(f"{folder}.text_model.encoder.layers.{layer}.{part}")
    return found


@pytest.mark.parametrize("table", ["sd15", "sd21", "sdxl"])
def test_forge_knows_the_names_of_its_table_and_no_others(table):
    names = forge_names(table)
    tensors = file_of({name: {"diff": (1,)} for name in names})
    result = inspect_forge.reach(tensors, shapes(table), TABLES[table])
    assert (result.refused, result.ignored, result.modules) == ("", {}, len(names))
    others = {name.replace("lora_te_", "lora_te9_").replace("lora_unet_", "oft_unet_") for name in names} - names
    others |= {f"{name}_zz" for name in names} | {"text_encoder_3.x", "unet.down_blocks_0_attentions_0_proj_in.x"}
    strange = inspect_forge.reach(file_of({name: {"diff": (1,)} for name in others}), shapes(table), TABLES[table])
    assert strange.modules == 0


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q", True),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out", True),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", False),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out.0", False),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", True),
        ("unet.down_blocks.0.attentions.0.proj_in", True),
    ],
)
def test_forge_knows_attention_by_its_oldest_dotted_name_alone(name, known):
    result = inspect_forge.reach(file_of({name: {"diff": (1,)}}), shapes("sd15"), "sd1")
    assert result.modules == int(known)


def test_forge_bears_with_twelve_strange_tensors():
    good = file_of({FIRST: LINEAR})
    few = {f"strange.{i}": (1,) for i in range(12)}
    result = inspect_forge.reach(good | few, shapes("sd15"), "sd1")
    assert (result.refused, result.modules, len(result.ignored)) == ("", 1, 12)
    assert "13 tensors" in inspect_forge.reach(good | few | {"one.more": (1,)}, shapes("sd15"), "sd1").refused


@pytest.mark.parametrize(
    ("parts", "stops"),
    [({"lora_up.weight": (1,)}, True), ({"hada_w1_a": (1,)}, True), ({"a1.weight": (1,)}, True),
     ({"lora_down.weight": (1,)}, False), ({"b_norm": (1,)}, False), ({"oft_blocks": (1,)}, False)],
)  # fmt: skip
def test_forge_stops_at_half_a_module_of_some_kinds(parts, stops):
    result = inspect_forge.reach(file_of({FIRST: parts}), shapes("sd15"), "sd1")
    assert ("error" in result.refused) == stops
    assert result.modules == 0


@pytest.mark.parametrize(
    ("metadata", "a1111_group", "forge_group"),
    [
        ({}, "Unknown", "Unknown"),
        ({"ss_sd_model_name": "x"}, "SD1", "Unknown"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", "SDXL"),
        ({"ss_v2": "True"}, "SD2", "SD2"),
        ({"ss_v2": "False", "modelspec.architecture": "stable-diffusion-v1/lora"}, "SD1", "SD1"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SD1", "SDXL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "SD1", "Flux"),
    ],
)
def test_the_group_that_a_card_is_shown_in(tmp_path, metadata, a1111_group, forge_group):
    tensors = {key: torch.zeros(shape) for key, shape in file_of({FIRST: LINEAR, SECOND: LINEAR}).items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    result = run_cli(["inspect", tmp_path / "a.safetensors", "--json", "--quiet"])
    assert result.returncode == 0, result.stderr
    hosts = last_json(result)["files"][0]["hosts"]
    assert (hosts["a1111"]["group"], hosts["forge"]["group"]) == (a1111_group, forge_group)
    assert hosts["a1111"]["verdict"] == hosts["forge"]["verdict"] == "all"
    assert (hosts["a1111"]["modules"], hosts["forge"]["tensors"]) == (2, 6)


def verdicts(tmp_path, **change: torch.Tensor) -> dict:
    """Of a file of two modules, some tensors of the second of which are others."""
    tensors = {key: torch.zeros(shape) for key, shape in file_of({FIRST: LINEAR}).items()}
    tensors |= {f"{SECOND}.{part}": torch.zeros(shape) for part, shape in LINEAR.items()}
    tensors |= {f"{SECOND}.lora_{part}.weight": tensor for part, tensor in change.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    result = run_cli(["inspect", tmp_path / "a.safetensors", "--norms", "--json", "--quiet"])
    assert result.returncode == 0, result.stderr
    return last_json(result)["files"][0]


def test_modules_whose_ranks_disagree_are_not_counted_as_loaded(tmp_path):
    file = verdicts(tmp_path, up=torch.zeros(4, 3))
    assert list(file["broken"]["modules"]) == [SECOND]
    assert (file["hosts"]["a1111"]["verdict"], file["hosts"]["a1111"]["modules"]) == ("part", 1)
    assert "3 × parts that do not fit together" in file["hosts"]["a1111"]["why"]
    assert file["hosts"]["forge"]["verdict"] == "refused"
    assert SECOND in file["hosts"]["forge"]["why"]


def test_whole_numbers_for_factors_are_damage(tmp_path):
    file = verdicts(tmp_path, up=torch.zeros(4, 2, dtype=torch.int8), down=torch.zeros(2, 4, dtype=torch.int8))
    assert "stored as I8" in file["broken"]["modules"][SECOND]
    assert file["families"] == {"LoRA": 1}
    for host in file["hosts"].values():
        assert (host["verdict"], host["modules"], host["tensors"], host["ignored"]) == ("part", 1, 3, 3)
        assert "whole numbers of a quantisation" in host["why"]


def test_where_all_modules_are_damaged_the_reason_is_not_their_names(tmp_path):
    tensors = {f"{FIRST}.lora_up.weight": torch.zeros(4, 3), f"{FIRST}.lora_down.weight": torch.zeros(2, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    result = run_cli(["inspect", tmp_path / "a.safetensors", "--json", "--quiet"])
    host = last_json(result)["files"][0]["hosts"]["a1111"]
    assert (host["verdict"], host["why"]) == ("nothing", "2 × parts that do not fit together")
