"""Layers that one side fuses: split LoRAs for Flux joined, whole ones cut; text encoders; foreign spellings."""

import json

import pytest
import torch
from convert_files import convert, deltas, diffusers_names, layers, load, lora, refusal, same_bits, save, some, texts
from models import base_weights, save_checkpoint
from safetensors.torch import save_file
from test_adapter_file import COUNTED, numbered_lora

FUSED = "lora_unet_double_blocks_3_img_attn_qkv"
SINGLE = "lora_unet_single_blocks_5_linear1"
WIDTH = 96  # of narrow Flux
FLUX = {"ss_base_model_version": "flux1"}  # at this width SD3's names and sizes are the same


def split_lora(parts: dict[str, int], seed: int = 0, rank: int = 2, alike: bool = False) -> dict[str, torch.Tensor]:
    """A diffusers file with a LoRA for each of these paths → rows."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, WIDTH, generator=generator).half()
    out = {}
    for path, rows in parts.items():
        own = down.clone() if alike else torch.randn(rank, WIDTH, generator=generator).half()
        out[f"transformer.{path}.lora_A.weight"] = own
        out[f"transformer.{path}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).half().T.contiguous().T
    return {k: t.contiguous() for k, t in out.items()}


ATTENTION = {f"transformer_blocks.3.attn.{n}": WIDTH for n in ("to_q", "to_k", "to_v")}
BLOCK = {
    **{f"single_transformer_blocks.5.attn.{n}": WIDTH for n in ("to_q", "to_k", "to_v")},
    "single_transformer_blocks.5.proj_mlp": 4 * WIDTH,
}


def whole(tensors: dict, parts: dict[str, int]) -> torch.Tensor:
    """The changes of all parts, one below the other."""
    deltas = []
    for path, rows in parts.items():
        key = f"transformer.{path}.lora_B.weight"
        found = key in tensors
        down = tensors.get(key.replace("lora_B", "lora_A"))
        deltas.append(tensors[key].double() @ down.double() if found else torch.zeros(rows, WIDTH).double())
    return torch.cat(deltas)


@pytest.mark.parametrize(("parts", "name"), [(ATTENTION, FUSED), (BLOCK, SINGLE)])
@pytest.mark.parametrize("alike", [True, False])
def test_apart_in_diffusers_one_in_kohya(tmp_path, parts, name, alike):
    tensors = split_lora(parts, alike=alike)
    answer = convert(save(tmp_path / "a.safetensors", tensors, FLUX), tmp_path / "b")
    stored = load(tmp_path / "b.safetensors")
    made = deltas(stored)
    assert list(made) == [name]
    assert torch.allclose(made[name], whole(tensors, parts), rtol=1e-6, atol=1e-9)
    assert len(stored[f"{name}.lora_down.weight"]) == (2 if alike else 2 * len(parts))
    assert answer["joined"] == {"exactly" if alike else "by adding ranks": 1}
    assert len(answer["warnings"]) == (0 if alike else 1)


@pytest.mark.parametrize("missing", list(ATTENTION))
def test_rows_that_no_lora_is_for_stay_as_they_are(tmp_path, missing):
    tensors = {k: t for k, t in split_lora(ATTENTION).items() if missing not in k}
    convert(save(tmp_path / "a.safetensors", tensors, FLUX), tmp_path / "b")
    made = deltas(load(tmp_path / "b.safetensors"))[FUSED]
    assert torch.allclose(made, whole(tensors, ATTENTION), rtol=1e-6, atol=1e-9)


def test_halves_that_diffusers_swaps_are_swapped_back(tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    before = lora("flux_dev", only=lambda m: m.path == "final_layer.adaLN_modulation.1" or m.path == "img_in")
    assert f"{name}.lora_up.weight" in before
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    up = load(tmp_path / "b.safetensors")["transformer.norm_out.linear.lora_B.weight"]
    half = len(up) // 2
    own = before[f"{name}.lora_up.weight"] / 2  # alpha 2, rank 4
    assert torch.equal(up, torch.cat((own[half:], own[:half])))
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_magnitudes_of_output_rows_are_cut_and_joined_with_them(tmp_path, to):
    before = lora("flux_dev", only=lambda m: m.path in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"))
    ups = {k: t for k, t in before.items() if k.endswith("lora_up.weight")}
    before |= {k.replace("lora_up.weight", "dora_scale"): t.float().norm(dim=1, keepdim=True) for k, t in ups.items()}
    convert(save(tmp_path / "a.safetensors", before, FLUX), tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)


@pytest.mark.parametrize("more", [["--to", "diffusers"], ["--to", "peft"], []])
def test_what_does_not_lie_row_by_row_is_neither_cut_nor_joined(tmp_path, more):
    """LoHa of a whole qkv for diffusers, or of q, k and v apart for kohya."""
    parts = {f"hada_w{i}_{x}": torch.ones(*((3 * WIDTH, 2) if x == "a" else (2, WIDTH))) for i in (1, 2) for x in "ab"}
    if more:
        tensors = {f"{FUSED}.{part}": t for part, t in parts.items()}
    else:
        apart = {part: t[:WIDTH].clone() for part, t in parts.items()}
        tensors = {f"transformer.{path}.{part}": t.clone() for path in ATTENTION for part, t in apart.items()}
    error = refusal(save(tmp_path / "a.safetensors", tensors, FLUX), tmp_path / "b", *more)
    assert error["code"] == "bad_request" and "family lora" in error["hint"]


def test_sd2s_last_text_layer_is_left_out_and_counted(tmp_path):
    before = lora("sd21", only=lambda m: m.component == "te")
    answer = convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    assert answer["left_out"] == {"text layer 23": 6}
    told = "6 modules of text layer 23, which diffusers' SD2 text encoder does not have and AUTOMATIC1111 never runs"
    assert any(warning.startswith(f"Left out: {told}, such as lora_te_") for warning in answer["warnings"])
    assert not any("layers.23." in key for key in load(tmp_path / "b.safetensors"))


def test_a_dotted_spelling_of_the_checkpoints_own_becomes_kohyas(tmp_path):
    """ComfyUI's and BFL's `diffusion_model.` names, lora_A and lora_B, an alpha beside them."""
    module = next(m for m in layers("flux_dev") if m.path == "double_blocks.0.img_attn.qkv")
    n, k = module.matrix_shape
    down, up = torch.randn(3, k), torch.randn(n, 3)
    name = f"diffusion_model.{module.path}"
    more = {
        f"diffusion_model.double_blocks.{i}.img_mlp.0.lora_{x}.weight": torch.ones(2, 2) for i in (1, 2) for x in "AB"
    }
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(6.0), **more},
              tmp_path / "a.safetensors")  # fmt: skip
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    stored = load(tmp_path / "b.safetensors")
    assert torch.equal(stored[f"{module.name}.lora_down.weight"], down)
    assert float(stored[f"{module.name}.alpha"]) == 6


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_spelling_of_kohyas_that_is_not_the_usual_comes_back(tmp_path, to):
    """The last text norm has no LoRA, but OFT's prefix and a lone te1 for SD1 do occur."""
    before = lora("sd15", only=some)
    before = {k.replace("lora_te_", "lora_te1_"): t for k, t in before.items()}
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), before)


