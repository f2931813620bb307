"""Extract to DoRA, LoHa, LoKr and to the best of them: files read by their definitions in float64, errors and gains
recomputed from the checkpoints, and each kind of change recognised."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from families_naive import dora as naive_dora
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from models import (
    ATTENTION,
    SD1_TEXT,
    base_weights,
    extract,
    extract_arguments,
    is_vae,
    last_json,
    only_keys,
    rank_change,
    reachable,
    relative_error,
    run_cli,
    save_pair,
    true_deltas,
    tuned_weights,
)
from safetensors import safe_open
from safetensors.torch import load_file
from test_families_independent import effective
from torch import nn

from lib_hypermerge.adapters import families
from lib_hypermerge.errors import Cancelled
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs import extract_costs
from lib_hypermerge.jobs.extract_spec import ExtractSpec
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import VERBS

RANK = 8
RIVALS = ("dora", "loha", "lokr")
Parts = dict[str, torch.Tensor]


def size_of(weight: torch.Tensor, change: torch.Tensor, strength: float) -> torch.Tensor:
    return strength * weight.norm() / change.norm() * change


def of_layers(change: Callable[[torch.Tensor, torch.Generator], torch.Tensor | None], strength: float):
    """A change of every matrix and convolution, of so much of its norm; None leaves the layer alone."""

    def made(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        if weight.dim() < 2 or weight.dtype == torch.int64 or is_vae(key) or "embedding" in key:
            return None
        delta = change(weight, generator)
        return None if delta is None else size_of(weight, delta, strength)

    return made


def rescaled(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Input channels longer or shorter, and something of rank 3."""
    low = rank_change(3)("weight", weight, generator)
    by_channel = torch.randn(1, weight.shape[1], *[1] * (weight.dim() - 2), generator=generator)
    assert low is not None
    return size_of(weight, weight * by_channel, 0.1) + size_of(weight, low, 0.1)


