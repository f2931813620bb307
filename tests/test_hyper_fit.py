"""fit: multipliers and errors are those of a dense least-squares fit in float64; what cannot be fitted is refused."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from hyper_sets import HyperSet, make_set
from models import Weights, cast, last_json, listing, run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import SpecError
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.hyper import fit
from lib_hypermerge.jobs.hyper.fit_spec import FitSpec
from lib_hypermerge.jobs.hyper.recipe import Recipe
from lib_hypermerge.layouts.detect import recognise

NORM = "model.diffusion_model.input_blocks.4.0.in_layers.0.weight"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, HyperSet]:
    return {family: make_set(tmp_path_factory.mktemp(family), family) for family in ("sd15", "sd21", "sdxl")}


def tuned(made: HyperSet, unet: dict, te: dict, noise: float, seed: int = 5) -> Weights:
    """The hyper-model with its LoRAs, and every reachable weight changed by noise of its own."""
    generator, weights, out = torch.Generator().manual_seed(seed), made.weights(), {}
    for key, exact in made.restored(unet, te).items():
        size = noise * exact.std()
        out[key] = exact + size * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    return cast({**weights, **{key: tensor.float() for key, tensor in out.items()}}, torch.float32)


def run(made: HyperSet, model: Path, *more) -> dict:
    before = listing(made.folder)
    result = run_cli(["fit", "--json", "--quiet", "--hyper", made.hyper, "--model", model, *more])
    assert result.returncode == 0, result.stderr
    report = last_json(result)
    assert report["outputs"] == [] and listing(made.folder) == before
    return report


def refusal(*arguments) -> str:
    result = run_cli(["fit", "--json", "--quiet", *arguments])
    assert result.returncode == 2, result.stdout
    return result.stderr


# --- the oracle: every change as a long column, solved densely ---------------------------------------------


@functools.cache
def reach(hyper: Path) -> tuple[list[tuple[str, str]], list[list[np.ndarray]]]:
    """Per layer its (component, block) and the changes of the LoRAs beside the model, flat float64."""
    made = HyperSet(hyper.parent, hyper, tuple(sorted(hyper.parent.glob("fam-*.safetensors"))), Recipe("", [], {}))
    with open_tensors(hyper) as file:
        where = {m.name: (c, m.block) for c, ms in recognise(file).components.items() for m in ms.values() if m.name}
    before, layers = made.weights(), made.layers()
    alone = [made.restored({path.stem: float(path == chosen) for path in made.loras}) for chosen in made.loras]
    directions = [[(d[key][rows] - before[key][rows].double()).flatten().numpy() for d in alone]
                  for _, key, rows in layers]  # fmt: skip
    return [where[name] for name, _, _ in layers], directions


def columns(made: HyperSet, model: Path) -> tuple[list[tuple[str, str]], list[np.ndarray], list[list[np.ndarray]]]:
    """Per layer its (component, block), the model's change, and the LoRAs' changes; all flat float64."""
    hyper, other = made.weights(), load_file(model)
    changes = [(other[key][rows].double() - hyper[key][rows].double()).flatten().numpy()
               for _, key, rows in made.layers()]  # fmt: skip
    places, directions = reach(made.hyper)
    return places, changes, directions


def dense_fit(changes: list[np.ndarray], directions: list[list[np.ndarray]]) -> np.ndarray:
    """Least squares over all numbers. By plain sums: on some processors the OpenBLAS that numpy brings gets the
    least squares of millions of rows wrong, now and then."""
    b = np.concatenate(changes)
    columns = [np.concatenate(each) for each in zip(*directions, strict=True)]
    gram = np.array([[(x * y).sum() for y in columns] for x in columns])
    return np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ np.array([(x * b).sum() for x in columns])


def error_of(changes: list[np.ndarray], directions: list[list[np.ndarray]], weights: list[np.ndarray]) -> float:
    missed = sum(
        float(np.square(b - sum(w * d for w, d in zip(each, ds, strict=True))).sum())
        for b, ds, each in zip(changes, directions, weights, strict=True)
    )
    return (missed / sum(float(np.square(b).sum()) for b in changes)) ** 0.5


@pytest.mark.parametrize(("family", "separate"), [("sd15", True), ("sd15", False), ("sd21", False), ("sdxl", True)])
def test_multipliers_and_errors_are_those_of_a_dense_fit(sets, tmp_path, family, separate):
    made = sets[family]
    model = tmp_path / "x.safetensors"
    unet, te = {"fam-1": 0.83, "fam-2": -0.31}, {"fam-1": -0.4, "fam-2": 0.9}
    save_file(tuned(made, unet, te, 0.05), model)
    report = run(made, model, *(["--separate-te"] if separate else []))
    places, changes, directions = columns(made, model)
    is_unet = [component == "unet" for component, _ in places]
    groups = (True, False) if separate else (None,)
    chosen = {}
    for group in groups:
        picked = [i for i, inside in enumerate(is_unet) if group is None or inside == group]
        chosen[group] = dense_fit([changes[i] for i in picked], [directions[i] for i in picked])
    weights = [chosen[inside if separate else None] for inside in is_unet]
    assert list(report["multipliers"]) == ["fam-1", "fam-2"]
    got = list(report["multipliers"].values())
    np.testing.assert_allclose(got, chosen[True if separate else None], atol=1e-6)
    if separate:
        np.testing.assert_allclose(list(report["te_multipliers"].values()), chosen[False], atol=1e-6)
        np.testing.assert_allclose(got, list(unet.values()), atol=0.02)
        np.testing.assert_allclose(list(report["te_multipliers"].values()), list(te.values()), atol=0.02)
    else:
        assert report["te_multipliers"] is None
    assert report["relative_error"] == pytest.approx(error_of(changes, directions, weights), rel=1e-5)
    for (component, part), block in itertools.product(report["components"].items(), [None, "MID", "L00"]):
        inside = [i for i, place in enumerate(places) if place[0] == component and block in (None, place[1])]
        if inside:
            expected = error_of(*([values[i] for i in inside] for values in (changes, directions, weights)))
            stated = part["relative_error"] if block is None else part["blocks"][block]
            assert stated == pytest.approx(expected, rel=1e-4)


def test_multipliers_are_separate_where_the_recipes_are(tmp_path):
    made = make_set(tmp_path, "sd15", separate=True)
    model, unet, te = tmp_path / "x.safetensors", {"fam-1": 0.5, "fam-2": -0.25}, {"fam-1": -0.125, "fam-2": 1.0}
    save_file(tuned(made, unet, te, 0.0), model)
    report = run(made, model)
    assert report["as_in_recipe"] and report["relative_error"] < 1e-6
    assert report["te_multipliers"] == pytest.approx(te, abs=1e-6)
    assert "as in the recipe" in run_cli(["fit", "--quiet", "--hyper", made.hyper, "--model", model]).stdout
    assert not run(made, model, "--separate-te")["as_in_recipe"]
    named = run(made, model, "--lora", *made.loras)  # without the recipe
    assert named["te_multipliers"] is None and not named["as_in_recipe"]


def test_a_model_within_reach_is_met_exactly(sets, tmp_path):
    made, model = sets["sd15"], tmp_path / "x.safetensors"
    weights = {"fam-1": 0.125, "fam-2": -0.7}
    save_file(tuned(made, weights, weights, 0.0), model)
    report = run(made, model)
    assert report["relative_error"] < 1e-6  # the model is stored in float32
    assert report["multipliers"] == pytest.approx(weights, abs=1e-7)
    assert report["prompt"] == "<lora:fam-1:0.125><lora:fam-2:-0.7>"
    assert report["rest_share"] == 0 and report["rank"] == 2


def test_an_identical_model_needs_no_lora(sets, tmp_path):
    made = sets["sd15"]
    report = run(made, made.hyper)
    assert report["multipliers"] == {"fam-1": 0.0, "fam-2": 0.0} and report["relative_error"] == 0
    assert report["prompt"] == "" and any("equals" in text for text in report["warnings"])
    result = run_cli(["fit", "--quiet", "--hyper", made.hyper, "--model", made.hyper])
    assert result.returncode == 0 and "Prompt: none: the hyper-model alone" in result.stdout


def test_what_lies_outside_lora_layers_is_told(sets, tmp_path):
    made, model = sets["sd15"], tmp_path / "x.safetensors"
    weights = tuned(made, made.recipe.multipliers["anna"], made.recipe.multipliers["anna"], 0.02)
    weights[NORM] = weights[NORM] + 3
    save_file(weights, model)
    report = run(made, model)
    hyper = made.weights()
    energies = {key: float((weights[key].double() - hyper[key].double()).square().sum()) for key in hyper}
    inside = {key for _, key, _ in made.layers()}
    rest = sum(energy for key, energy in energies.items() if key not in inside)
    assert report["rest_share"] == pytest.approx(rest / sum(energies.values()), rel=1e-6)


def test_dependent_loras_get_the_smallest_multipliers(sets, tmp_path):
    made, model = sets["sd15"], tmp_path / "x.safetensors"
    twin = tmp_path / "twin.safetensors"
    twin.write_bytes(made.loras[0].read_bytes())
    weights = {"fam-1": 0.5, "fam-2": 0.0}
    save_file(tuned(made, weights, weights, 0.0), model)
    report = run(made, model, "--lora", made.loras[0], twin)
    assert report["rank"] == 1 and any("dependent" in text for text in report["warnings"])
    assert report["multipliers"] == pytest.approx({"fam-1": 0.25, "twin": 0.25}, abs=1e-6)
    assert report["relative_error"] < 1e-3


def test_loras_of_other_families(sets, tmp_path):
    """A plain LoRA and one of all families, so that mixed inner products are tried: the dense fit again."""
    made, model = sets["sd15"], tmp_path / "x.safetensors"
    hyper, dice, tensors, own = made.weights(), Dice(3), {}, {}
    kinds = itertools.cycle(("loha", "lokr", "locon_cp", "dora_output", "oft", "full", "ia3"))
    for name, key, rows in made.layers()[::2]:
        parts, change = SAMPLES[next(kinds)](tuple(hyper[key][rows].shape), dice)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        own[name] = change(hyper[key][rows].double())
    save_file(tensors, tmp_path / "other.safetensors")
    save_file(tuned(made, {"fam-1": 0.5, "fam-2": 0.1}, {"fam-1": 0.5, "fam-2": 0.1}, 0.03), model)
    report = run(made, model, "--lora", made.loras[0], "--lora", tmp_path / "other.safetensors")
    _, changes, directions = columns(made, model)
    zero = [np.zeros_like(change) for change in changes]
    mixed = [
        [each[0], own[name].flatten().numpy() if name in own else nothing]
        for (name, _, _), each, nothing in zip(made.layers(), directions, zero, strict=True)
    ]
    expected = dense_fit(changes, mixed)
    got = np.array(list(report["multipliers"].values()))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)
    assert report["relative_error"] == pytest.approx(error_of(changes, mixed, [expected] * len(mixed)), rel=1e-5)


# --- what belongs to a hyper-model is found, or its want is told ------------------------------------------------


def test_a_recipe_of_a_base_is_named(sets, tmp_path):
    made = sets["sd15"]
    save_file(made.weights(), tmp_path / "base.safetensors")
    arguments = ["--hyper", tmp_path / "base.safetensors", "--model", made.hyper]
    assert "recipe" in refusal(*arguments)
    recipe = made.folder / "named.hypermerge.json"
    recipe.write_text(made.recipe.text(), encoding="utf-8")
    try:
        result = run_cli(["fit", "--json", "--quiet", *arguments, "--recipe", recipe])
    finally:
        recipe.unlink()
    assert result.returncode == 0, result.stderr
    assert any("recipe is of fam.safetensors" in text for text in last_json(result)["warnings"])
    recipe = tmp_path / "base.hypermerge.json"
    recipe.write_text(made.recipe.text(), encoding="utf-8")
    said = refusal(*arguments)
    assert "fam-1, fam-2" in said and "2 of 2" in said
    recipe.write_text("{}", encoding="utf-8")
    assert "no recipe" in refusal(*arguments, "--recipe", recipe)
    assert "no file" in refusal(*arguments, "--recipe", tmp_path / "none.json")


def test_a_page_finds_loras_by_their_stems_and_reaches_no_other_files(sets, tmp_path):
    made = sets["sd15"]
    checkpoints, loras = tmp_path / "checkpoints", tmp_path / "loras"
    (loras / "families").mkdir(parents=True)
    checkpoints.mkdir()
    (checkpoints / "fam.safetensors").write_bytes(made.hyper.read_bytes())
    for path in made.loras:
        (loras / "families" / path.name).write_bytes(path.read_bytes())
    host = FolderHost(checkpoints, loras)
    values = {"hyper": "fam.safetensors", "model": "fam.safetensors"}
    with fit.make_plan(FitSpec.from_json(values), host) as plan:
        assert [lora.path for lora in plan.loras] == [loras / "families" / path.name for path in made.loras]
        assert plan.to_json(host)["bytes_to_read"] > 0
    outside = tmp_path / "r.hypermerge.json"
    outside.write_text(made.recipe.text(), encoding="utf-8")
    for name in ("../r.hypermerge.json", str(outside), "r.hypermerge.json"):
        with pytest.raises(SpecError):
            fit.make_plan(FitSpec.from_json({**values, "recipe": name}), host)
    (checkpoints / outside.name).write_text(made.recipe.text(), encoding="utf-8")
    fit.make_plan(FitSpec.from_json({**values, "recipe": outside.name}), host).close()


def test_metadata_leads_to_no_other_folder(sets, tmp_path):
    made, inside = sets["sd15"], tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "fam-1.safetensors").write_bytes(made.loras[0].read_bytes())
    text = made.recipe.text().replace("fam-1", "../fam-1")
    save_file(made.weights(), inside / "m.safetensors", {"hypermerge": text})
    said = refusal("--hyper", inside / "m.safetensors", "--model", made.hyper)
    assert "../fam-1" in said and "missing" in said


def test_what_cannot_be_fitted(sets, tmp_path):
    sd15, sdxl = sets["sd15"], sets["sdxl"]
    said = refusal("--hyper", sd15.hyper, "--model", sdxl.hyper)
    assert "XL" in said and "another kind" in said
    assert "is a LoRA" in refusal("--hyper", sd15.hyper, "--model", sd15.loras[0])
    assert "XL" in refusal("--hyper", sd15.hyper, "--model", sd15.hyper, "--lora", sdxl.loras[0])
    assert "called fam-1" in refusal("--hyper", sd15.hyper, "--model", sd15.hyper, "--lora", *[sd15.loras[0]] * 2)
    recipe = json.loads(sd15.recipe.text()) | {"loras": [], "multipliers": {"anna": {}}}
    (tmp_path / "c.hypermerge.json").write_text(json.dumps(recipe), encoding="utf-8")
    arguments = ["--hyper", sd15.hyper, "--model", sd15.hyper, "--recipe", tmp_path / "c.hypermerge.json"]
    assert "container" in refusal(*arguments)


@pytest.mark.parametrize("where", ["model", "lora"])
def test_damage_is_named(sets, tmp_path, where):
    made, bad = sets["sd15"], tmp_path / "bad.safetensors"
    source = made.hyper if where == "model" else made.loras[0]
    weights = load_file(source)
    key = sorted(key for key in weights if "attn1.to_q.weight" in key or "attn1_to_q.lora_up" in key)[0]
    weights[key].view(-1)[3] = float("nan")
    save_file(weights, bad)
    arguments = ["--model", bad] if where == "model" else ["--model", made.hyper, "--lora", bad]
    result = run_cli(["fit", "--json", "--quiet", "--hyper", made.hyper, *arguments])
    assert result.returncode == 1 and key in result.stderr and "bad.safetensors" in result.stderr
