"""combine across dialects, layers that one file fuses and another keeps apart, and what is no weight of a layer."""

from __future__ import annotations

import json

import pytest
import torch
from combine_files import combine, missed, read, refused, save_base, some, summed, worst, write
from convert_files import convert, deltas, layers, load, lora, save, texts
from convert_files import some as some_layers
from models import base_weights
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
HALF = 2**-11


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def apart(width: int, parts: dict[str, int], seed: int, same_down: bool = False) -> tuple[Tensors, torch.Tensor]:
    """(a LoRA of diffusers' spelling with a module for each part of a fused layer, the change of the whole layer)."""
    tensors, rows = {}, []
    for i, (name, height) in enumerate(parts.items()):
        up, down = random(height, 2, seed=seed + i), random(2, width, seed=seed + (0 if same_down else 10 + i))
        tensors |= {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}
        rows.append(up.double() @ down.double())
    return tensors, torch.cat(rows)


@pytest.mark.parametrize("same_down", [False, True])
@pytest.mark.parametrize(
    ("family", "key", "parent", "names"),
    [
        ("flux_dev", "lora_unet_double_blocks_0_img_attn_qkv", "transformer_blocks.0.attn", ("to_q", "to_k", "to_v")),
        ("flux_dev", "lora_unet_single_blocks_0_linear1", "single_transformer_blocks.0",
         ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        ("sd35_medium", "lora_unet_joint_blocks_1_context_block_attn_qkv", "transformer_blocks.1.attn",
         ("add_q_proj", "add_k_proj", "add_v_proj")),
    ],
)  # fmt: skip
def test_q_k_and_v_apart_and_fused(tmp_path, family, key, parent, names, same_down):
    """Without a checkpoint, at another width than the model's own: rows count in proportion."""
    divisor = 96 if family == "flux_dev" else 32
    one = lora(family, divisor=divisor, only=lambda m: m.name == key)
    n, k = len(one[f"{key}.lora_up.weight"]), one[f"{key}.lora_down.weight"].shape[1]
    heights = dict.fromkeys((f"{parent}.{name}" for name in names[:3]), k)
    if len(names) > 3:
        heights[f"{parent}.{names[3]}"] = n - 3 * k
    other, change = apart(k, heights, 3, same_down)
    a, b = save(tmp_path / "a.safetensors", one, {}), save(tmp_path / "b.safetensors", other, {})
    combine("--lora", a, 0.7, "--lora", b, -0.3, "--out", tmp_path / "o", "--dtype", "fp32")
    goal = {key: 0.7 * deltas(one)[key] - 0.3 * change}
    assert missed(read(tmp_path / "o.safetensors"), goal) < 1e-6
    made = load(tmp_path / "o.safetensors")
    # one down for all parts is one LoRA of their rank; others stand side by side
    assert len(made[f"{key}.lora_down.weight"]) == 4 + (2 if same_down else 2 * len(names))
    # only q and v: rows that no part has stay as they are
    some_parts = {name: t for name, t in other.items() if f".{names[1]}." not in name}
    save(tmp_path / "c.safetensors", some_parts, {})
    combine("--lora", a, "--lora", tmp_path / "c.safetensors", "--out", tmp_path / "p", "--dtype", "fp32")
    partial = change.clone()
    partial[k : 2 * k] = 0
    assert missed(read(tmp_path / "p.safetensors"), {key: deltas(one)[key] + partial}) < 1e-6


def test_a_layer_whose_halves_diffusers_swaps(tmp_path):
    key = "lora_unet_final_layer_adaLN_modulation_1"
    one = lora("flux_dev", divisor=96, only=lambda m: m.name == key)
    n, k = len(one[f"{key}.lora_up.weight"]), one[f"{key}.lora_down.weight"].shape[1]
    other, change = apart(k, {"norm_out.linear": n}, 5)
    a, b = save(tmp_path / "a.safetensors", one, {}), save(tmp_path / "b.safetensors", other, {})
    combine("--lora", a, 2, "--lora", b, "--out", tmp_path / "o", "--dtype", "fp32")
    turned = torch.cat((change[n // 2 :], change[: n // 2]))
    assert missed(read(tmp_path / "o.safetensors"), {key: 2 * deltas(one)[key] + turned}) < 1e-6


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux_dev"])
def test_every_dialect_names_the_same_layers(tmp_path, family):
    more = {"divisor": 96} if family == "flux_dev" else {}
    only = some_layers if family != "flux_dev" else lambda m: "blocks.1." in m.path
    parts = [lora(family, only=only, seed=i, rank=lambda j, i=i: 2 + i, **more) for i in range(3)]
    paths = [save(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate(parts)]
    for to in ("diffusers", "peft"):
        convert(paths[0], tmp_path / to, "--to", to)
    combine(
        "--lora", paths[0], 0.5, "--lora", tmp_path / "diffusers.safetensors", -1.5, "--lora", tmp_path / "peft", 0.25,
        "--lora", paths[1], 2, "--lora", paths[2], 0.1, 3, "--out", tmp_path / "o", "--dtype", "fp32",
    )  # fmt: skip
    first, second, third = map(deltas, parts)
    goal = {
        name: -0.75 * first[name] + 2 * second[name] + (3 if name.startswith("lora_te") else 0.1) * third[name]
        for name in first
    }
    assert missed(read(tmp_path / "o.safetensors"), goal) < 1e-6


def test_the_first_directions_of_a_lora(tmp_path):
    """dyn as AUTOMATIC1111 takes it: so many columns, at the scale of all."""
    tensors = lora("sd15", only=some_layers)
    save(tmp_path / "a.safetensors", tensors, {})
    combine("--prompt", "<lora:a:1:1:3>", "--lora-dir", tmp_path, "--out", tmp_path / "o", "--dtype", "fp32")
    cut = {}
    for key, tensor in tensors.items():
        up, down = "lora_up" in key, "lora_down" in key
        cut[key] = tensor[:, :3] if up else tensor[:3] if down else tensor * 3 / 4  # alpha: the scale is alpha / 4
    assert missed(read(tmp_path / "o.safetensors"), deltas(cut)) < 1e-6


def test_dyn_where_it_has_no_meaning(tmp_path):
    base = save_base(tmp_path / "base.safetensors")
    for kind in ("loha", "dora_input"):
        write(tmp_path / f"{kind}.safetensors", base, kind, only=some)
    loha = write(tmp_path / "loha.safetensors", base, "loha", only=some)
    given = ["--lora-dir", tmp_path, "--out", tmp_path / "o", "--dtype", "fp32"]
    answer = combine("--prompt", "<lora:loha:1:1:2>", *given)
    assert any("dyn=2 leaves" in warning for warning in answer["warnings"])
    assert missed(read(tmp_path / "o.safetensors"), summed(base, [(loha, 1, 1)])) < 1e-6
    error = refused("--prompt", "<lora:dora_input:1:1:2>", "--lora-dir", tmp_path, "--out", tmp_path / "p",
                    "--checkpoint", base)  # fmt: skip
    assert "dyn=2" in error["what"] and "Resize" in error["hint"]


# --- norms, biases, embeddings --------------------------------------------------------------------------------------

NORM = "lora_unet_mid_block_attentions_0_norm"
LAYER = "lora_unet_mid_block_attentions_0_proj_in"


def test_norms_and_biases_are_summed(tmp_path):
    one = lora("sd15", only=lambda m: m.name == LAYER)
    n = len(one[f"{LAYER}.lora_up.weight"])
    one |= {f"{NORM}.w_norm": random(n, seed=1), f"{NORM}.b_norm": random(n, seed=2)}
    one |= {f"{LAYER}.diff_b": random(n, seed=3)}
    two = {f"{NORM}.w_norm": random(n, seed=4), f"{NORM}.b_norm": random(n, seed=5),
           "lora_unet_mid_block_attentions_0_proj_out.diff_b": random(n, seed=6)}  # fmt: skip
    three = {f"{NORM}.diff": random(n, seed=7), f"{LAYER}.lora_up.weight": random(n, 2, 1, 1, seed=8),
             f"{LAYER}.lora_down.weight": random(2, n, 1, 1, seed=9), f"{LAYER}.lora_up.bias": random(n, seed=10),
             f"{LAYER}.alpha": torch.tensor(1.0)}  # fmt: skip
    weights, files = (0.5, -2.0, 3.0), (one, two, three)
    for i, tensors in enumerate(files):
        save(tmp_path / f"{i}.safetensors", tensors, {})
    flagged = [x for i, w in enumerate(weights) for x in ("--lora", tmp_path / f"{i}.safetensors", w)]
    answer = combine(*flagged, "--out", tmp_path / "o", "--dtype", "fp32")
    made = load_file(tmp_path / "o.safetensors")

    def close(key: str, goal: torch.Tensor) -> None:
        torch.testing.assert_close(made[key], goal, rtol=1e-6, atol=1e-7)

    close(f"{NORM}.w_norm", 0.5 * one[f"{NORM}.w_norm"] - 2 * two[f"{NORM}.w_norm"] + 3 * three[f"{NORM}.diff"])
    close(f"{NORM}.b_norm", 0.5 * one[f"{NORM}.b_norm"] - 2 * two[f"{NORM}.b_norm"])
    close(f"{LAYER}.diff_b", 0.5 * one[f"{LAYER}.diff_b"] + 3 * 0.5 * three[f"{LAYER}.lora_up.bias"])
    # a bias alone A1111 would refuse: it stands beside a LoRA of zeros
    alone = "lora_unet_mid_block_attentions_0_proj_out"
    close(f"{alone}.diff_b", -2 * two[f"{alone}.diff_b"])
    assert not made[f"{alone}.lora_up.weight"].any() and not made[f"{alone}.lora_down.weight"].any()
    assert answer["made"]["norms"] == 1
    again = combine(*flagged, "--out", tmp_path / "p", "--rank", 1)
    assert again["made"]["norms"] == 1 and f"{LAYER}.diff_b" in load_file(tmp_path / "p.safetensors")


def test_a_norms_scale_alone_gets_a_shift_that_hosts_ask_for(tmp_path):
    save(tmp_path / "a.safetensors", {f"{NORM}.w_norm": random(20, seed=1)} | lora("sd15", only=some_layers), {})
    combine("--lora", tmp_path / "a.safetensors", "--out", tmp_path / "o")
    made = load_file(tmp_path / "o.safetensors")
    assert not made[f"{NORM}.b_norm"].any() and made[f"{NORM}.w_norm"].any()


def test_bundled_embeddings_come_along_and_the_first_of_a_name_wins(tmp_path):
    for i, words in enumerate((("cat", "dog"), ("dog", "bird"))):
        tensors = {f"bundle_emb.{word}.string_to_param.*": random(2, 24, seed=i + len(word)) for word in words}
        save(tmp_path / f"{i}.safetensors", tensors | lora("sd15", only=some_layers, seed=i), {})
    first, second = (load_file(tmp_path / f"{i}.safetensors") for i in (0, 1))
    flagged = ["--lora", tmp_path / "0.safetensors", 0.5, "--lora", tmp_path / "1.safetensors"]
    answer = combine(*flagged, "--out", tmp_path / "o")
    made = load_file(tmp_path / "o.safetensors")
    for word, own in (("cat", first), ("dog", first), ("bird", second)):
        key = f"bundle_emb.{word}.string_to_param.*"
        assert torch.equal(made[key], own[key])
    assert answer["embeddings"] == 3
    assert any("1 bundled embeddings have a name that is taken" in warning for warning in answer["warnings"])
    convert(tmp_path / "0.safetensors", tmp_path / "folder", "--to", "peft")
    combine("--lora", tmp_path / "folder", "--out", tmp_path / "p")
    assert torch.equal(load_file(tmp_path / "p.safetensors")["bundle_emb.cat.string_to_param.*"],
                       first["bundle_emb.cat.string_to_param.*"])  # fmt: skip


def test_whole_matrices_stay_whole_without_a_rank(tmp_path):
    base = save_base(tmp_path / "base.safetensors")
    one = write(tmp_path / "a.safetensors", base, "full", 0, some)
    two = write(tmp_path / "b.safetensors", base, "lora", 1)
    answer = combine("--lora", one.path, 0.5, "--lora", two.path, "--out", tmp_path / "o")
    made = load_file(tmp_path / "o.safetensors")
    assert {key.partition(".")[0] for key in made if key.endswith(".diff")} == one.changes.keys()
    assert worst(read(tmp_path / "o.safetensors"), summed(base, [(one, 0.5, 0.5), (two, 1, 1)])) < 2 * HALF
    assert any("kept as whole matrices" in warning for warning in answer["warnings"])
    said = texts(tmp_path / "o.safetensors")
    assert said["ss_network_module"] == "lycoris.kohya"
    combine("--lora", one.path, "--out", tmp_path / "p")
    assert "ss_network_dim" not in texts(tmp_path / "p.safetensors")


def test_a_widened_first_layer_keeps_the_channels_that_its_loras_know(tmp_path):
    """In-painting models have nine channels, and A1111 pads what is for four."""
    weights = base_weights("sd15")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    weights[key] = torch.randn(len(weights[key]), 9, 3, 3)
    save_file(weights, tmp_path / "inpainting.safetensors")
    parts = [lora("sd15", only=lambda m: m.path == "input_blocks.0.0", seed=i) for i in range(2)]
    for i, tensors in enumerate(parts):
        save(tmp_path / f"{i}.safetensors", tensors, {})
    combine("--lora", tmp_path / "0.safetensors", "--lora", tmp_path / "1.safetensors", "--checkpoint",
            tmp_path / "inpainting.safetensors", "--out", tmp_path / "o", "--dtype", "fp32")  # fmt: skip
    one, two = map(deltas, parts)
    assert missed(read(tmp_path / "o.safetensors"), {name: one[name] + two[name] for name in one}) < 1e-6
    (name,) = one
    assert load_file(tmp_path / "o.safetensors")[f"{name}.lora_down.weight"].shape[1:] == (4, 3, 3)


# --- what the file says of itself -----------------------------------------------------------------------------------


def test_what_the_parents_say_alike_is_kept(tmp_path):
    common = {"ss_base_model_version": "sd_v1", "ss_v2": "False", "modelspec.prediction_type": "v"}
    own = [{"ss_clip_skip": "2", "ss_sd_model_name": "anime.ckpt"}, {"ss_clip_skip": "1"}]
    for i, said in enumerate(own):
        said |= {"ss_output_name": f"called {i}", "sshs_model_hash": f"{i}" * 64, "ss_tag_frequency": "{}"}
        save(tmp_path / f"{i}.safetensors", lora("sd15", only=some_layers, seed=i), common | said)
    flagged = ["--lora", tmp_path / "0.safetensors", 0.7, "--lora", tmp_path / "1.safetensors", -0.3, 0.1, "--blocks",
               "OUT=0.5"]  # fmt: skip
    combine(*flagged, "--out", tmp_path / "mix")
    said = texts(tmp_path / "mix.safetensors")
    assert {key: said[key] for key in common} == common
    assert said["ss_output_name"] == said["modelspec.title"] == "mix"
    assert said["ss_sd_model_name"] == "anime.ckpt" and "ss_clip_skip" not in said and "ss_tag_frequency" not in said
    assert said["modelspec.merged_from"] == "0.safetensors, 1.safetensors"
    recipe = json.loads(said["hypermerge"])
    assert recipe["job"] == "combine" and recipe["parameters"]["method"] == "linear"
    assert [p["name"] for p in recipe["parents"]] == ["0.safetensors", "1.safetensors"]
    assert [p["weight"] for p in recipe["parents"]] == [0.7, -0.3] and recipe["parents"][1]["te_weight"] == 0.1
    assert recipe["parents"][0]["blocks"] == "OUT=0.5" and recipe["parents"][0]["sshs_model_hash"] == "0" * 64
    assert 0 < recipe["relative_error"] < 1e-3
    assert not any(str(tmp_path) in text for text in said.values())
    combine("--prompt", "<lora:mix:2>", "--lora-dir", tmp_path, "--out", tmp_path / "again")
    again = json.loads(texts(tmp_path / "again.safetensors")["hypermerge"])
    assert again["parents"][0]["recipe"]["job"] == "combine"
    assert str(tmp_path) not in json.dumps(again)


def test_a_file_that_says_it_is_for_another_model_is_not_believed(tmp_path):
    said = {"ss_base_model_version": "sd_v1", "ss_v2": "False"}
    save(tmp_path / "a.safetensors", lora("sdxl", only=some_layers), said)
    combine("--lora", tmp_path / "a.safetensors", "--out", tmp_path / "o")
    assert texts(tmp_path / "o.safetensors")["ss_base_model_version"].startswith("sdxl_")


def test_modules_without_a_layer_are_told_of(tmp_path):
    tensors = lora("sd15", only=some_layers) | {
        "lora_unet_no_such_layer.lora_up.weight": torch.ones(4, 1),
        "lora_unet_no_such_layer.lora_down.weight": torch.ones(1, 4),
        "strange": torch.ones(3),
    }
    save(tmp_path / "a.safetensors", tensors, {})
    answer = combine("--lora", tmp_path / "a.safetensors", "--out", tmp_path / "o")
    assert answer["unreachable"] == 2 and answer["unmatched_keys"] == ["lora_unet_no_such_layer"]
    assert sum("left out" in warning for warning in answer["warnings"]) == 2
    assert answer["modules"] == len([m for m in layers("sd15") if some_layers(m) and m.kind != "norm"])