def kronecker(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    u, v = (4 if side % 4 == 0 and side > 4 else 1 for side in weight.shape[:2])
    w1 = torch.randn(u, v, *[1] * (weight.dim() - 2), generator=generator)
    w2 = torch.randn(weight.shape[0] // u, weight.shape[1] // v, *weight.shape[2:], generator=generator)
    return torch.kron(w1, w2)


def entrywise(weight: torch.Tensor, generator: torch.Generator, rank: int = RANK // 2) -> torch.Tensor:
    """A matrix of rank 4 times a positive one of rank 4."""
    n, k = weight.flatten(1).shape
    first = torch.randn(n, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    second = torch.rand(n, rank, generator=generator) ** 4 @ torch.rand(rank, k, generator=generator) ** 4
    return (first * second).reshape(weight.shape)


def noise(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(weight.shape, generator=generator)


CHANGES = {
    "dora": of_layers(rescaled, 0.1), "lokr": of_layers(kronecker, 0.1), "loha": of_layers(entrywise, 0.1),
    "lora": rank_change(RANK), "noise": of_layers(noise, 0.1),
}  # fmt: skip
# narrow enough to be quick, wide enough for the families to differ
TEXT = ("--components", "te", "--rank", RANK)
CONVOLUTIONS = ("--components", "unet", "--layers", "sampling,inout", "--rank", RANK)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind of change → (base, tuned)."""
    made: dict[str, tuple[Path, Path]] = {}
    base = base_weights("sd15", 16)

    def of(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            made[kind] = save_pair(tmp_path_factory.mktemp(kind), base, tuned_weights(base, CHANGES[kind]))
        return made[kind]

    return of


def modules(path: Path) -> dict[str, Parts]:
    """module → its tensors by part."""
    out: dict[str, Parts] = {}
    for key, tensor in load_file(path).items():
        name, _, part = key.partition(".")
        out.setdefault(name, {})[part] = tensor
    return out


def family_of(parts: Parts) -> str:
    marks = {"dora_scale": "dora", "lokr_w1": "lokr", "hada_w1_a": "loha", "lora_up.weight": "lora"}
    return next(family for mark, family in marks.items() if mark in parts)


def defined_change(parts: Parts, weight: torch.Tensor) -> torch.Tensor:
    """ΔW by the family's definition, in float64 numpy."""
    p = {name: tensor.double().numpy() for name, tensor in parts.items()}
    W = weight.double().numpy()
    if "lokr_w1" in p:
        if "lokr_w2" in p:
            w2, scale = p["lokr_w2"].reshape(len(p["lokr_w2"]), -1), 1.0
        else:
            w2, scale = p["lokr_w2_a"] @ p["lokr_w2_b"], p["alpha"] / len(p["lokr_w2_b"])
        made = scale * np.kron(p["lokr_w1"], w2)
    elif "hada_w1_a" in p:
        made = (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])
        made = made * p["alpha"] / len(p["hada_w1_b"])
    else:
        up, down = p["lora_up.weight"], p["lora_down.weight"]
        made = up.reshape(len(up), -1) @ down.reshape(len(down), -1) * (p["alpha"] / len(down))
    made = made.reshape(W.shape)
    if "dora_scale" in p:
        assert p["dora_scale"].shape == tuple(W.shape[i] if i == 1 else 1 for i in range(W.ndim))
        made = naive_dora(W + made, p["dora_scale"], 1) - W
    return torch.from_numpy(made)


def stored_changes(path: Path, base: Path) -> dict[str, torch.Tensor]:
    weights = load_file(base)
    places = {name: (key, rows) for name, key, rows in reachable(base)}
    out = {}
    for name, parts in modules(path).items():
        key, rows = places[name]
        out[name] = defined_change(parts, weights[key][rows])
    return out


def numbers(parts: Parts) -> int:
    return sum(tensor.numel() for tensor in parts.values() if tensor.dim())


def lora_error2(delta: torch.Tensor, count: int) -> float:
    """That of the best LoRA of so many numbers; a direction of which there is a share counts by it."""
    matrix = delta.flatten(1).numpy()
    S2 = np.linalg.svd(matrix, compute_uv=False) ** 2
    rank = count / sum(matrix.shape)
    kept = np.clip(rank - np.arange(len(S2)), 0, 1)
    return float(((1 - kept) * S2).sum())


# --- errors, gains, files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [TEXT, CONVOLUTIONS], ids=["text", "convolutions"])
@pytest.mark.parametrize("family", RIVALS)
def test_error_and_gain_are_those_of_the_stored_file(tmp_path, pair, family, flags):
    base, tuned = pair(family)
    answer = extract(base, tuned, tmp_path / "o", "--family", family, *flags)
    path = tmp_path / "o.safetensors"
    expected, stored = true_deltas(base, tuned), stored_changes(path, base)
    assert answer["relative_error"] == pytest.approx(relative_error(expected, stored), rel=2e-3, abs=2e-6)
    kinds = {name: family_of(parts) for name, parts in modules(path).items()}
    counts = {kind: list(kinds.values()).count(kind) for kind in set(kinds.values())}
    assert answer["family"] == family and answer["family_layers"] == counts
    assert answer["modules"] == len(kinds) and counts[family] > 0.6 * len(kinds)
    rival2 = error2 = 0.0
    for name, parts in modules(path).items():
        own = float((expected[name] - stored[name]).square().sum())
        least = lora_error2(expected[name], numbers(parts))
        assert own <= 1.001 * least + 1e-5 * float(expected[name].square().sum()), name
        error2, rival2 = error2 + own, rival2 + least
    gain = 1 - math.sqrt(error2 / rival2)
    assert gain > 0.3
    assert answer["gain"] == pytest.approx(gain, abs=2e-3)
    lora, row = answer["families"]
    assert (lora["family"], lora["gain"], row["family"]) == ("lora", 0, family)
    assert row["relative_error"] == pytest.approx(answer["relative_error"])
    assert row["layers"] == counts[family]
    assert row["bytes"] == 2 * sum(numbers(parts) for parts in modules(path).values())
    assert answer["families_measured"]["layers"] == len(kinds)
    plain = extract(base, tuned, tmp_path / "plain", *flags)
    assert answer["relative_error"] < plain["relative_error"] == pytest.approx(lora["relative_error"], rel=1e-3)
    for component, part in answer["components"].items():
        assert part["relative_error"] < plain["components"][component]["relative_error"]
        assert part["gain"] == pytest.approx(gain, abs=2e-3)  # there is one component only


def test_a_dora_merged_back_is_its_definition(tmp_path, pair):
    base, tuned = pair("dora")
    answer = extract(base, tuned, tmp_path / "o", "--family", "dora", *TEXT)
    path, out = tmp_path / "o.safetensors", tmp_path / "m.safetensors"
    merged = run_cli(["merge", "--json", "--checkpoint", base, "--lora", path, "--out", out, "--dtype", "fp32"])
    assert merged.returncode == 0, merged.stderr
    weights, before, after = load_file(out), load_file(base), load_file(tuned)
    changes = stored_changes(path, base)
    error2 = energy = 0.0
    for name, key, rows in reachable(base):
        if name in changes:
            definition = before[key][rows].double() + changes[name]
            assert (weights[key][rows].double() - definition).norm() <= 1e-6 * definition.norm(), name
            error2 += float((after[key][rows].double() - weights[key][rows].double()).square().sum())
            energy += float((after[key][rows].double() - before[key][rows].double()).square().sum())
    assert math.sqrt(error2 / energy) == pytest.approx(answer["relative_error"], rel=2e-3)


@pytest.mark.parametrize("flags", [TEXT, CONVOLUTIONS], ids=["text", "convolutions"])
@pytest.mark.parametrize("family", RIVALS)
def test_lycoris_and_our_own_reader_understand_every_module(tmp_path, pair, family, flags):
    """LyCORIS builds its module from the tensors, as it does for a file, and is run forward."""
    base, tuned = pair(family)
    extract(base, tuned, tmp_path / "o", "--family", family, *flags)
    weights = load_file(base)
    places = {name: (key, rows) for name, key, rows in reachable(base)}
    own = {name: parts for name, parts in modules(tmp_path / "o.safetensors").items() if family_of(parts) == family}
    for name, parts in list(own.items())[::5]:
        key, rows = places[name]
        weight = weights[key][rows]
        definition = defined_change(parts, weight)
        change = families.build(parts).change(weight.double())
        torch.testing.assert_close(change, definition, rtol=1e-9, atol=1e-9)
        wide = {part: tensor.float() for part, tensor in parts.items()}
        n, c = weight.shape[:2]
        layer = nn.Linear(c, n) if weight.dim() == 2 else nn.Conv2d(c, n, weight.shape[2:])
        with torch.no_grad():
            layer.weight.copy_(weight)
            module = lycoris_module(family, name, layer, wide)
            module.apply_to()
            made, _ = effective(layer.forward, layer)
        assert (made - weight - definition).norm() <= 1e-4 * definition.norm() + 1e-6 * weight.norm(), name


def lycoris_module(family: str, name: str, layer: nn.Module, parts: Parts) -> nn.Module:
    """By the loaders of LyCORIS; its own for LoCon knows no magnitudes over input channels, its module does."""
    alpha = parts["alpha"].item()
    if family == "loha":
        factors = [parts[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b")]
        return LohaModule.make_module_from_state_dict(name, layer, *factors, None, None, alpha, None)
    if family == "lokr":
        factors = [parts.get(f"lokr_{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")]
        return LokrModule.make_module_from_state_dict(name, layer, *factors, alpha, None)
    rank = len(parts["lora_down.weight"])
    module = LoConModule(name, layer, 1, rank, alpha, weight_decompose=True, wd_on_out=False)
    missing, unexpected = module.load_state_dict(parts, strict=False)
    assert not unexpected and set(missing) <= {"scalar"}
    return module


def test_what_the_files_say_of_themselves(tmp_path, pair):
    algorithms = {"dora": "locon", "loha": "loha", "lokr": "lokr"}
    for family, algorithm in algorithms.items():
        extract(*pair(family), tmp_path / family, "--family", family, *TEXT)
        with safe_open(tmp_path / f"{family}.safetensors", "pt") as file:
            metadata = file.metadata()
        arguments = json.loads(metadata["ss_network_args"])
        assert metadata["ss_network_module"] == "lycoris.kohya" and arguments["algo"] == algorithm
        assert ("dora_wd" in arguments) == (family == "dora")
        assert json.loads(metadata["hypermerge"])["parameters"]["family"] == family
        looked = run_cli(["inspect", tmp_path / f"{family}.safetensors", "--json"])
        assert looked.returncode == 0 and family in json.dumps(last_json(looked)).lower()


# --- which fits best --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "lora"])
def test_the_best_is_what_made_the_change(tmp_path, pair, kind):
    base, tuned = pair(kind)
    answer = extract(base, tuned, tmp_path / "o", "--family", "best", *TEXT)
    assert answer["family"] == kind
    rows = {row["family"]: row for row in answer["families"]}
    assert list(rows) == ["lora", *RIVALS]
    if kind == "lora":
        assert answer["relative_error"] < 1e-3 and answer["gain"] is None
        assert len(answer["curve"]) > 2 and set(answer["family_layers"]) == {"lora"}
    else:
        assert max(RIVALS, key=lambda family: rows[family]["gain"]) == kind
        assert rows[kind]["relative_error"] < 0.1 < rows["lora"]["relative_error"]
        assert answer["relative_error"] == pytest.approx(rows[kind]["relative_error"])  # measured on all layers
    asked = extract(base, tuned, tmp_path / "asked", "--family", kind, *TEXT)
    assert (asked["relative_error"], asked["gain"]) == (answer["relative_error"], answer["gain"])
    best, own = load_file(tmp_path / "o.safetensors"), load_file(tmp_path / "asked.safetensors")
    assert best.keys() == own.keys() and all(torch.equal(best[key], own[key]) for key in own)
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hypermerge"])["family"] == kind
        assert (file.metadata()["ss_network_module"] == "networks.lora") == (kind == "lora")


def test_it_is_judged_on_a_sample_where_all_would_take_long(tmp_path, pair, monkeypatch):
    monkeypatch.setattr(extract_costs, "SAMPLE", 0)
    answer = extract(*pair("lokr"), tmp_path / "o", "--family", "best", *TEXT)
    assert answer["families_measured"] == {"layers": extract_costs.LEAST_LAYERS, "of": 72}
    assert answer["family"] == "lokr" and answer["modules"] == 72
    assert max(row["layers"] for row in answer["families"]) <= extract_costs.LEAST_LAYERS
    text = run_cli([a for a in extract_arguments(*pair("lokr"), tmp_path / "t", "--family", "best", *TEXT)
                    if a != "--json"]).stdout  # fmt: skip
    assert "compared on 16 of 72 layers" in text and "less than a LoRA of its size" in text
    for title in ("LoRA:", "DoRA:", "LoHa:", "LoKr:"):
        assert title in text


def test_only_changed_layers_are_judged(tmp_path):
    base = base_weights()
    files = save_pair(tmp_path, base, tuned_weights(base, rank_change(2, only=only_keys(ATTENTION))))
    answer = extract(*files, tmp_path / "o", "--family", "best", "--rank", 2)
    assert answer["families_measured"] == {"layers": 1, "of": 354}
    assert (answer["family"], answer["modules"]) == ("lora", 1)


def test_where_a_family_is_no_closer_there_is_a_lora(tmp_path, pair):
    base, tuned = pair("lora")
    plain = extract(base, tuned, tmp_path / "plain", *TEXT)
    for family in RIVALS:
        answer = extract(base, tuned, tmp_path / family, "--family", family, *TEXT)
        assert answer["family_layers"] == {"lora": 72} and answer["gain"] == 0
        assert any("the file is a LoRA" in warning for warning in answer["warnings"])
        assert answer["relative_error"] == pytest.approx(plain["relative_error"], rel=0.02)
        assert {family_of(parts) for parts in modules(tmp_path / f"{family}.safetensors").values()} == {"lora"}


def test_layers_too_small_for_a_family_are_loras(tmp_path, pair):
    """Rank 1 has no half for LoHa; without even sides there is no Kronecker product."""
    answer = extract(*pair("loha"), tmp_path / "a", "--family", "loha", "--components", "te", "--rank", 1)
    assert answer["family_layers"] == {"lora": 72}
    files = pair("noise")
    answer = extract(*files, tmp_path / "b", "--family", "lokr", *CONVOLUTIONS)
    assert sum(answer["family_layers"].values()) == answer["modules"]


def test_a_channel_without_a_norm_gets_no_magnitude(tmp_path):
    """A host that divides by its norm would make NaN of it."""
    base = base_weights("sd15", 16)
    base[ATTENTION][:, 3] = 0
    change = of_layers(rescaled, 0.1)
    tuned = tuned_weights(base, lambda key, w, g: change(key, w, g) if key == ATTENTION else None)
    tuned[ATTENTION][:, 3] = 0
    answer = extract(*save_pair(tmp_path, base, tuned), tmp_path / "o", "--family", "dora", "--rank", 2)
    assert answer["family_layers"] == {"lora": 1}


@pytest.mark.parametrize("family", ["sd21", "sdxl"])
def test_parts_of_fused_attention_stay_together(tmp_path, family):
    """q, k, v and out of an open_clip tower all have a module, whatever its family."""
    base = base_weights(family, 32)
    fused = "resblocks.0.attn.in_proj_weight" if family == "sd21" else "resblocks.1.attn.in_proj_weight"
    change = of_layers(rescaled, 0.1)
    tuned = tuned_weights(base, lambda key, w, g: change(key, w, g) if key.endswith(fused) else None)
    files = save_pair(tmp_path, base, tuned)
    flags = ("--rank", 2, "--components", "te" if family == "sd21" else "te2")
    answer = extract(*files, tmp_path / "o", "--family", "dora", *flags)
    kinds = {name.rsplit("_", 2)[-2]: family_of(parts) for name, parts in modules(tmp_path / "o.safetensors").items()}
    assert kinds == {"q": "dora", "k": "dora", "v": "dora", "out": "lora"}
    assert answer["modules"] == 3
    expected, stored = true_deltas(*files), stored_changes(tmp_path / "o.safetensors", files[0])
    changed = {name: delta for name, delta in stored.items() if not name.endswith("out_proj")}
    assert answer["relative_error"] == pytest.approx(relative_error(expected, changed), rel=2e-3)


# --- requests, forecasts, ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*RIVALS, "best"])
def test_rank_rules_are_for_a_lora(tmp_path, pair, family):
    flags = ("--family", family, "--rank-rule", "energy", "--rank-target", 0.9)
    result = run_cli(extract_arguments(*pair("lora"), tmp_path / "o", *flags))
    assert result.returncode == 2
    assert "is for a LoRA" in last_json(result)["error"]["what"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", [*RIVALS, "best"])
def test_the_forecast(tmp_path, pair, family):
    flags = ("--components", "te", "--rank", 4)
    plain = extract(*pair("noise"), tmp_path / "o", "--dry-run", *flags)
    plan = extract(*pair("noise"), tmp_path / "o", "--dry-run", "--family", family, *flags)
    assert list(tmp_path.iterdir()) == []
    assert plan["expected_bytes"] > plain["expected_bytes"]
    assert plan["expected_seconds"] >= plain["expected_seconds"]
    answer = extract(*pair("noise"), tmp_path / "o", "--family", family, *flags)
    assert answer["outputs"][0]["bytes"] <= 1.15 * plan["most_bytes"]


@pytest.mark.parametrize("family", [*RIVALS, "best"])
@pytest.mark.parametrize("at", [0.3, 0.7])
def test_cancelled_it_leaves_nothing(tmp_path, pair, family, at):
    seen = [0.0]
    context = Context(lambda fraction, _: seen.append(fraction), lambda: seen[-1] >= at)
    values = {"base": str(pair("noise")[0]), "tuned": str(pair("noise")[1]), "out": str(tmp_path / "o"),
              "family": family, "rank": 4, "components": ["te"], "device": "cpu"}  # fmt: skip
    with pytest.raises(Cancelled):
        execute(VERBS["extract"], ExtractSpec.from_json(values), PathHost(), context)
    assert seen == sorted(seen) and seen[-1] >= at
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_or_skipped(tmp_path):
    base = base_weights()
    tuned = tuned_weights(base, rank_change(4, only=only_keys(ATTENTION, SD1_TEXT)))
    tuned[ATTENTION][0, 0] = float("nan")
    files = save_pair(tmp_path, base, tuned)
    flags = ("--family", "best", "--rank", 2)
    result = run_cli(extract_arguments(*files, tmp_path / "o", *flags))
    assert result.returncode == 1 and "NaN" in last_json(result)["error"]["what"]
    assert not (tmp_path / "o.safetensors").exists()
    answer = extract(*files, tmp_path / "o", *flags, "--skip-nonfinite")
    assert answer["skipped_because"]["nonfinite"] == 1


def test_norms_and_biases_beside_other_families(tmp_path):
    base = base_weights()
    tuned = tuned_weights(base, CHANGES["dora"])
    for key, weight in base.items():
        if weight.dim() == 1 and weight.is_floating_point() and not is_vae(key):
            tuned[key] = weight + 0.01
    files = save_pair(tmp_path, base, tuned)
    flags = ("--family", "dora", "--norms", "--biases", "--rank", 2, "--components", "te")
    answer = extract(*files, tmp_path / "o", *flags)
    assert answer["not_asked_for"] == {"norms": 0, "biases": 0}
    kept = modules(tmp_path / "o.safetensors")
    assert any({"dora_scale", "diff_b"} <= parts.keys() for parts in kept.values())
    assert any("w_norm" in parts for parts in kept.values())


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 0.9)])
def test_weights_of_tune_and_base(tmp_path, pair, weights):
    base, tuned = pair("dora")
    alpha, beta = weights
    flags = ("--family", "dora", "--tuned-weight", alpha, "--base-weight", beta, *TEXT)
    answer = extract(base, tuned, tmp_path / "o", *flags)
    expected = true_deltas(base, tuned, alpha, beta)
    stored = stored_changes(tmp_path / "o.safetensors", base)
    assert answer["relative_error"] == pytest.approx(relative_error(expected, stored), rel=2e-3)
    assert answer["family_layers"]["dora"] > 60
