"""restore: a checkpoint is what the prompt shows, one LoRA adds the same; what cannot be restored is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from hyper_sets import HyperSet, make_set
from models import (
    ATTENTION,
    NORM,
    SD1_TEXT,
    base_weights,
    cast,
    last_json,
    listing,
    lora_deltas,
    lora_ranks,
    rank_change,
    run_cli,
    save_checkpoint,
    tuned_weights,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import Cancelled, InputChangedError
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.hyper import restore
from lib_hypermerge.jobs.hyper.recipe import Recipe
from lib_hypermerge.jobs.hyper.restore_spec import RestoreSpec

TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
NORM_NAME = "lora_unet_down_blocks_1_resnets_0_norm1"
BIASED = "lora_te_text_model_encoder_layers_0_mlp_fc1"
ODD = {"anna": {"fam-1": 0.7312345, "fam-2": -0.13}, "bert": {"fam-1": -0.41, "fam-2": 1.0}}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, HyperSet]:
    """By family; "separate" is sd15 with multipliers of its own for the text encoder and a remainder for bert."""
    out = {family: make_set(tmp_path_factory.mktemp(family), family) for family in ("sd15", "sd21", "sdxl")}
    folder = tmp_path_factory.mktemp("separate")
    out["separate"] = made = make_set(folder, separate=True, remainders={"bert": "fam-bert-rest"})
    width, bias = (made.weights()[key].shape[0] for key in (f"{NORM}.weight", SD1_TEXT))
    rest = {f"{NORM_NAME}.w_norm": torch.randn(width), f"{NORM_NAME}.b_norm": torch.randn(width),
            f"{BIASED}.diff_b": torch.randn(bias)}  # fmt: skip
    save_file(rest, folder / "fam-bert-rest.safetensors")
    return out


def run(made: HyperSet, out: Path, *more) -> tuple[dict, dict[str, torch.Tensor]]:
    result = run_cli(["restore", "--json", "--quiet", "--hyper", made.hyper, "--out", out, *more])
    assert result.returncode == 0, result.stderr
    report = last_json(result)
    assert report["verb"] == "restore" and report["outputs"][0]["path"] == f"{out}.safetensors"
    return report, load_file(f"{out}.safetensors")


def refusal(folder: Path, *arguments, code: int = 2) -> str:
    before = listing(folder)
    result = run_cli(["restore", "--json", "--quiet", *arguments])
    assert result.returncode == code, result.stdout + result.stderr
    assert listing(folder) == before
    return result.stderr


def assert_restored(made: HyperSet, got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> None:
    """Nearly all numbers are the nearest in fp16, all others next to it; the rest of the file is untouched."""
    wrong = whole = 0
    for key, before in made.weights().items():
        if key not in exact:
            assert torch.equal(got[key], before), key
            continue
        nearest = torch.from_numpy(exact[key].numpy().astype(np.float16))
        spacing = (nearest.double().abs() * 2.0**-10).clamp_min(2.0**-24)
        assert ((got[key].double() - exact[key]).abs() <= 1.01 * spacing).all(), key
        wrong, whole = wrong + int((got[key] != nearest).sum()), whole + nearest.numel()
    assert wrong <= 2e-3 * whole


def added(made: HyperSet, path: Path) -> dict[str, torch.Tensor]:
    """hyper + one LoRA in float64."""
    return replace(made, loras=(path,)).restored({path.stem: 1.0})


def assert_near(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], before, tolerance: float) -> None:
    """‖got − exact‖ ≤ tolerance · ‖exact − before‖ in every tensor."""
    assert got.keys() == exact.keys()
    for key, tensor in exact.items():
        change = float((tensor - before[key].double()).norm())
        assert float((got[key] - tensor).norm()) <= tolerance * change, key


# --- as a checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_model_as_a_checkpoint(sets, tmp_path, family):
    made = sets[family]
    report, got = run(made, tmp_path / "o", "--model", "bert")
    weights = made.recipe.multipliers["bert"]
    assert_restored(made, got, made.restored(weights))
    assert report["kind"] == "checkpoint" and report["model"] == "bert" and report["hyper"] == "fam.safetensors"
    assert report["multipliers"] == weights and report["te_multipliers"] is None
    assert report["expected_error"] == 0.2 and report["relative_error"] is None
    names = {name for name, *_ in made.layers()}  # each once, though both LoRAs change it
    assert sum(report["components"].values()) == report["modules"] == len(names)


def test_a_checkpoint_is_what_merging_the_prompt_gives(sets, tmp_path):
    made = sets["separate"]
    _, got = run(made, tmp_path / "o", "--model", "bert.safetensors")
    terms = re.findall(r"<lora:([^:>]+):([^:>]+)(?::([^>]+))?>", made.recipe.prompt("bert"))
    assert len(terms) == 3
    loras = [x for name, te, unet in terms
             for x in ("--lora", made.folder / f"{name}.safetensors", unet or te, te)]  # fmt: skip
    merged = run_cli(["merge", "--quiet", "--checkpoint", made.hyper, *loras, "--out", tmp_path / "m"])
    assert merged.returncode == 0, merged.stderr
    expected = load_file(tmp_path / "m.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    assert not torch.equal(got[f"{NORM}.weight"], made.weights()[f"{NORM}.weight"])


def test_number_formats_and_metadata_of_a_checkpoint(sets, tmp_path):
    made = sets["sd15"]
    _, got = run(made, tmp_path / "o", "--model", "anna", "--dtype", "fp32")
    assert {tensor.dtype for tensor in got.values() if tensor.is_floating_point()} == {torch.float32}
    exact = made.restored(made.recipe.multipliers["anna"])
    assert_near({key: got[key].double() for key in exact}, exact, made.weights(), 1e-5)
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        metadata = file.metadata()
    own = json.loads(metadata["hypermerge"])
    assert own["job"] == "restore" and own["parameters"]["model"] == "anna"
    assert str(tmp_path) not in json.dumps(metadata) and str(made.folder) not in json.dumps(metadata)


def test_models_of_a_hyper_merge_come_back_as_near_as_it_says(tmp_path):
    """From the real job: what restore writes misses as much as the recipe says, and fit finds nothing better."""
    base = base_weights("sd15", 48)
    names = ("anna", "bert", "carl")
    for seed, name in enumerate(names, start=1):
        tuned = tuned_weights(base, rank_change(2), seed)
        save_checkpoint(tmp_path / f"{name}.safetensors", cast(tuned, torch.float16))
    models = [tmp_path / f"{name}.safetensors" for name in names]
    made = run_cli(["hyper", "--quiet", "--json", "--model", *models, "--ranks", "3,2", "--name", tmp_path / "fam",
                    "--separate-te", "--device", "cpu"])  # fmt: skip
    assert made.returncode == 0, made.stderr
    said = last_json(made)["models"]
    hyper = HyperSet(tmp_path, tmp_path / "fam.safetensors", (), Recipe("", [], {}))
    before = hyper.weights()
    for name, path in zip(names, models, strict=True):
        report, got = run(hyper, tmp_path / f"{name}-back", "--model", name, "--dtype", "fp32")
        original, missed, whole = load_file(path), 0.0, 0.0
        for _, key, rows in hyper.layers():
            missed += float((original[key][rows].double() - got[key][rows].double()).square().sum())
            whole += float((original[key][rows].double() - before[key][rows].double()).square().sum())
        assert report["expected_error"] == pytest.approx(said[name], rel=1e-9)
        assert (missed / whole) ** 0.5 == pytest.approx(said[name], rel=1e-3)
        fitted = run_cli(["fit", "--quiet", "--json", "--separate-te", "--hyper", hyper.hyper, "--model", path])
        assert fitted.returncode == 0, fitted.stderr
        assert said[name] * 0.99 < last_json(fitted)["relative_error"] <= said[name] * (1 + 1e-4)


def test_the_recipe_beside_a_model_knows_more_if_it_is_of_that_model(sets, tmp_path):
    made = sets["sd15"]
    (tmp_path / "m.safetensors").write_bytes(made.hyper.read_bytes())
    recipe = made.recipe
    other = replace(recipe, multipliers={"zoe": recipe.multipliers["anna"]}, models={"anna": 0.9})
    for text, error in (
        (replace(recipe, models={"anna": 0.7}).text(), 0.7), (other.text(), 0.1), ("garbage", 0.1),
    ):  # fmt: skip
        (tmp_path / "m.hypermerge.json").write_text(text, encoding="utf-8")
        arguments = ["restore", "--json", "--quiet", "--dry-run", "--hyper", tmp_path / "m.safetensors", "--model",
                     "anna", "--lora", *made.loras, "--out", tmp_path / "o"]  # fmt: skip
        told = last_json(run_cli(arguments))
        assert told["expected_error"] == error and told["warnings"] == []


# --- a blend ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "unet", "te"),
    [
        ("fam-2=-0.3,fam-1=0.5", (0.5, -0.3), (0.5, -0.3)), ("0.5,-0.3", (0.5, -0.3), (0.5, -0.3)),
        ("fam-1=0.1:0.6", (0.6, 0), (0.1, 0)), ("1:0, 0:1", (0, 1), (1, 0)),
    ],
)  # fmt: skip
def test_a_blend_by_hand(sets, tmp_path, text, unet, te):
    made, names = sets["sd15"], ("fam-1", "fam-2")
    report, got = run(made, tmp_path / "o", "--multipliers", text)
    exact = made.restored(dict(zip(names, unet, strict=True)), dict(zip(names, te, strict=True)))
    assert_restored(made, got, exact)
    assert report["model"] is None and list(report["multipliers"].values()) == list(unet)


def test_loras_that_are_named_need_no_recipe(sets, tmp_path):
    made = sets["sd15"]
    save_file(made.weights(), tmp_path / "plain.safetensors")
    plain = replace(made, hyper=tmp_path / "plain.safetensors")
    _, got = run(plain, tmp_path / "o", "--multipliers", "0.25,0.5", "--lora", *made.loras)
    assert_restored(made, got, made.restored({"fam-1": 0.25, "fam-2": 0.5}))


# --- as one LoRA -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "dtype", "tolerance"), [
    ("sd15", "fp32", 1e-6), ("separate", "fp16", 5e-4), ("sd21", "bf16", 4e-3),
])  # fmt: skip
def test_one_lora_adds_the_same(sets, tmp_path, family, dtype, tolerance):
    made = sets[family]
    text = "fam-1=0.3:0.7312345,fam-2=-0.13"
    report, got = run(made, tmp_path / "o", "--multipliers", text, "--as", "lora", "--dtype", dtype)
    exact = made.restored(ODD["anna"] | {"fam-1": 0.7312345}, {"fam-1": 0.3, "fam-2": -0.13})
    assert_near(added(made, tmp_path / "o.safetensors"), exact, made.weights(), tolerance)
    assert report["relative_error"] < tolerance and report["prompt"] == "<lora:o:1>"
    name = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for key, tensor in got.items() if "alpha" not in key} == {name}
    ranks = lora_ranks(tmp_path / "o.safetensors")
    assert set(ranks) == {name for name, _, _ in made.layers()}
    assert max(ranks.values()) == 7 and sum(report["ranks"].values()) == len(ranks) == report["modules"]


def test_one_lora_of_a_rank_is_the_best_of_that_rank(sets, tmp_path):
    made = sets["sd15"]
    report, _ = run(made, tmp_path / "o", "--model", "carl", "--as", "lora", "--rank", 3, "--dtype", "fp32")
    deltas = lora_deltas(tmp_path / "o.safetensors")
    hyper, exact = made.weights(), made.restored(made.recipe.multipliers["carl"])
    missed = best = whole = 0.0
    for name, key, rows in made.layers():
        change = (exact[key][rows] - hyper[key][rows].double()).flatten(1)
        S = np.linalg.svd(change.numpy(), compute_uv=False)
        best, whole = best + float(np.square(S[3:]).sum()), whole + float(np.square(S).sum())
        missed += float((change - deltas[name].flatten(1)).square().sum())
    assert set(lora_ranks(tmp_path / "o.safetensors").values()) == {3}
    assert missed == pytest.approx(best, rel=1e-6)
    assert report["relative_error"] == pytest.approx((best / whole) ** 0.5, rel=1e-6)


def test_one_lora_holds_the_remainder_and_what_a_webui_asks_of_it(sets, tmp_path):
    made = sets["separate"]
    report, got = run(made, tmp_path / "o", "--model", "bert", "--as", "lora")
    rest = load_file(made.folder / "fam-bert-rest.safetensors")
    for key, tensor in rest.items():
        assert torch.equal(got[key], tensor.half())
    assert report["remainder"] == "fam-bert-rest" and f"{BIASED}.lora_up.weight" in got
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_output_name"] == "o" and metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_base_model_version"].startswith("sd_v1") and len(metadata["sshs_model_hash"]) == 64
    own = json.loads(metadata["hypermerge"])
    assert own["job"] == "restore" and own["parameters"]["te_multipliers"] == made.recipe.te_multipliers["bert"]
    assert str(made.folder) not in json.dumps(metadata)
    merged = run_cli(["merge", "--quiet", "--checkpoint", made.hyper, "--lora", tmp_path / "o.safetensors",
                      "--dtype", "fp32", "--te-dtype", "fp32", "--out", tmp_path / "m"])  # fmt: skip
    assert merged.returncode == 0, merged.stderr
    _, direct = run(made, tmp_path / "d", "--model", "bert", "--dtype", "fp32")
    for key, tensor in load_file(tmp_path / "m.safetensors").items():
        assert (tensor.double() - direct[key].double()).norm() <= 1e-3 * direct[key].double().norm() + 1e-12, key


def test_a_fused_attention_is_written_whole(sets, tmp_path):
    """q from one LoRA, and the others of its attention from none: A1111 takes all four or refuses the file."""
    made, folder = sets["sdxl"], tmp_path
    name = next(name for name, _, _ in made.layers() if name.startswith("lora_te2") and name.endswith("_q_proj"))
    only = {key: t for key, t in load_file(made.loras[0]).items() if key.startswith(f"{name}.")}
    save_file(only, folder / "q.safetensors")
    run(made, folder / "o", "--multipliers", "1", "--lora", folder / "q.safetensors", "--as", "lora")
    deltas = lora_deltas(folder / "o.safetensors")
    stem = name.removesuffix("q_proj")
    assert set(deltas) == {f"{stem}{part}_proj" for part in ("q", "k", "v", "out")}
    assert [bool(deltas[f"{stem}{part}_proj"].any()) for part in ("q", "k", "v", "out")] == [True, False, False, False]


def test_unequal_factors_fit_half_precision(sets, tmp_path):
    """Factors of very different size, whose product is ordinary."""
    made = sets["sd15"]
    n, k = made.weights()[ATTENTION].shape
    up, down = torch.randn(n, 2) * 2e6, torch.randn(2, k) * 1e-8
    save_file({f"{TO_Q}.lora_up.weight": up, f"{TO_Q}.lora_down.weight": down, f"{TO_Q}.alpha": torch.tensor(1.0)},
              tmp_path / "l.safetensors")  # fmt: skip
    run(made, tmp_path / "o", "--multipliers", "0.7", "--lora", tmp_path / "l.safetensors", "--as", "lora")
    exact = 0.7 / 2 * up.double() @ down.double()
    got = lora_deltas(tmp_path / "o.safetensors")[TO_Q]
    assert float((got - exact).norm() / exact.norm()) < 1e-3


# --- refusals --------------------------------------------------------------------------------------------------


def test_what_cannot_be_restored(sets, tmp_path):
    made = sets["sd15"]
    start = ["--hyper", made.hyper, "--out", tmp_path / "o"]
    for arguments, complaint in (
        (["--model", "dora"], "anna, bert, carl"),
        (["--multipliers", "fam-3=1"], "fam-1, fam-2"),
        (["--multipliers", "1"], "2 multipliers"),
        (["--multipliers", "fam-1=1,0.5"], "all or none"),
        (["--multipliers", "fam-1=1,fam-1=2"], "two multipliers"),
        (["--multipliers", "fam-1=x"], "no number"),
        (["--multipliers", "fam-1=nan"], "100"),
        (["--multipliers", "101,0"], "100"),
        (["--multipliers", "1:2:3,0"], "too many"),
        (["--model", "anna", "--multipliers", "1,1"], "Both"),
        ([], "Neither"),
        (["--model", "anna", "--rank", "4"], "rank"),
        (["--multipliers", "0,0", "--as", "lora"], "Every multiplier is 0"),
        (["--model", "anna", "--as", "file"], "checkpoint"),
    ):
        assert complaint in refusal(tmp_path, *start, *arguments), arguments
    assert "hyper" in refusal(tmp_path, "--out", tmp_path / "o", "--model", "anna")


def test_files_that_do_not_belong_together(sets, tmp_path):
    made, other = sets["sd15"], sets["sdxl"]
    out = ["--out", tmp_path / "o", "--model", "anna"]
    plain = tmp_path / "plain.safetensors"
    save_file(made.weights(), plain)
    assert "recipe" in refusal(tmp_path, "--hyper", plain, *out)
    copy = tmp_path / "fam.safetensors"
    copy.write_bytes(made.hyper.read_bytes())
    said = refusal(tmp_path, "--hyper", copy, *out)
    assert "2 of 2" in said and "fam-1, fam-2" in said
    assert "1 of 2" in refusal(tmp_path, "--hyper", copy, *out, "--lora", made.loras[0])
    recipe = tmp_path / "r.hypermerge.json"
    recipe.write_text(made.recipe.text(), encoding="utf-8")
    for kind in ("checkpoint", "lora"):
        more = ["--recipe", recipe, "--lora", *made.loras, "--as", kind]
        assert "Stable Diffusion 1" in refusal(tmp_path, "--hyper", other.hyper, *out, *more)
    assert "is a LoRA" in refusal(tmp_path, "--hyper", made.loras[0], *out)


def test_existing_files_and_inputs_stay(sets, tmp_path):
    made = sets["sd15"]
    (tmp_path / "o.safetensors").write_bytes(b"mine")
    for kind in ("checkpoint", "lora"):
        arguments = ["--hyper", made.hyper, "--model", "anna", "--as", kind]
        assert "exists already" in refusal(tmp_path, *arguments, "--out", tmp_path / "o")
        for taken in (made.hyper, *([made.loras[1]] if kind == "lora" else [])):
            said = refusal(made.folder, *arguments, "--out", taken, "--overwrite")
            assert "would replace" in said
    report, _ = run(made, tmp_path / "o", "--model", "anna", "--as", "lora", "--overwrite")
    assert report["outputs"][0]["bytes"] == (tmp_path / "o.safetensors").stat().st_size


def test_other_families_are_for_checkpoints(sets, tmp_path):
    made, dice, tensors = sets["sd15"], Dice(1), {}
    parts, change = SAMPLES["loha"](tuple(made.weights()[ATTENTION].shape), dice)
    tensors = {f"{TO_Q}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, tmp_path / "h.safetensors")
    more = ["--multipliers", "0.5", "--lora", tmp_path / "h.safetensors"]
    said = refusal(tmp_path, "--hyper", made.hyper, "--out", tmp_path / "o", *more, "--as", "lora")
    assert "h.safetensors" in said and "LoHa" in said
    _, got = run(made, tmp_path / "o", *more)
    before = made.weights()[ATTENTION].double()
    assert_restored(made, got, {ATTENTION: before + 0.5 * change(before)})


@pytest.mark.parametrize("kind", ["checkpoint", "lora"])
def test_nothing_is_left_of_what_did_not_end(sets, tmp_path, kind):
    made, host = sets["sd15"], PathHost(1)
    values = {"hyper": str(made.hyper), "model": "anna", "out": str(tmp_path / "o"), "kind": kind}
    spec = RestoreSpec.from_json(values)
    asked: list[int] = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > 20

    with pytest.raises(Cancelled), restore.make_plan(spec, host) as plan:
        restore.run(plan, host, Context(interrupted=interrupted))
    bad = tmp_path / "bad.safetensors"
    tensors = load_file(made.loras[0])
    tensors[f"{TO_Q}.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, bad)
    arguments = ["--hyper", made.hyper, "--out", tmp_path / "o", "--as", kind, "--lora", bad, "--multipliers", "1"]
    assert "bad.safetensors" in refusal(tmp_path, *arguments, code=1)
    copy = tmp_path / "fam-1.safetensors"
    copy.write_bytes(made.loras[0].read_bytes())
    spec = RestoreSpec.from_json(
        {"hyper": str(made.hyper), "multipliers": "1", "loras": [str(copy)], "out": str(tmp_path / "o"), "kind": kind}
    )
    with pytest.raises(InputChangedError), restore.make_plan(spec, host) as plan:
        copy.write_bytes(made.loras[0].read_bytes() + b" ")
        restore.run(plan, host, Context())
    assert {path.name for path in tmp_path.iterdir()} == {"bad.safetensors", "fam-1.safetensors"}


def test_a_forecast_tells_the_size(sets, tmp_path):
    made = sets["sd15"]
    for kind in ("checkpoint", "lora"):
        arguments = ["restore", "--json", "--quiet", "--hyper", made.hyper, "--model", "anna", "--as", kind,
                     "--out", tmp_path / kind]  # fmt: skip
        told = last_json(run_cli([*arguments, "--dry-run"]))
        assert told["verb"] == "restore" and told["dry_run"] and not (tmp_path / f"{kind}.safetensors").exists()
        assert run_cli(arguments).returncode == 0
        size = (tmp_path / f"{kind}.safetensors").stat().st_size
        assert size <= told["expected_bytes"] <= 1.2 * size
