"""Convert between dialects: there and back no bit of a LoRA is lost, and what cannot be said is counted."""

import json

import pytest
import torch
from convert_files import convert, deltas, layers, load, lora, same_bits, save, some, texts
from safetensors.torch import load_file

FAMILIES = ("sd15", "sd21", "sdxl", "flux_dev", "sd35_medium")
SD2_LAST = "lora_te_text_model_encoder_layers_23_"


def said(family: str, tensors: dict) -> dict:
    """Without SD2's last text layer, which diffusers' models lack."""
    return {k: t for k, t in tensors.items() if family != "sd21" or not k.startswith(SD2_LAST)}


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_every_bit_is_the_same(tmp_path, family, to):
    before = lora(family, alpha=lambda i: (2.0, 4.0, 1.0, 0.5)[i % 4])
    source = save(tmp_path / "a.safetensors", before)
    there = convert(source, tmp_path / "b", "--to", to)
    middle = tmp_path / ("b" if to == "peft" else "b.safetensors")
    back = convert(middle, tmp_path / "c", "--to", "kohya")
    assert same_bits(load(tmp_path / "c.safetensors"), said(family, before))
    assert there["inexact"] == back["inexact"] == 0
    assert back["modules"] == len(said(family, before)) // 3
    assert there["from"] == "kohya" and back["from"] == to


@pytest.mark.parametrize("to", ["diffusers", "peft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha_dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_every_number_format_comes_back(tmp_path, to, dtype, alpha_dtype):
    odd = dtype != torch.float32 or to == "peft"  # 3/4 folds into 16-bit numbers by way of float32
    before = lora(
        "sd15", only=some, dtype=dtype, alpha_dtype=alpha_dtype, alpha=lambda i: (3.0 if odd else 2.0, 8.0, None)[i % 3]
    )
    source = save(tmp_path / "a.safetensors", before)
    answer = convert(source, tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)
    assert answer["inexact"] == 0


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_mixed_ranks_come_back(tmp_path, to):
    before = lora("sd15", only=some, rank=lambda i: 1 + i % 5, alpha=lambda i: float(1 + i % 3))
    source = save(tmp_path / "a.safetensors", before)
    answer = convert(source, tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)
    assert (answer["padded"] > 0) == (to == "diffusers")


def test_a_scale_that_float32_cannot_hold_exactly_is_told_of(tmp_path):
    before = lora("sd15", only=some, dtype=torch.float32, rank=lambda i: 3, alpha=lambda i: 2.0)
    source = save(tmp_path / "a.safetensors", before)
    answer = convert(source, tmp_path / "b", "--to", "diffusers")
    assert answer["inexact"] == len(before) // 3
    assert any("last bit" in warning for warning in answer["warnings"])
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    after = load(tmp_path / "c.safetensors")
    assert same_bits({k: t for k, t in after.items() if "lora_up" not in k},
                     {k: t for k, t in before.items() if "lora_up" not in k})  # fmt: skip
    for key, tensor in after.items():
        assert (tensor - before[key]).abs().max() <= 2**-23 * before[key].abs().max()


def test_numbers_too_small_for_the_scale_are_kept_too(tmp_path):
    """In fp16 6e-8 · 1/4 is zero: such a file becomes float32 rather than lose them."""
    before = {k: (t * 1e-5 if "lora_up" in k else t) for k, t in lora("sd15", only=some, alpha=lambda i: 1.0).items()}
    source = save(tmp_path / "a.safetensors", before)
    answer = convert(source, tmp_path / "b", "--to", "diffusers")
    assert any("float32" in warning for warning in answer["warnings"])
    assert {t.dtype for t in load(tmp_path / "b.safetensors").values()} == {torch.float32}
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)


def test_the_change_is_the_same_in_every_dialect(tmp_path):
    """diffusers' numbers by their own rule, scale 1, under names that this test makes itself."""
    family = "sd15"
    before = lora(family, alpha=lambda i: (3.0, 1.0)[i % 2])
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    stored, expected = load_file(tmp_path / "b.safetensors"), deltas(before)
    made = {}
    for key in stored:
        if key.endswith("lora_A.weight"):
            up = stored[key.replace("lora_A", "lora_B")].double().flatten(1)
            made[key.removesuffix(".lora_A.weight").replace(".", "_")] = up @ stored[key].double().flatten(1)
    assert len(made) == len(expected)
    for name, delta in expected.items():
        theirs = made[name.replace("lora_unet_", "unet_").replace("lora_te_", "text_encoder_")]
        assert torch.allclose(theirs, delta, rtol=1e-6, atol=1e-12), name


def test_kohya_to_kohya_carries_everything(tmp_path):
    before = lora("sd15", only=some) | {
        "lora_unet_mid_block_resnets_0_norm1.w_norm": torch.ones(40), "lora_unet_mid_block_resnets_0_norm1.b_norm":
        torch.ones(40), "lora_unet_nowhere.lora_up.weight": torch.ones(3, 2),
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 3), "bundle_emb.cat.string_to_param.*": torch.ones(2, 24),
    }  # fmt: skip
    answer = convert(save(tmp_path / "a.safetensors", before), tmp_path / "b")
    assert same_bits(load(tmp_path / "b.safetensors"), before)
    assert any("carried over as they are" in w for w in answer["warnings"])


