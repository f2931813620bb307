"""What inspect says of adapter files, against what was written into them, and dense float64 products."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from adapter_samples import ALPHA, RANK, SAMPLES, Dice
from dialect_files import ARCHITECTURES, DIALECTS, checkpoint_weights, kohya, layers, save_distinct, save_lora
from models import ATTENTION, CONVOLUTION, NORM, SD1_TEXT, last_json, run_cli
from safetensors.torch import load_file, save_file

# layers of SD1 as kohya files call them -> the tensor, its block, its component
LAYERS = {
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (ATTENTION, "IN04", "unet"),
    "lora_unet_down_blocks_1_resnets_0_conv1": (CONVOLUTION, "IN04", "unet"),
    "lora_unet_mid_block_attentions_0_proj_in": ("model.diffusion_model.middle_block.1.proj_in.weight", "MID", "unet"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (SD1_TEXT, "L00", "te"),
}
NEEDS_WEIGHT = ("ia3", "dora_input", "dora_output", "glora", "oft")


def inspect(*arguments) -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    result = run_cli(["inspect", *arguments, "--json", "--quiet"])
    assert result.returncode == 0, result.stderr
    return last_json(result)


def only(*arguments) -> dict:
    """The facts of a single file."""
    (file,) = inspect(*arguments)["files"]
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """family -> (checkpoint, its layers)"""
    folder = tmp_path_factory.mktemp("inspect")
    checkpoints = {family: save_distinct(folder, family) for family in ARCHITECTURES}
    return {family: (path, layers(family, path)) for family, path in checkpoints.items()}


def save_family(path, family: str, seed: int = 0):
    """A kohya file of one family over LAYERS -> name -> what it changes, W -> ΔW in float64."""
    weights, dice, tensors, changes = checkpoint_weights("sd15"), Dice(seed), {}, {}
    for name, (key, _, _) in LAYERS.items():
        parts, changes[name] = SAMPLES[family](tuple(weights[key].shape), dice)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, path)
    return changes


def deltas(changes: dict) -> dict[str, np.ndarray]:
    """name -> ΔW (n, k), dense float64."""
    weights = checkpoint_weights("sd15")
    return {
        name: change(weights[LAYERS[name][0]].double()).flatten(1).numpy() for name, change in changes.items()
    }  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_lora_is_understood_in_every_dialect(made, tmp_path, family, dialect):
    _, all_layers = made[family]
    write, spoken = DIALECTS[dialect]
    written = [layer for layer in all_layers if write(layer)]
    if dialect in ("bare", "lycoris"):  # says nothing of which text encoder
        written = [layer for layer in written if layer.module.component != "te2"]
    file = only(save_lora(tmp_path / "lora.safetensors", written, write))
    assert file["dialect"] == spoken
    assert file["families"] == {"LoRA": len(written)}
    assert file["ranks"] == {str(RANK): len(written)}
    assert file["scales"] == {"1": len(written)}
    assert file["recognised_share"] == 1
    assert file["unmatched"]["count"] == file["unknown"]["count"] == file["broken"]["count"] == 0
    if dialect != "attention processors":  # these layers are the same in two architectures
        assert file["architecture"] == ARCHITECTURES[family]
        expected = Counter(layer.module.component for layer in written)
        assert {component: part["modules"] for component, part in file["components"].items()} == expected
        blocks = Counter(layer.module.block for layer in written if layer.module.component == "unet")
        assert file["components"]["unet"]["blocks"] == blocks


@pytest.mark.parametrize("family", SAMPLES)
def test_norms_and_spectra_are_those_of_the_dense_change(made, tmp_path, family):
    checkpoint, _ = made["sd15"]
    expected = deltas(save_family(tmp_path / "a.safetensors", family))
    measured = only(tmp_path / "a.safetensors", "--spectra", "--base", checkpoint)["measured"]
    assert measured["left_out"] == {}
    norms = {name: np.linalg.norm(delta) for name, delta in expected.items()}
    assert measured["norm"] == pytest.approx(np.sqrt(sum(n**2 for n in norms.values())), rel=1e-5)
    assert {row["module"]: row["norm"] for row in measured["strongest"]} == pytest.approx(norms, rel=1e-5)
    for row in measured["strongest"]:
        S = np.linalg.svd(expected[row["module"]], compute_uv=False)
        energy = np.cumsum(S**2) / np.sum(S**2)
        assert row["largest"] == pytest.approx(S[0], rel=1e-5)
        assert row["stable_rank"] == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-5)
        assert energy[row["rank_for_90"] - 1] >= 0.9 * (1 - 1e-6)
        assert row["rank_for_90"] == 1 or energy[row["rank_for_90"] - 2] < 0.9 * (1 + 1e-6)
        assert (row["component"], row["block"]) == (LAYERS[row["module"]][2], LAYERS[row["module"]][1])
    inside = [n for name, n in norms.items() if LAYERS[name][1] == "IN04"]
    assert measured["components"]["unet"]["blocks"]["IN04"] == {
        "norm": pytest.approx(np.sqrt(sum(n**2 for n in inside)), rel=1e-5), "modules": len(inside),
    }  # fmt: skip


def test_the_curve_is_made_of_quantiles_over_layers(made, tmp_path):
    checkpoint, _ = made["sd15"]
    expected = deltas(save_family(tmp_path / "a.safetensors", "lora"))
    spectrum = only(tmp_path / "a.safetensors", "--spectra", "--base", checkpoint)["measured"]["components"]["unet"][
        "spectrum"
    ]
    inside = [np.linalg.svd(d, compute_uv=False) for name, d in expected.items() if LAYERS[name][2] == "unet"]
    assert spectrum["layers"] == len(inside)
    assert [point["index"] for point in spectrum["curve"]] == list(range(1, RANK + 1))
    for point in spectrum["curve"]:
        shares = [S[point["index"] - 1] / S[0] for S in inside]
        assert point["median"] == pytest.approx(np.median(shares), rel=1e-5)
        assert point["low"] == pytest.approx(np.quantile(shares, 0.1), rel=1e-5)
        assert point["high"] == pytest.approx(np.quantile(shares, 0.9), rel=1e-5)


@pytest.mark.parametrize("family", ["lora", "locon_cp", *NEEDS_WEIGHT])
def test_without_the_base_only_what_depends_on_it_is_left_out(tmp_path, family):
    expected = deltas(save_family(tmp_path / "a.safetensors", family))
    measured = only(tmp_path / "a.safetensors", "--norms")["measured"]
    if family not in NEEDS_WEIGHT:
        assert measured["norm"] == pytest.approx(np.sqrt(sum((d**2).sum() for d in expected.values())), rel=1e-5)
        assert measured["left_out"] == {}
    elif family == "glora":  # a convolution's sample is a plain LoRA
        assert (measured["modules"], sum(measured["left_out"].values())) == (1, 3)
    else:
        assert (measured["modules"], sum(measured["left_out"].values())) == (0, 4)


@pytest.mark.parametrize("family", SAMPLES)
def test_families_ranks_and_alphas_are_counted(tmp_path, family):
    save_family(tmp_path / "a.safetensors", family)
    file = only(tmp_path / "a.safetensors")
    plain = {"locon_cp": "LoRA", "loha_cp": "LoHa", "lokr_full": "LoKr", "dora_input": "DoRA", "dora_output": "DoRA"}
    title = plain.get(family) or {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full", "ia3": "IA3",
                                  "glora": "GLoRA", "oft": "OFT"}[family]  # fmt: skip
    assert file["families"][title] >= 3
    assert file["modules"] == 4
    ranked = sum(file["ranks"].values())
    assert file["ranks"] in ({}, {str(RANK): ranked})
    assert file["alphas"] in ({}, {f"{ALPHA:g}": ranked})
    assert file["scales"] in ({}, {f"{ALPHA / RANK:.6g}": ranked})
    axis = {"dora_input": {"input channels": 4}, "dora_output": {"output rows": 4}}.get(family, {})
    assert file["dora"] == axis


def test_norms_biases_embeddings_and_strangers_are_told_apart(made, tmp_path):
    save_family(tmp_path / "a.safetensors", "lora")
    tensors = load_file(tmp_path / "a.safetensors")
    first = next(iter(LAYERS))
    norm = "lora_unet_down_blocks_1_resnets_0_norm1"
    width = checkpoint_weights("sd15")[f"{NORM}.weight"].shape[0]
    tensors |= {f"{norm}.w_norm": torch.full((width,), 2.0), f"{norm}.b_norm": torch.full((width,), 3.0)}
    tensors[f"{first}.diff_b"] = torch.ones(len(tensors[f"{first}.lora_up.weight"]))
    tensors["bundle_emb.token.string_to_param.*"] = torch.ones(2, 24)
    tensors["what.is.this"] = torch.ones(3)
    tensors |= {f"lora_unet_nowhere.{part}": torch.ones(2, 2) for part in ("lora_up.weight", "lora_down.weight")}
    tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"] = torch.ones(2, 2)  # half a module
    save_file(tensors, tmp_path / "b.safetensors")
    file = only(tmp_path / "b.safetensors", "--norms", "--base", made["sd15"][0])
    assert file["families"] == {"LoRA": 5, "norm": 1}
    assert file["biases"] == 1
    assert file["embeddings"] == {"token": [[2, 24]]}
    assert file["unknown"]["names"] == ["what.is.this"]
    assert file["unmatched"]["names"] == ["lora_unet_nowhere"]
    assert "lora_down.weight" in file["broken"]["modules"]["lora_unet_mid_block_resnets_0_conv1"]
    row = next(row for row in file["measured"]["strongest"] if row["module"] == norm)
    assert row["norm"] == pytest.approx(2 * width**0.5, rel=1e-6)
    biases = 9 * width + len(tensors[f"{first}.diff_b"])
    assert file["measured"]["bias_norm"] == pytest.approx(biases**0.5, rel=1e-6)


def test_nan_and_inf_are_named_and_left_out(tmp_path):
    expected = deltas(save_family(tmp_path / "a.safetensors", "lora"))
    tensors = load_file(tmp_path / "a.safetensors")
    bad = list(LAYERS)[1]
    tensors[f"{bad}.lora_up.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "b.safetensors")
    measured = only(tmp_path / "b.safetensors", "--spectra")["measured"]
    assert measured["nonfinite"] == {"count": 1, "names": [bad]}
    rest = [(d**2).sum() for name, d in expected.items() if name != bad]
    assert measured["norm"] == pytest.approx(np.sqrt(sum(rest)), rel=1e-5)


def test_a_lora_of_no_known_architecture_is_described_all_the_same(tmp_path):
    tensors = {}
    for i in range(4):
        tensors |= {f"lora_unet_strange_{i}.lora_up.weight": torch.ones(4, 2),
                    f"lora_unet_strange_{i}.lora_down.weight": torch.ones(2, 6)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    file = only(tmp_path / "a.safetensors", "--norms")
    assert file["architecture"] is None
    assert file["hosts"] == {}
    assert file["families"] == {"LoRA": 4}
    assert file["unmatched"]["count"] == 4
    assert file["measured"]["norm"] == pytest.approx((4 * 24 * 4) ** 0.5, rel=1e-6)


def test_a_peft_folder_takes_its_alpha_from_the_configuration(made, tmp_path):
    _, all_layers = made["sd15"]
    folder = tmp_path / "adapter"
    folder.mkdir()
    unet = [layer for layer in all_layers if layer.module.component == "unet"]
    tensors = {}
    for layer in unet:
        name = "base_model.model." + layer.diffusers.removeprefix("unet.")
        tensors |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["to_q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    file = only(folder)
    assert (file["dialect"], file["format"]) == ("peft", "folder")
    assert file["alphas"] == {"6": len(unet)}
    assert file["scales"] == {"2": len(unet)}
    assert {host["verdict"] for host in file["hosts"].values()} == {"not listed"}


def test_metadata_is_told_and_long_texts_are_cut(made, tmp_path):
    _, all_layers = made["sd15"]
    metadata = {"ss_output_name": "my style", "ss_tag_frequency": "x" * 100_000}
    metadata |= {f"key{i:03d}": "y" for i in range(300)}
    file = only(save_lora(tmp_path / "a.safetensors", all_layers, kohya, **metadata))
    assert file["metadata"]["ss_output_name"] == "my style"
    assert len(file["metadata"]["ss_tag_frequency"]) < 3000
    assert file["metadata_cut"] == ["ss_tag_frequency"]
    assert len(file["metadata"]) + file["metadata_left_out"] == len(metadata)
    assert (file["alias"], file["prompt"]) == ("my style", "<lora:my style:1>")