def test_a_checkpoint_beside_a_lora_names_its_base(tmp_path):
    base = save_checkpoint(tmp_path / "base.safetensors", base_weights("sd15"))
    convert(save(tmp_path / "a.safetensors", lora("sd15", only=some), {}), tmp_path / "b", "--checkpoint", base)
    assert texts(tmp_path / "b.safetensors")["ss_sd_model_name"] == "base.safetensors"
    wrong = save_checkpoint(tmp_path / "wrong.safetensors", base_weights("sdxl"))
    error = refusal(tmp_path / "a.safetensors", tmp_path / "c", "--checkpoint", wrong)
    assert error["code"] == "wrong_model"


def test_names_of_all_layers_are_unique_in_every_dialect():
    for family in ("sd15", "sd21", "sdxl", "flux_dev"):
        names = [n for m in layers(family) for n, _, _ in diffusers_names(family, m)]
        assert len(names) == len(set(names))


def test_numbered_layers_get_names(tmp_path):
    """cloneofsimo's files, their tokens and all; what they say of themselves in their own words is left behind."""
    tensors, metadata, expected = {}, {"ss_session_id": "7"}, {}
    for component, counted in COUNTED.items():
        pairs, theirs = numbered_lora("sd15", component, counted)
        short = {"unet": "unet", "text_encoder": "te"}[component]
        expected |= {f"lora_{short}_{name.replace('.', '_')}": delta.flatten(1) for name, delta in theirs.items()}
        metadata[component] = json.dumps(counted)
        for index, (up, down) in enumerate(pairs):
            tensors |= {f"{component}:{index}:up": up, f"{component}:{index}:down": down}
            metadata[f"{component}:{index}:rank"] = "2"
    tensors["<s1>"], metadata["<s1>"] = torch.ones(24), "<embed>"
    base = save_checkpoint(tmp_path / "base.safetensors", base_weights("sd15"))
    convert(save(tmp_path / "a.safetensors", tensors, metadata), tmp_path / "b", "--checkpoint", base)
    stored = load(tmp_path / "b.safetensors")
    assert torch.equal(stored.pop("bundle_emb.s1.string_to_param.*"), torch.ones(1, 24))
    made = deltas(stored)
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[name], delta) for name, delta in expected.items())
    after = texts(tmp_path / "b.safetensors")
    assert after["ss_session_id"] == "7" and not {"unet", "text_encoder", "unet:0:rank", "<s1>"} & after.keys()


def test_only_parts_that_the_lora_has_are_written_and_counted(tmp_path):
    split = split_lora({"transformer_blocks.3.attn.to_q": WIDTH, "transformer_blocks.3.attn.add_k_proj": WIDTH})
    report = convert(save(tmp_path / "a.safetensors", split, FLUX), tmp_path / "b", "--to", "peft")
    assert report["modules"] == 2 and report["written_per_component"] == {"unet": 2}
    assert len(load(tmp_path / "b" / "transformer" / "adapter_model.safetensors")) == 4
