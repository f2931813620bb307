"""merge: what stands beside weights: norms, biases, embeddings, LoRAs in other dialects, sources in other forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ATTENTION, CONVOLUTION, NORM, base_weights, cast, last_json, run_cli, save_checkpoint
from safetensors.torch import load_file, save_file

TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CONV1 = "lora_unet_down_blocks_1_resnets_0_conv1"
NORM1 = "lora_unet_down_blocks_1_resnets_0_norm1"
FC1 = "lora_te_text_model_encoder_layers_0_mlp_fc1"
LAST_NORM = "lora_te1_text_model_final_layer_norm"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("m") / "m.safetensors", cast(base_weights("sd15"), torch.float32))


def merge(checkpoint: Path, tensors: dict, folder: Path, *more) -> tuple[dict, dict[str, torch.Tensor]]:
    save_file(tensors, folder / "l.safetensors")
    result = run_cli(["merge", "--quiet", "--json", "--checkpoint", checkpoint, "--lora", folder / "l.safetensors",
                      *more, "--out", folder / "o"])  # fmt: skip
    assert result.returncode == 0, result.stderr
    return last_json(result), load_file(folder / "o.safetensors")


def changed(before: dict, after: dict) -> set[str]:
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_norms_and_biases(checkpoint, tmp_path):
    before = load_file(checkpoint)
    width, conv = before[f"{NORM}.weight"].shape[0], before[CONVOLUTION].shape
    norm, shift, bias, diff = (torch.randn(size) for size in (width, width, conv[0], conv))
    text = before["cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias"]
    last = torch.randn(2, before["cond_stage_model.transformer.text_model.final_layer_norm.weight"].shape[0])
    tensors = {
        f"{NORM1}.w_norm": norm, f"{NORM1}.b_norm": shift, f"{CONV1}.diff": diff, f"{CONV1}.diff_b": bias,
        f"{LAST_NORM}.w_norm": last[0].clone(), f"{LAST_NORM}.b_norm": last[1].clone(),
        f"{FC1}.diff_b": torch.ones_like(text),
    }  # fmt: skip
    report, after = merge(checkpoint, tensors, tmp_path, 0.5, 2)
    expected = {
        f"{NORM}.weight": (norm, 0.5), f"{NORM}.bias": (shift, 0.5),
        CONVOLUTION: (diff, 0.5), CONVOLUTION.replace("weight", "bias"): (bias, 0.5),
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": (last[0], 2),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": (last[1], 2),
        "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias": (torch.ones_like(text), 2),
    }  # fmt: skip
    assert changed(before, after) == expected.keys()
    for key, (change, strength) in expected.items():
        exact = before[key].double() + strength * change.double()
        assert torch.equal(after[key], exact.float())
    assert report["modules"] == 4 and report["changed_tensors"] == 7


def test_a_bias_without_a_place_is_told(checkpoint, tmp_path):
    n, k = load_file(checkpoint)[ATTENTION].shape  # to_q has no bias
    tensors = {f"{TO_Q}.lora_up.weight": torch.ones(n, 1), f"{TO_Q}.lora_down.weight": torch.ones(1, k),
               f"{TO_Q}.diff_b": torch.ones(n)}  # fmt: skip
    report, after = merge(checkpoint, tensors, tmp_path)
    assert changed(load_file(checkpoint), after) == {ATTENTION}
    assert any("bias" in warning for warning in report["warnings"])


def test_bundled_embeddings_are_told(checkpoint, tmp_path):
    n, k = load_file(checkpoint)[ATTENTION].shape
    tensors = {f"{TO_Q}.lora_up.weight": torch.ones(n, 1), f"{TO_Q}.lora_down.weight": torch.ones(1, k),
               "bundle_emb.word.string_to_param.*": torch.zeros(2, 768)}  # fmt: skip
    report, _ = merge(checkpoint, tensors, tmp_path)
    assert any("embedding" in warning for warning in report["warnings"])


def test_every_spelling_of_one_layer_gives_the_same_file(checkpoint, tmp_path):
    n, k = load_file(checkpoint)[ATTENTION].shape
    up, down = torch.randn(n, 2), torch.randn(2, k)
    dotted = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    spellings = [
        {f"{TO_Q}.lora_up.weight": up, f"{TO_Q}.lora_down.weight": down},
        {f"unet.{dotted}.to_q.lora_B.weight": up, f"unet.{dotted}.to_q.lora_A.weight": down},
        {f"unet.{dotted}.to_q.lora.up.weight": up, f"unet.{dotted}.to_q.lora.down.weight": down},
        {f"unet.{dotted}.processor.to_q_lora.up.weight": up, f"unet.{dotted}.processor.to_q_lora.down.weight": down},
        {f"base_model.model.{dotted}.to_q.lora_B.weight": up, f"base_model.model.{dotted}.to_q.lora_A.weight": down},
    ]
    results = []
    for number, tensors in enumerate(spellings):
        folder = tmp_path / str(number)
        folder.mkdir()
        results.append(merge(checkpoint, tensors, folder, 0.3)[1])
    assert all(torch.equal(result[ATTENTION], results[0][ATTENTION]) for result in results)
    assert changed(load_file(checkpoint), results[-1]) == {ATTENTION}


def test_what_a_pickle_holds_besides_is_told(checkpoint, tmp_path):
    weights = {key: tensor.clone() for key, tensor in load_file(checkpoint).items()}
    torch.save({"state_dict": weights, "global_step": 5}, tmp_path / "m.ckpt")
    n, k = weights[ATTENTION].shape
    tensors = {f"{TO_Q}.lora_up.weight": torch.ones(n, 1), f"{TO_Q}.lora_down.weight": torch.ones(1, k)}
    report, _ = merge(tmp_path / "m.ckpt", tensors, tmp_path)
    assert any("global_step" in warning for warning in report["warnings"])
