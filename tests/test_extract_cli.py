"""Extract from end to end, against deltas computed here in float64 from the files themselves."""

import hashlib
import json

import pytest
import torch
from models import (
    extract,
    extract_arguments,
    last_json,
    listing,
    lora_deltas,
    lora_ranks,
    relative_error,
    run_cli,
    true_deltas,
)
from safetensors import safe_open
from safetensors.torch import load_file

FAMILIES = ("sd15", "sd15_inpainting", "sd21", "sdxl")
# relative error per layer: half a unit in the last place of each factor, with room for its entries' spread
PRECISION = {"fp32": 2e-5, "fp16": 6e-4, "bf16": 5e-3}


@pytest.mark.parametrize(
    ("family", "dtype", "method"),
    [*((family, "fp16", "auto") for family in FAMILIES), ("sd15", "bf16", "auto"), ("sd21", "fp32", "auto"),
     ("sd15", "fp16", "randomised"), ("sd15", "fp16", "exact"), ("sd15", "fp32", "randomised")],
)  # fmt: skip
def test_a_known_change_is_reproduced_to_the_output_s_precision(tmp_path, known_pair, family, dtype, method):
    base, tuned = known_pair(family)
    answer = extract(base, tuned, tmp_path / "o", "--rank", 8, "--dtype", dtype, "--method", method)
    expected, stored = true_deltas(base, tuned), lora_deltas(tmp_path / "o.safetensors")
    assert stored.keys() == expected.keys()
    for name, delta in stored.items():
        assert relative_error(expected, {name: delta}) < PRECISION[dtype], name
    assert answer["relative_error"] == pytest.approx(relative_error(expected, stored), rel=1e-3, abs=1e-7)
    assert answer["modules"] == len(expected)


@pytest.mark.parametrize(("family", "rank"), [("sd15", 1), ("sd15_inpainting", 2), ("sd21", 2), ("sdxl", 1)])
def test_the_reported_error_is_that_of_the_stored_file(tmp_path, known_pair, family, rank):
    base, tuned = known_pair(family)
    answer = extract(base, tuned, tmp_path / "o", "--rank", rank)
    expected, stored = true_deltas(base, tuned), lora_deltas(tmp_path / "o.safetensors")
    assert answer["relative_error"] == pytest.approx(relative_error(expected, stored), rel=1e-3)
    best = {n: torch.linalg.svdvals(d.flatten(1))[rank:].square().sum() for n, d in expected.items()}
    whole = sum(float(d.square().sum()) for d in expected.values())
    optimum = float(sum(best.values()) / whole) ** 0.5
    assert optimum <= answer["relative_error"] < 1.005 * optimum
    for component, part in answer["components"].items():
        prefix = "lora_unet_" if component == "unet" else f"lora_{component}_"
        own = {name: delta for name, delta in stored.items() if name.startswith(prefix)}
        assert own
        assert part["relative_error"] == pytest.approx(relative_error(expected, own), rel=1e-3)
    assert sum(part["share_of_change"] for part in answer["components"].values()) == pytest.approx(1)


def test_every_field_of_the_answer(tmp_path, known_pair):
    base, tuned = known_pair("sd15")
    answer = extract(base, tuned, tmp_path / "my style", "--rank", 2, "--conv-rank", 1)
    path = tmp_path / "my style.safetensors"
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert answer["outputs"] == [{"path": str(path), "bytes": len(content), "sha256": digest}]
    ranks = lora_ranks(path)
    assert answer["verb"] == "extract"
    assert answer["modules"] == len(ranks)
    assert {int(rank): count for rank, count in answer["ranks"].items()} == {
        rank: list(ranks.values()).count(rank) for rank in set(ranks.values())
    }
    assert answer["skipped"] == answer["unreachable"] == 0
    assert answer["warnings"] == []
    assert answer["seconds"] > 0
    assert answer["architecture"] == "Stable Diffusion 1"
    assert answer["prompt"] == "<lora:my style:1>"
    assert answer["uncarried_share"] == 0
    assert answer["relative_error_with_uncarried"] == answer["relative_error"]
    assert set(answer["components"]) == {"unet", "te"}
    assert sum(answer["methods"].values()) == answer["modules"]
    curve = answer["curve"]
    assert [point["rank"] for point in curve] == sorted({point["rank"] for point in curve})
    errors, sizes = [point["relative_error"] for point in curve], [point["bytes"] for point in curve]
    assert errors == sorted(errors, reverse=True)
    assert sizes == sorted(sizes)


