"""What a hyper-merge writes, as others would read it."""

import json
from pathlib import Path

import hyper_oracle as oracle
import pytest
import torch
from hyper_families import gradual, hyper, known, lora_files
from models import listing, lora_ranks
from safetensors import safe_open
from safetensors.torch import load_file

from lib_hypermerge.layouts.opening import open_checkpoint


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    family = gradual(4, K=2, own=0.5, divisor=64, rests=0.02, whole=True)
    return family.save(tmp_path_factory.mktemp("models"), torch.float16)


@pytest.fixture(scope="module")
def made(tmp_path_factory, models) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("made")
    return folder, hyper(models, folder, "--ranks", "4,3,2", "--separate-te", "--compare")


def test_all_files_lie_in_the_folder(made):
    folder, answer = made
    names = {"h.safetensors", "h-1.safetensors", "h-2.safetensors", "h-3.safetensors", "h.hypermerge.json"}
    assert set(listing(folder)) == names
    assert answer["hyper"] == "h.safetensors"
    assert {Path(one["path"]).name for one in answer["outputs"]} >= names - {"h.hypermerge.json"}
    for one in answer["outputs"]:
        assert Path(one["path"]).stat().st_size == one["bytes"]


def test_the_hyper_model_is_a_whole_checkpoint(made, models):
    stored, first = load_file(made[0] / "h.safetensors"), load_file(models[0])
    assert stored.keys() == first.keys()
    for key, tensor in stored.items():
        assert tensor.shape == first[key].shape
        assert tensor.dtype == first[key].dtype
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
    model = open_checkpoint(made[0] / "h.safetensors")
    model.file.close()
    others = [load_file(path) for path in models]
    for key, tensor in stored.items():
        mean = sum(other[key].double() for other in others) / len(others)
        step = torch.finfo(torch.float16).eps
        assert bool(((tensor.double() - mean).abs() <= 0.51 * step * mean.abs() + 1e-7).all()), key


def test_loras_are_such_as_every_host_loads(made, models):
    folder, answer = made
    names = {name for name, _, _ in oracle.reachable(models[0])}
    shapes = {name: tuple(weight.shape) for name, weight in oracle.load_reached(models[0]).items()}
    for one, rank in zip(answer["loras"], (4, 3, 2), strict=True):
        path = folder / f"{one['name']}.safetensors"
        stored = load_file(path)
        ranks = lora_ranks(path)
        assert set(ranks) == names
        assert one["rank"] == rank == max(ranks.values())
        assert one["bytes"] == path.stat().st_size
        for name, r in ranks.items():
            assert r == min(rank, *shapes[name])
            assert float(stored[f"{name}.alpha"]) == r
            up, down = (stored[f"{name}.lora_{side}.weight"] for side in ("up", "down"))
            assert (len(up), down.flatten(1).shape[1]) == shapes[name]
        assert set(stored) == {f"{name}{end}" for name in names
                               for end in (".alpha", ".lora_up.weight", ".lora_down.weight")}  # fmt: skip
        with safe_open(path, "pt") as file:
            assert file.metadata()["ss_network_module"] == "networks.lora"


def test_the_largest_multiplier_of_each_lora_is_one(made):
    for key in ("multipliers", "te_multipliers"):
        for lora in (one["name"] for one in made[1]["loras"]):
            column = [row[lora] for row in made[1][key].values()]
            assert max(abs(λ) for λ in column) == pytest.approx(1)
            assert max(column, key=abs) > 0


def test_prompts_say_the_multipliers(made):
    answer = made[1]
    assert list(answer["prompts"]) == list(answer["multipliers"]) == ["a", "b", "c", "d"]
    for model, prompt in answer["prompts"].items():
        said = dict((part.split(":")[1], part.split(":")[2:]) for part in prompt.strip("<>").split("><"))
        for lora, numbers in said.items():
            te, unet = float(numbers[0]), float(numbers[-1])
            assert unet == pytest.approx(answer["multipliers"][model][lora], abs=1e-5)
            assert te == pytest.approx(answer["te_multipliers"][model][lora], abs=1e-5)
        for lora in set(answer["multipliers"][model]) - set(said):
            assert abs(answer["multipliers"][model][lora]) < 1e-5