def test_metadata_is_carried_and_names_what_is_new(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", only=some))
    convert(source, tmp_path / "b", "--to", "peft")
    convert(tmp_path / "b", tmp_path / "c")
    after = texts(tmp_path / "c.safetensors")
    kept = ("ss_base_model_version", "ss_tag_frequency", "modelspec.author", "ss_network_dim")
    assert {k: after[k] for k in kept} == {k: texts(source)[k] for k in kept}
    assert after["ss_output_name"] == after["modelspec.title"] == "c"
    assert after["sshs_model_hash"] != texts(source)["sshs_model_hash"]
    recipe = json.loads(after["hypermerge"])
    assert recipe["job"] == "convert" and recipe["parents"]["lora"]["name"] == "b"
    assert recipe["parents"]["lora"]["recipe"]["parents"]["lora"]["name"] == "a.safetensors"
    assert "restore" not in json.dumps(recipe)


def test_a_file_without_metadata_gets_what_webuis_need(tmp_path):
    convert(save(tmp_path / "a.safetensors", lora("sdxl", only=some), {}), tmp_path / "b", "--to", "diffusers")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    after = texts(tmp_path / "c.safetensors")
    assert after["ss_base_model_version"] == "sdxl_base_v1-0" and after["ss_network_dim"] == "4"
    assert after["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_what_a_dialect_cannot_say_is_counted_and_never_silent(tmp_path, to):
    norm = next(m for m in layers("sd15") if m.kind == "norm")
    before = lora("sd15", only=some) | {
        f"{norm.name}.w_norm": torch.ones(norm.weight.shape), f"{norm.name}.b_norm": torch.ones(norm.weight.shape),
        "lora_unet_mid_block_attentions_0_proj_in.diff_b": torch.ones(40), "odd.tensor": torch.ones(1),
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 24),
    }  # fmt: skip
    answer = convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", to)
    assert answer["left_out"]["norms"] == answer["left_out"]["biases"] == 1
    assert answer["left_out"]["no part of any module"] == 1
    assert sum(w.startswith("Left out") for w in answer["warnings"]) == (4 if to == "diffusers" else 3)
    if to == "peft":
        convert(tmp_path / "b", tmp_path / "c")
        assert torch.equal(load(tmp_path / "c.safetensors")["bundle_emb.cat.string_to_param.*"], torch.ones(2, 24))


def test_a_changed_file_is_not_restored_to_what_it_was(tmp_path):
    """The notes are about the numbers beside them: where these are others, the numbers count."""
    before = lora("sd15", only=some, alpha=lambda i: 1.0, rank=lambda i: 3)
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    stored = load(tmp_path / "b.safetensors")
    key = "unet.mid_block.attentions.0.proj_in.lora_B.weight"
    stored[key] = torch.randn_like(stored[key])
    save(tmp_path / "d.safetensors", stored, texts(tmp_path / "b.safetensors"))
    convert(tmp_path / "d.safetensors", tmp_path / "c")
    after = deltas(load(tmp_path / "c.safetensors"))["lora_unet_mid_block_attentions_0_proj_in"]
    down = stored[key.replace("lora_B", "lora_A")].double().flatten(1)
    assert torch.allclose(after, stored[key].double().flatten(1) @ down, rtol=1e-5, atol=1e-7)


def test_a_request_repeated_gives_the_same_bytes(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", only=some))
    for to in ("kohya", "diffusers", "peft"):
        first = convert(source, tmp_path / to, "--to", to)["outputs"]
        again = convert(source, tmp_path / to, "--to", to, "--overwrite", "--threads", 3)["outputs"]
        assert [o["sha256"] for o in first] == [o["sha256"] for o in again]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_number_formats(tmp_path, to, dtype):
    wanted = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    source = save(tmp_path / "a.safetensors", lora("sd15", only=some, dtype=torch.float32, alpha=lambda i: 3.0))
    for output in convert(source, tmp_path / "b", "--to", to, "--dtype", dtype)["outputs"]:
        stored = load(output["path"])
        assert {t.dtype for k, t in stored.items() if not k.endswith("alpha")} == {wanted}
        if to == "kohya":
            before = load(source)
            assert all(torch.equal(t, before[k].to(t.dtype)) for k, t in stored.items())


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_number_formats_that_differ_within_a_file_come_back(tmp_path, to):
    formats = (torch.float16, torch.bfloat16, torch.float32)
    before = lora("sd15", only=some, dtype=torch.float32)
    before = {k: t if "alpha" in k else t.to(formats[i % 3]) for i, (k, t) in enumerate(before.items())}
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)