def test_the_file_says_what_it_is(tmp_path, known_pair):
    base, tuned = known_pair("sd21")
    answer = extract(base, tuned, tmp_path / "style", "--rank", 2, "--seed", 7)
    path = tmp_path / "style.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert metadata["ss_output_name"] == "style"
    assert metadata["ss_base_model_version"] == "sd_v2"
    assert metadata["ss_network_dim"] == "2"
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    sample = content[0x100000 : 0x100000 + 0x10000]
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(sample).hexdigest()[:8]
    recipe = json.loads(metadata["hypermerge"])
    assert recipe["job"] == "extract"
    assert recipe["parameters"]["seed"] == 7
    assert recipe["parents"]["tuned"] == {"name": tuned.name, "bytes": tuned.stat().st_size}
    assert recipe["relative_error"] == pytest.approx(answer["relative_error"], abs=1e-6)
    assert str(tmp_path) not in metadata["hypermerge"]


def test_as_a_program_standard_output_is_one_line_of_json(tmp_path, known_pair):
    arguments = [a for a in extract_arguments(*known_pair("sd15"), tmp_path / "o") if a != "--quiet"]
    result = run_cli(arguments, spawn=True)
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) == 1
    assert last_json(result)["outputs"][0]["path"] == str(tmp_path / "o.safetensors")
    assert "100%" in result.stderr


def test_in_words(tmp_path, known_pair):
    arguments = [a for a in extract_arguments(*known_pair("sd15"), tmp_path / "o") if a != "--json"]
    result = run_cli(arguments)
    assert result.returncode == 0
    assert result.stderr == ""
    for word in ("o.safetensors", "Stable Diffusion 1", "relative error", "<lora:o:1>"):
        assert word in result.stdout


@pytest.mark.parametrize(
    "flags",
    [["--rank", "2"], ["--rank-rule", "energy", "--rank-target", "0.9"], ["--rank", "3", "--conv-rank", "0"]],
)
def test_a_dry_run_forecasts_and_writes_nothing(tmp_path, known_pair, flags):
    base, tuned = known_pair("sd15")
    plan = extract(base, tuned, tmp_path / "o", "--dry-run", *flags)
    assert listing(tmp_path) == {}
    answer = extract(base, tuned, tmp_path / "o", *flags)
    assert plan["dry_run"] is True
    assert plan["modules"] == answer["modules"]
    assert plan["left_out"] == answer["skipped"]
    if plan["expected_bytes"] is not None:
        assert plan["expected_bytes"] == pytest.approx(answer["outputs"][0]["bytes"], rel=0.15)
    assert answer["outputs"][0]["bytes"] <= plan["most_bytes"] * 1.15


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_ranks_never_exceed_a_layer_s_size_and_full_rank_is_exact(tmp_path, known_pair, family):
    base, tuned = known_pair(family)
    flags = ["--rank", 4096, "--dtype", "fp32", "--tuned-weight", 0.5, "--base-weight", 0.25]
    extract(base, tuned, tmp_path / "o", *flags)
    expected = true_deltas(base, tuned, 0.5, 0.25)
    stored, ranks = lora_deltas(tmp_path / "o.safetensors"), lora_ranks(tmp_path / "o.safetensors")
    for name, delta in expected.items():
        assert ranks[name] <= min(delta.flatten(1).shape)
        assert relative_error(expected, {name: stored[name]}) < 1e-5, name


