"""Rank rules against numpy's singular values of the difference, and the size rule against uniform ranks."""

import bisect

import numpy as np
import pytest
import torch
from models import (
    base_weights,
    extract,
    is_vae,
    load_file,
    lora_deltas,
    lora_ranks,
    relative_error,
    save_pair,
    true_deltas,
    tuned_weights,
)


def uneven(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Changes whose size, number of directions and decay differ from layer to layer."""
    if weight.dim() < 2 or weight.dtype == torch.int64 or is_vae(key) or "embedding" in key:
        return None
    n, k = weight.flatten(1).shape
    power, strength, directions = torch.rand(3, generator=generator).tolist()
    count = 1 + int(directions * (min(n, k) - 1))
    S = torch.arange(1, count + 1) ** -(0.3 + 2 * power)
    U, V = torch.randn(n, count, generator=generator), torch.randn(k, count, generator=generator)
    scale = 10 ** (-3 + 2 * strength) * weight.norm() / (S.norm() * (n * k) ** 0.5)
    return (scale * (U * S) @ V.T).reshape(weight.shape)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base = base_weights("sd15", 32)
    return save_pair(tmp_path_factory.mktemp("uneven"), base, tuned_weights(base, uneven))


@pytest.fixture(scope="module")
def expected(pair) -> dict[str, torch.Tensor]:
    return true_deltas(*pair)


@pytest.fixture(scope="module")
def spectra(expected) -> dict[str, np.ndarray]:
    return {name: np.linalg.svd(d.flatten(1).numpy(), compute_uv=False) for name, d in expected.items()}


def ranks_by(pair, out, rule: str, target: float, *flags) -> dict[str, int]:
    extract(*pair, out, "--rank-rule", rule, "--rank-target", target, *flags)
    return lora_ranks(out.with_suffix(".safetensors"))


def ratio(S: np.ndarray, target: float) -> int:
    return int((target * S[0] <= S).sum())


def energy(S: np.ndarray, target: float) -> int:
    return int((np.cumsum(S**2) < target * (S**2).sum()).sum()) + 1


def cumulative(S: np.ndarray, target: float) -> int:
    return int((np.cumsum(S) < target * S.sum()).sum()) + 1


@pytest.mark.parametrize("method", ["auto", "exact", "randomised"])
@pytest.mark.parametrize(
    ("rule", "oracle", "target"),
    [("ratio", ratio, 0.3), ("ratio", ratio, 0.02), ("energy", energy, 0.6), ("energy", energy, 0.95),
     ("cumulative", cumulative, 0.5), ("cumulative", cumulative, 0.9)],
)  # fmt: skip
def test_a_rule_over_each_layer(tmp_path, pair, spectra, rule, oracle, target, method):
    ranks = ranks_by(pair, tmp_path / "o", rule, target, "--method", method)
    assert ranks.keys() == spectra.keys()
    tolerance = 1 + (0.05 if method == "randomised" else 1e-3)  # of the singular values, at the rule's threshold
    lower, upper = target / tolerance, min(target * tolerance, 1 - 1e-9)
    for name, S in spectra.items():
        assert min(oracle(S, lower), oracle(S, upper)) <= ranks[name] <= max(oracle(S, lower), oracle(S, upper)), name
    assert len(set(ranks.values())) > 4


def test_a_ratio_above_1_is_largest_to_smallest(tmp_path, pair):
    assert ranks_by(pair, tmp_path / "a", "ratio", 4) == ranks_by(pair, tmp_path / "b", "ratio", 0.25)


@pytest.mark.parametrize(("rule", "target"), [("ratio", 0.1), ("energy", 0.95), ("cumulative", 0.8)])
def test_least_and_largest_rank_bound_a_rule(tmp_path, pair, spectra, rule, target):
    free = ranks_by(pair, tmp_path / "free", rule, target)
    bounded = ranks_by(pair, tmp_path / "bounded", rule, target, "--min-rank", 3, "--max-rank", 5)
    assert min(free.values()) < 3 < 5 < max(free.values())
    for name, S in spectra.items():
        directions = int((1e-5 * S[0] < S).sum())  # a least rank is not filled with noise
        assert bounded[name] >= min(3, directions), name
        assert bounded[name] <= min(5, len(S)), name
        if 3 <= free[name] <= 5:
            assert bounded[name] == free[name], name


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("target", [0.45, 0.7])
def test_the_size_rule_meets_its_target_and_beats_uniform_ranks(tmp_path, pair, expected, target, dtype):
    answer = extract(*pair, tmp_path / "o", "--rank-rule", "size", "--rank-target", target, "--dtype", dtype)
    size = (tmp_path / "o.safetensors").stat().st_size
    assert 0.98 * target * 2**20 <= size <= target * 2**20
    assert answer["outputs"][0]["bytes"] == size
    error = relative_error(expected, lora_deltas(tmp_path / "o.safetensors"))
    assert answer["relative_error"] == pytest.approx(error, rel=1e-3)
    assert answer["modules"] == len(expected)

    def uniform(rank: int) -> dict:
        return extract(*pair, tmp_path / "u", "--rank", rank, "--dtype", dtype, "--overwrite")

    fitting = bisect.bisect_right(range(1, 20), target * 2**20, key=lambda rank: uniform(rank)["outputs"][0]["bytes"])
    assert 1 <= fitting < 19
    assert error < 0.9 * uniform(fitting)["relative_error"]


def test_the_size_rule_keeps_to_least_and_largest_rank(tmp_path, pair):
    flags = ("--min-rank", 2, "--max-rank", 6)
    ranks = ranks_by(pair, tmp_path / "o", "size", 0.6, *flags)
    assert max(ranks.values()) == 6
    # a layer that has one direction only gets no second one
    assert min(ranks.values()) in (1, 2)
    assert sum(rank >= 2 for rank in ranks.values()) > 0.9 * len(ranks)


def test_a_size_beyond_all_ranks_is_told(tmp_path, pair):
    answer = extract(*pair, tmp_path / "o", "--rank-rule", "size", "--rank-target", 200)
    assert any("stays below the target size" in warning for warning in answer["warnings"])
    assert answer["relative_error"] < 1e-3


@pytest.mark.parametrize(
    ("identical", "flags", "target"), [("output_blocks", (), 0.4), ("no layer", ("--norms", "--biases"), 0.7)]
)
def test_the_size_rule_counts_norms_biases_and_identical_layers(tmp_path, pair, identical, flags, target):
    base, tuned = (load_file(path) for path in pair)
    generator = torch.Generator().manual_seed(3)
    other = {key: base[key] if identical in key else weight for key, weight in tuned.items()}
    for key, weight in base.items():
        if weight.dim() == 1 and weight.is_floating_point() and not is_vae(key):
            other[key] = weight + 0.01 * torch.randn(weight.shape, generator=generator)
    extract(*save_pair(tmp_path, base, other), tmp_path / "o", "--rank-rule", "size", "--rank-target", target, *flags)
    assert 0.98 * target * 2**20 <= (tmp_path / "o.safetensors").stat().st_size <= target * 2**20
