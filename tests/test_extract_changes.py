"""Extract looks at every changed tensor by itself: what it keeps, skips, warns of and cannot reach."""

import pytest
import torch
from models import (
    ATTENTION,
    CONVOLUTION,
    NORM,
    SD1_TEXT,
    UNET,
    base_weights,
    extract,
    is_vae,
    lora_deltas,
    lora_ranks,
    only_keys,
    rank_change,
    reachable,
    relative_error,
    save_checkpoint,
    save_pair,
    true_deltas,
    tuned_weights,
)
from safetensors.torch import load_file


def change_some(folder, keys, family="sd15", strength=0.1, rank=2):
    base = base_weights(family)
    tuned = tuned_weights(base, rank_change(rank, strength, only_keys(*keys)))
    return base, tuned, save_pair(folder, base, tuned)


def test_identical_tensors_are_skipped_and_counted(tmp_path):
    _, _, files = change_some(tmp_path, [ATTENTION, CONVOLUTION, SD1_TEXT])
    answer = extract(*files, tmp_path / "o")
    assert answer["modules"] == 3
    assert answer["skipped"] == answer["skipped_because"]["identical"] == len(true_deltas(*files)) - 3
    assert len(lora_ranks(tmp_path / "o.safetensors")) == 3


def test_a_small_text_encoder_change_is_kept(tmp_path):
    base = base_weights("sd15")
    tuned = tuned_weights(base, rank_change(2, 0.1, lambda key: key.startswith(UNET)))
    tuned = tuned_weights(tuned, rank_change(2, 1e-4, lambda key: not key.startswith(UNET)))
    files = save_pair(tmp_path, base, tuned)
    extract(*files, tmp_path / "o", "--rank", 4)
    expected, stored = true_deltas(*files), lora_deltas(tmp_path / "o.safetensors")
    text = {name: delta for name, delta in stored.items() if name.startswith("lora_te_")}
    assert len(text) == sum(name.startswith("lora_te_") for name in expected)
    assert relative_error(expected, text) < 5e-3


@pytest.mark.parametrize(
    ("family", "key", "prefix"),
    [
        ("sd21", "cond_stage_model.model.transformer.resblocks.3.attn.in_proj_weight", "lora_te"),
        ("sdxl", "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight", "lora_te2"),
    ],
)
def test_a_fused_attention_is_written_whole(tmp_path, family, key, prefix):
    """A1111 applies its four parts together or not at all, so unchanged ones are there as zeros."""
    base = base_weights(family)
    rows = len(base[key]) // 3
    tuned = dict(base)
    tuned[key] = base[key].clone()
    tuned[key][:rows] += torch.randn(rows, 2) @ torch.randn(2, base[key].shape[1])
    files = save_pair(tmp_path, base, tuned)
    extract(*files, tmp_path / "o", "--rank", 4)
    stored, expected = lora_deltas(tmp_path / "o.safetensors"), true_deltas(*files)
    parts = {
        p: f"{prefix}_text_model_encoder_layers_3_self_attn_{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    }
    assert stored.keys() == set(parts.values())
    assert relative_error(expected, {parts["q_proj"]: stored[parts["q_proj"]]}) < 1e-3
    for part in ("k_proj", "v_proj", "out_proj"):
        assert stored[parts[part]].shape == expected[parts[part]].shape
        assert not stored[parts[part]].any()


def test_a_vae_that_differs_is_warned_of(tmp_path):
    base, tuned, _ = change_some(tmp_path, [ATTENTION])
    tuned = {key: weight + 0.01 if is_vae(key) else weight for key, weight in tuned.items()}
    answer = extract(*save_pair(tmp_path, base, tuned), tmp_path / "o")
    assert answer["vae_differs"] is True
    assert any("VAE" in warning for warning in answer["warnings"])
    assert answer["modules"] == 1


def change_beside(tmp_path):
    """A pair in which one layer, its bias, a norm and an embedding changed."""
    base, tuned, _ = change_some(tmp_path, [CONVOLUTION])
    generator = torch.Generator().manual_seed(5)
    embedding = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    keys = (CONVOLUTION.replace("weight", "bias"), NORM + ".weight", NORM + ".bias", embedding)
    for key in keys:
        tuned[key] = base[key] + 0.01 * torch.randn(base[key].shape, generator=generator)
    return base, tuned, save_pair(tmp_path, base, tuned), keys


def test_what_no_lora_reaches_is_named_and_measured(tmp_path):
    base, tuned, files, keys = change_beside(tmp_path)
    answer = extract(*files, tmp_path / "o")
    assert answer["unreachable"] == 1
    assert answer["unreachable_tensors"] == ["te.embeddings.token_embedding"]
    assert answer["not_asked_for"] == {"norms": 2, "biases": 1}
    left = sum(float((tuned[k].double() - base[k].double()).square().sum()) for k in keys)
    whole = left + float((tuned[CONVOLUTION].double() - base[CONVOLUTION].double()).square().sum())
    assert answer["uncarried_share"] == pytest.approx(left / whole, rel=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_norms_and_biases_are_written_as_they_are(tmp_path, dtype):
    base, tuned, files, keys = change_beside(tmp_path)
    answer = extract(*files, tmp_path / "o", "--norms", "--biases", "--dtype", dtype)
    stored = load_file(tmp_path / "o.safetensors")
    convolution = next(name for name, key, _ in reachable(files[1]) if key == CONVOLUTION)
    norm = convolution.removesuffix("conv1") + "norm1"
    names = (f"{convolution}.diff_b", f"{norm}.w_norm", f"{norm}.b_norm")
    for name, key in zip(names, keys, strict=False):
        assert torch.equal(stored[name], (tuned[key] - base[key]).to(stored[name].dtype)), name
    assert {n for n in stored if n.rsplit(".", 1)[1] in ("diff_b", "w_norm", "b_norm")} == set(names)
    assert answer["unreachable"] == 1


def test_a_checkpoint_without_vae_and_text_encoder_says_what_is_left_out(tmp_path, known_pair):
    base, tuned = known_pair("sd15")
    unet = {key: weight for key, weight in load_file(tuned).items() if key.startswith(UNET)}
    answer = extract(base, save_checkpoint(tmp_path / "unet.safetensors", unet), tmp_path / "o", "--rank", 1)
    assert set(answer["components"]) == {"unet"}
    assert any(warning.startswith("te:") for warning in answer["warnings"])