def test_factors_are_ordered_by_singular_value_and_alpha_is_the_rank(tmp_path, known_pair):
    extract(*known_pair("sd15"), tmp_path / "o", "--rank", 3)
    stored = load_file(tmp_path / "o.safetensors")
    for name, rank in lora_ranks(tmp_path / "o.safetensors").items():
        assert stored[f"{name}.alpha"].item() == rank
        up, down = (stored[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
        sizes = (up.norm(dim=0) * down.norm(dim=1)).tolist()
        assert sizes == sorted(sizes, reverse=True), name


@pytest.mark.parametrize(
    ("family", "components", "prefixes"),
    [
        ("sd15", "unet", {"lora_unet"}),
        ("sd15", "te", {"lora_te"}),
        ("sdxl", "te", {"lora_te1", "lora_te2"}),
        ("sdxl", "te1", {"lora_te1"}),
        ("sdxl", "unet,te2", {"lora_unet", "lora_te2"}),
    ],
)
def test_components(tmp_path, known_pair, family, components, prefixes):
    extract(*known_pair(family), tmp_path / "o", "--rank", 1, "--components", components)
    names = lora_ranks(tmp_path / "o.safetensors")
    assert {"_".join(name.split("_")[:2]) for name in names} == prefixes


@pytest.mark.parametrize(
    ("group", "mark"),
    [("attention", "attn"), ("feedforward", ("_ff_", "_mlp_")), ("projection", "_proj_"), ("sampling", "samplers_"),
     ("embedding", ("time_embedding", "time_emb_proj")), ("inout", "lora_unet_conv_"), ("resnet", "_resnets_")],
)  # fmt: skip
def test_layer_groups(tmp_path, known_pair, group, mark):
    answer = extract(*known_pair("sd15"), tmp_path / "o", "--rank", 1, "--layers", group)
    names = lora_ranks(tmp_path / "o.safetensors")
    marks = (mark,) if isinstance(mark, str) else mark
    assert names
    assert all(any(m in name for m in marks) for name in names)
    assert answer["skipped"] == answer["skipped_because"]["excluded"]
    assert answer["skipped"] + answer["modules"] == len(true_deltas(*known_pair("sd15")))


@pytest.mark.parametrize("conv_rank", [None, 0, 2])
def test_convolutions_have_a_rank_of_their_own(tmp_path, known_pair, conv_rank):
    base, tuned = known_pair("sd15")
    extract(base, tuned, tmp_path / "o", "--rank", 3, *([] if conv_rank is None else ["--conv-rank", conv_rank]))
    shapes = {name: delta.shape for name, delta in true_deltas(base, tuned).items()}
    ranks = lora_ranks(tmp_path / "o.safetensors")
    for name, shape in shapes.items():
        wanted = 3 if conv_rank is None or shape[2:] != (3, 3) else conv_rank
        assert ranks.get(name, 0) == min(wanted, shape[0], shape[1:].numel()), name


@pytest.mark.parametrize("method", ["auto", "randomised", "exact"])
def test_the_same_request_gives_the_same_file_with_any_number_of_threads(tmp_path, known_pair, method):
    def digest(name: str, *flags) -> str:
        answer = extract(*known_pair("sd15"), tmp_path / name, "--rank", 3, "--method", method, *flags)
        return load_metadata(answer["outputs"][0]["path"])["sshs_model_hash"]

    first = digest("a", "--seed", 5, "--threads", 1)
    assert digest("b", "--seed", 5, "--threads", 1) == first
    assert digest("c", "--seed", 5, "--threads", 2) == first
    assert digest("d", "--seed", 5, "--threads", 3) == first


def load_metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_same_request_under_the_same_name_gives_the_same_bytes(tmp_path, known_pair):
    first = extract(*known_pair("sd15"), tmp_path / "o", "--rank", 3)["outputs"]
    assert extract(*known_pair("sd15"), tmp_path / "o", "--rank", 3, "--overwrite")["outputs"] == first
