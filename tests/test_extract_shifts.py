"""Spectral shifts from a pair of checkpoints: those that made it, found again, and merged back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import (
    base_weights,
    extract,
    extract_arguments,
    is_vae,
    last_json,
    run_cli,
    save_pair,
    tuned_weights,
)
from safetensors import safe_open
from safetensors.torch import load_file

UNET = "model.diffusion_model."
LINEAR = UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"


def shifted(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """W' − W of shifts by a tenth of each singular value, about."""
    if weight.dim() < 2 or is_vae(key) or "embedding" in key or not weight.is_floating_point():
        return None
    matrix = weight.double().flatten(1).numpy()
    parts = np.split(matrix, 3) if key.endswith("in_proj_weight") else [matrix]  # q, k, v are layers of their own
    out = []
    for part in parts:
        U, S, Vh = np.linalg.svd(part, full_matrices=False)
        out.append((U * (0.1 * S * torch.randn(len(S), generator=generator).double().numpy())) @ Vh)
    return torch.from_numpy(np.concatenate(out)).float().reshape(weight.shape)


def expected(base: torch.Tensor, tuned: torch.Tensor) -> np.ndarray:
    """δ = diag(Uᵀ W' V) − σ."""
    U, S, Vh = np.linalg.svd(base.double().flatten(1).numpy(), full_matrices=False)
    return np.diag(U.T @ tuned.double().flatten(1).numpy() @ Vh.T) - S


@pytest.fixture(scope="module", params=["sd15", "sd21", "sdxl"])
def pair(request, tmp_path_factory):
    base = base_weights(request.param, 32)
    return save_pair(tmp_path_factory.mktemp(request.param), base, tuned_weights(base, shifted))


def test_the_shifts_that_made_the_tune_are_found_and_merged_back(pair, tmp_path):
    report = extract(*pair, tmp_path / "shifts", "--family", "svdiff", "--dtype", "fp32")
    assert report["relative_error"] < 1e-5
    assert report["unreachable"] == len(report["unreachable_tensors"]) <= 1  # open_clip's text projection
    assert report["prompt"] is None and report["not_asked_for"] == {}
    assert any("No WebUI" in warning for warning in report["warnings"])
    path, out = tmp_path / "shifts.safetensors", tmp_path / "merged.safetensors"
    result = run_cli(["merge", "--json", "--checkpoint", pair[0], "--lora", path, "--out", out, "--dtype", "fp32"])
    assert result.returncode == 0, result.stderr
    merged, base, tuned = load_file(out), load_file(pair[0]), load_file(pair[1])
    for key, weight in tuned.items():
        if key.endswith("text_projection"):
            continue
        assert (merged[key].double() - weight.double()).norm() <= 1e-5 * weight.double().norm(), key
    assert not torch.equal(merged[LINEAR], base[LINEAR])


def test_the_unets_own_file_is_svdiff_pytorchs(pair, tmp_path):
    """Bare diffusers paths, a vector each, and nothing that looks like a LoRA to a WebUI."""
    report = extract(*pair, tmp_path / "spectral_shifts", "--family", "svdiff", "--components", "unet")
    path = tmp_path / "spectral_shifts.safetensors"
    shifts, base, tuned = load_file(path), load_file(pair[0]), load_file(pair[1])
    assert len(shifts) == report["modules"]
    assert len(list(tmp_path.iterdir())) == 1 and path.stat().st_size < 1 << 18
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.delta"
    assert shifts[name].dtype == torch.float16
    np.testing.assert_allclose(shifts[name], expected(base[LINEAR], tuned[LINEAR]), rtol=2e-3, atol=1e-4)
    assert {tensor.ndim for tensor in shifts.values()} == {1}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert "hypermerge" in metadata and not any(name.startswith("ss_network") for name in metadata)


def test_what_shifts_cannot_reach_is_measured(tmp_path):
    """A change of the singular vectors too: the stated error is that of the file."""
    base = base_weights("sd15", 32)
    generator = torch.Generator().manual_seed(3)
    tuned = base | {LINEAR: base[LINEAR] + 0.1 * torch.randn(base[LINEAR].shape, generator=generator)}
    paths = save_pair(tmp_path, base, tuned)
    report = extract(*paths, tmp_path / "shifts", "--family", "svdiff", "--components", "unet", "--dtype", "bf16")
    (shifts,) = load_file(tmp_path / "shifts.safetensors").values()
    U, S, Vh = np.linalg.svd(base[LINEAR].double().numpy(), full_matrices=False)
    change = (tuned[LINEAR].double() - base[LINEAR].double()).numpy()
    made = (U * (np.maximum(S + shifts.double().numpy(), 0) - S)) @ Vh
    missed = np.linalg.norm(change - made) / np.linalg.norm(change)
    assert report["relative_error"] == pytest.approx(missed, rel=1e-5)
    arguments = extract_arguments(*paths, tmp_path / "again", "--family", "svdiff", "--components", "unet")
    text = run_cli([argument for argument in arguments if argument != "--json"])
    assert "error with no rank above" not in text.stdout and "1 spectral" in text.stdout


@pytest.mark.parametrize("flags", [("--norms",), ("--biases",), ("--rank-rule", "energy", "--rank-target", 0.9)])
def test_what_has_no_place_in_such_a_file_is_refused(pair, tmp_path, flags):
    result = run_cli([*extract_arguments(*pair, tmp_path / "shifts", "--family", "svdiff", *flags), "--json"])
    assert result.returncode == 2 and "Spectral shifts" in last_json(result)["error"]["what"]
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_fuses_layers_is_refused(tmp_path):
    base = base_weights("flux_dev", 32)
    paths = save_pair(tmp_path, base, {key: 1.1 * weight for key, weight in base.items()})
    result = run_cli([*extract_arguments(*paths, tmp_path / "shifts", "--family", "svdiff"), "--json"])
    assert result.returncode == 2 and "Flux" in last_json(result)["error"]["what"]