def test_the_recipe_tells_what_was_made(made, models):
    folder, answer = made
    recipe = json.loads((folder / "h.hypermerge.json").read_text())
    with safe_open(folder / "h.safetensors", "pt") as file:
        inside = json.loads(file.metadata()["hypermerge"])
    figures = {"residual_share", "models", "container_models"}  # not known yet when the header is written
    assert {key: inside[key] for key in recipe if key not in figures} == {k: recipe[k] for k in recipe.keys() - figures}
    assert answer["recipe"] == str(folder / "h.hypermerge.json")
    assert recipe["job"] == "hyper"
    assert recipe["hyper"] == "h.safetensors"
    assert recipe["loras"] == ["h-1", "h-2", "h-3"]
    assert recipe["models"] == pytest.approx(answer["models"], abs=1e-6)
    for key in ("multipliers", "te_multipliers"):
        for model, row in answer[key].items():
            assert recipe[key][model] == pytest.approx(row, abs=1e-6)
    assert str(folder) not in json.dumps(recipe)
    judged = oracle.from_recipe(folder / "h.hypermerge.json", models)
    assert judged.residual_share == pytest.approx(answer["residual_share"], rel=1e-3)
    assert recipe["residual_share"] == pytest.approx(answer["residual_share"], rel=1e-5)


def test_every_field_of_the_answer(made, models):
    folder, answer = made
    assert answer["verb"] == "hyper"
    assert answer["architecture"] == "Stable Diffusion 1"
    assert answer["ranks"] == [4, 3, 2]
    assert answer["seconds"] > 0
    assert sum(answer["steps"].values()) <= answer["seconds"] * 1.05
    assert answer["container"] is None
    assert answer["resumed"] is False
    assert 0 < answer["rest_share"] < 1
    assert isinstance(answer["better"], str)
    labels, cosines = answer["similarity"]["labels"], torch.tensor(answer["similarity"]["cosines"])
    assert labels == list("abcd")
    flat = torch.stack([
        torch.cat([(piece.models[m] - piece.centre).flatten() for piece in
                   oracle.pieces(models, folder / "h.safetensors", [])]) for m in range(4)
    ])  # fmt: skip
    flat = flat / flat.norm(dim=1, keepdim=True)
    assert torch.allclose(cosines.double(), flat @ flat.mT, atol=1e-4)
    curve = answer["curve"]
    assert [point["loras"] for point in curve] in ([1, 2, 3], [0, 1, 2, 3])
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    shares = [point["residual_share"] for point in curve]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(answer["residual_share"], rel=0.02)
    kinds = {one["kind"]: one["residual_share"] for one in answer["alternatives"]}
    assert {"average", "own", "greedy"} <= set(kinds)
    assert kinds["average"] == pytest.approx(1, abs=1e-6)
    assert kinds["greedy"] >= answer["residual_share"] * 0.99
    for row in answer["by_model"].values():
        assert row["rest_error"] is None or row["rest_error"] > 0
        for part in row["components"].values():
            assert 0 < part["relative_error"] < 1
            assert all(0 <= error <= 1.01 for error in part["blocks"].values())


def test_the_curve_is_that_of_the_files(tmp_path, models):
    answer = hyper(models, tmp_path, "--ranks", "4,3,2", "--dtype", "fp32", "--no-separate-te")
    files, hypers = list(lora_files(tmp_path, answer).values()), tmp_path / "h.safetensors"
    whole = sum(sum(row.values()) for row in oracle.judge(
        {path.stem: path for path in models}, hypers, lora_files(tmp_path, answer), answer["multipliers"]
    ).wholes.values())  # fmt: skip
    for point in answer["curve"]:
        if point["loras"]:
            left = oracle.best_multipliers(models, hypers, files[: point["loras"]])[1]
            assert point["residual_share"] == pytest.approx(left / whole, rel=0.02)


@pytest.mark.parametrize(("family", "components"), [
    ("sdxl", {"unet", "te1", "te2"}), ("sd21", {"unet", "te"}), ("sd15_inpainting", {"unet", "te"}),
])  # fmt: skip
def test_other_families(tmp_path, family, components):
    whole = family == "sdxl"  # whose blocks tell it from its refiner
    made = known(3, (2, 1), own=0.2, family=family, divisor=64, whole=whole)
    paths = made.save(tmp_path / "models", torch.float16)
    answer = hyper(paths, tmp_path / "out", "--ranks", "2,1", "--separate-te")
    found = oracle.from_recipe(tmp_path / "out" / "h.hypermerge.json", paths)
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=1e-3)
    assert answer["models"] == pytest.approx(found.models, rel=1e-3)
    assert set(found.components["a"]) == components
    assert load_file(tmp_path / "out" / "h.safetensors").keys() == load_file(paths[0]).keys()
