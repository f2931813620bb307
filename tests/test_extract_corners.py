"""Corners of extraction: few changed layers, partly changed attention, mixed formats, NaN beside finite norms."""

from __future__ import annotations

import pytest
import torch
from models import (
    ATTENTION,
    NORM,
    base_weights,
    cast,
    extract,
    extract_arguments,
    only_keys,
    rank_change,
    run_cli,
    save_checkpoint,
    save_pair,
    tuned_weights,
)
from safetensors.torch import load_file

from lib_hypermerge.algebra import svd


def full_change(only, strength: float = 0.1):
    return rank_change(10_000, strength, only)


@pytest.fixture
def always_randomised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow layers would all be exact; at full width most are not."""
    monkeypatch.setattr(svd, "krylov_size", lambda r: (max(1, min(r, 8)), max(2, -(-3 * r // (2 * max(1, min(r, 8)))))))


@pytest.mark.parametrize("method", ["auto", "randomised"])
def test_a_size_is_met_when_few_layers_changed(tmp_path, always_randomised, method):
    base = base_weights("sd15", 8)
    tuned = tuned_weights(base, full_change(lambda key: ".attn2.to_k." in key or ".attn2.to_v." in key))
    files = save_pair(tmp_path, base, tuned)
    for target in (0.3, 0.8):
        answer = extract(
            *files, tmp_path / f"o{target}", "--rank-rule", "size", "--rank-target", target, "--method", method
        )
        assert 0.98 * target * 2**20 <= answer["outputs"][0]["bytes"] <= target * 2**20
        assert answer["warnings"] == []
        assert len(answer["curve"]) > 3


def test_a_size_that_cannot_be_filled_says_so(tmp_path):
    base = base_weights()
    files = save_pair(tmp_path, base, tuned_weights(base, full_change(only_keys(ATTENTION))))
    answer = extract(*files, tmp_path / "o", "--rank-rule", "size", "--rank-target", 5)
    assert any("below the target size" in warning for warning in answer["warnings"])
    assert answer["relative_error"] < 1e-3


@pytest.mark.parametrize("target", [0.7, 0.9])
def test_a_size_counts_the_zero_modules_of_partly_changed_attention(tmp_path, target):
    base = base_weights("sd21", 8)
    files = save_pair(
        tmp_path, base, tuned_weights(base, full_change(lambda key: key.endswith("attn.out_proj.weight")))
    )
    answer = extract(*files, tmp_path / "o", "--rank-rule", "size", "--rank-target", target)
    assert 0.98 * target * 2**20 <= answer["outputs"][0]["bytes"] <= target * 2**20


def test_a_size_below_the_least_names_the_least(tmp_path, known_pair):
    run = run_cli(extract_arguments(*known_pair("sd15"), tmp_path / "o", "--rank-rule", "size", "--rank-target", 0.05))
    assert run.returncode == 2
    assert "MiB is too small" in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("of_base", "of_tuned"),
    [(torch.float32, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16),
     (torch.float16, torch.float8_e4m3fn)],
)  # fmt: skip
def test_layers_that_differ_only_by_their_formats_rounding_are_identical(tmp_path, of_base, of_tuned):
    exact = base_weights()
    coarse = min(of_base, of_tuned, key=lambda dtype: torch.finfo(dtype).bits)
    fine = max(of_base, of_tuned, key=lambda dtype: torch.finfo(dtype).bits)
    base = cast(cast(exact, fine), of_base)
    tuned = cast(cast(tuned_weights(cast(exact, fine), lambda *_: None), fine), of_tuned)
    tuned[ATTENTION] = (base[ATTENTION].float() * 1.5).to(of_tuned)
    files = (
        save_checkpoint(tmp_path / "base.safetensors", base),
        save_checkpoint(tmp_path / "tuned.safetensors", tuned),
    )
    answer = extract(*files, tmp_path / "o", "--rank", 2)
    assert coarse in (of_base, of_tuned)
    assert (answer["modules"], answer["skipped_because"]["identical"]) == (1, 353)
    assert answer["vae_differs"] is False
    assert answer["unreachable"] == 0
    assert any("number formats" in warning for warning in answer["warnings"])


def norm_pair(tmp_path, weight: float, bias: float):
    base = base_weights()
    tuned = tuned_weights(base, rank_change(2, only=only_keys(ATTENTION)))
    tuned[NORM + ".weight"] = base[NORM + ".weight"] + weight
    tuned[NORM + ".bias"] = base[NORM + ".bias"] + bias
    return save_pair(tmp_path, base, tuned)


def test_a_norm_with_a_nan_in_either_part_is_left_out(tmp_path):
    files = norm_pair(tmp_path, 0.5, float("nan"))
    answer = extract(*files, tmp_path / "o", "--rank", 2, "--norms", "--skip-nonfinite")
    stored = load_file(tmp_path / "o.safetensors")
    assert len(stored) == 3
    assert all(tensor.isfinite().all() for tensor in stored.values())
    assert answer["skipped_because"]["nonfinite"] == 1


def test_a_norm_that_overflows_the_format_fails(tmp_path):
    files = norm_pair(tmp_path, 1e6, 0.0)
    arguments = extract_arguments(*files, tmp_path / "o", "--rank", 2, "--norms")
    run = run_cli(arguments)
    assert run.returncode == 1
    assert "too large for float16" in run.stderr
    assert not (tmp_path / "o.safetensors").exists()
    assert run_cli([*arguments, "--dtype", "fp32"]).returncode == 0


def test_norms_alone_make_a_file_if_asked_for(tmp_path):
    base = base_weights()
    tuned = dict(base)
    tuned[NORM + ".weight"] = base[NORM + ".weight"] + 0.5
    files = save_pair(tmp_path, base, tuned)
    refused = run_cli(extract_arguments(*files, tmp_path / "o"))
    assert refused.returncode == 2
    assert "normalisation" in refused.stderr
    answer = extract(*files, tmp_path / "o", "--norms")
    assert (answer["modules"], answer["uncarried_share"]) == (0, 0)
    assert {name.rsplit(".")[-1] for name in load_file(tmp_path / "o.safetensors")} == {"w_norm", "b_norm"}


def test_a_convolution_rank_bounds_other_rules(tmp_path, known_pair):
    extract(*known_pair("sd15"), tmp_path / "o", "--rank-rule", "energy", "--rank-target", 1, "--conv-rank", 1)
    stored = load_file(tmp_path / "o.safetensors")
    convolutions = [t for name, t in stored.items() if name.endswith("lora_down.weight") and t.shape[2:] == (3, 3)]
    assert {t.shape[0] for t in convolutions} == {1}
    assert any(t.shape[0] > 1 for name, t in stored.items() if name.endswith("lora_down.weight"))


def test_markers_that_no_lora_carries_are_told(tmp_path):
    base = base_weights()
    tuned = tuned_weights(base, rank_change(2, only=only_keys(ATTENTION)))
    tuned["v_pred"] = torch.zeros(0)
    answer = extract(*save_pair(tmp_path, base, tuned), tmp_path / "o", "--rank", 2)
    assert any("v-prediction" in warning for warning in answer["warnings"])


def test_the_forecast_knows_that_some_rules_take_longer(tmp_path, known_pair):
    def forecast(*flags):
        return extract(*known_pair("sd15"), tmp_path / "o", "--dry-run", *flags)

    plain, cumulative = forecast(), forecast("--rank-rule", "cumulative", "--rank-target", 0.5)
    assert cumulative["expected_bytes"] is None
    assert plain["expected_bytes"] < cumulative["most_bytes"]
    assert plain["expected_memory"] > 100 << 20
    assert plain["unreachable"] == 2  # the embeddings
    assert plain["warnings"] == []
