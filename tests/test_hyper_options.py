"""Hyper-merge's parameters, each against what it should change, from the files."""

from pathlib import Path

import hyper_oracle as oracle
import pytest
import torch
from hyper_families import arguments, gradual, hyper, known, lora_files, matched
from models import extract, last_json, listing, lora_ranks, run_cli
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return gradual(4, K=2, own=0.5, divisor=64, rests=0.02).save(tmp_path_factory.mktemp("models"), torch.float16)


@pytest.fixture(scope="module")
def base(models) -> Path:
    return models[0].with_name("base.safetensors")


def judged(folder: Path, models: list[Path], answer: dict, **more) -> oracle.Judged:
    names = list(answer["multipliers"])
    return oracle.judge(
        dict(zip(names, models, strict=True)), folder / "h.safetensors", lora_files(folder, answer),
        answer["multipliers"], answer["te_multipliers"], **more,
    )  # fmt: skip


def weights(folder: Path, answer: dict) -> dict[str, bytes]:
    """Every file that holds tensors."""
    return {name: content for name, content in listing(folder).items() if name.endswith(".safetensors")}


def test_with_a_base_errors_are_shares_of_the_change_from_it(tmp_path, models, base):
    answer = hyper(models, tmp_path, "--base", base, "--ranks", "4,3", "--dtype", "fp32")
    found = judged(tmp_path, models, answer, base=base)
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=1e-5)
    assert answer["models"] == pytest.approx(found.models, rel=1e-5)
    made, original = oracle.load_reached(tmp_path / "h.safetensors"), oracle.load_reached(base)
    assert all(torch.equal(made[name], original[name]) for name in original)


def test_with_a_base_multipliers_need_no_centre(tmp_path):
    family = known(4, (3, 2), own=0.02, centred=False, seed=7)
    paths = family.save(tmp_path / "models")
    base = tmp_path / "models" / "base.safetensors"
    answer = hyper(paths, tmp_path / "out", "--base", base, "--ranks", "3,2", "--starts", 5)
    λ = torch.tensor([list(row.values()) for row in answer["multipliers"].values()], dtype=torch.float64)
    assert min(cosine for *_, cosine in matched(λ, family.multipliers)) > 0.999


def test_with_loras_only_the_base_takes_the_hyper_model_s_place(tmp_path, models, base):
    answer = hyper(models, tmp_path, "--base", base, "--ranks", "4,3", "--loras-only")
    assert set(listing(tmp_path)) == {"h-1.safetensors", "h-2.safetensors", "h.hypermerge.json"}
    loras = {one["name"]: tmp_path / f"{one['name']}.safetensors" for one in answer["loras"]}
    found = oracle.judge(
        {p.stem: p for p in models}, base, loras, answer["multipliers"], answer["te_multipliers"], base
    )
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=1e-3)


def test_lora_files_are_models_too(tmp_path, models, base):
    loras = []
    for path in models[1:]:
        loras.append(tmp_path / f"style-{path.stem}.safetensors")
        extract(base, path, loras[-1].with_suffix(""), "--rank", 6)
    inputs = [models[0], *loras]
    answer = hyper(inputs, tmp_path / "out", "--base", base, "--ranks", "4,3", "--dtype", "fp32")
    assert list(answer["multipliers"]) == ["a", "style-b", "style-c", "style-d"]
    found = judged(tmp_path / "out", inputs, answer, base=base)
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=1e-4)
    assert answer["models"] == pytest.approx(found.models, rel=1e-4)
    alone = hyper(loras, tmp_path / "alone", "--base", base, "--ranks", "4,3", "--loras-only")
    assert alone["residual_share"] < 1


def test_layers_in_which_all_models_are_equal(tmp_path):
    """Of three equal numbers, a mean in float32 is not always the number: what that leaves is no change."""
    family = known(3, (2, 1), own=0.2, divisor=64)
    for model in family.models:
        model.update({key: weight for key, weight in family.base.items() if "attn" in key or "cond_stage" in key})
    paths = family.save(tmp_path, torch.float16)
    for flags in (["--separate-te"], ["--no-separate-te"], ["--solver", "directions"], ["--allocation", "layers"]):
        folder = tmp_path / flags[-1].strip("-")
        answer = hyper(paths, folder, "--ranks", "2,1", *flags)
        assert answer["residual_share"] == pytest.approx(judged(folder, paths, answer).residual_share, rel=1e-3)
        assert not any("attn" in name or "_te_" in name for name in lora_ranks(folder / "h-1.safetensors"))
        assert answer["te_multipliers"] is None
        assert all(one.count(":") == 2 for prompt in answer["prompts"].values() for one in prompt.split(">") if one)


def test_a_weighted_mean(tmp_path, models):
    answer = hyper(models, tmp_path, "--ranks", "4,3", "--weights", "3,1,1,0", "--model-dtype", "fp32")
    made = oracle.load_reached(tmp_path / "h.safetensors")
    originals = [oracle.load_reached(path) for path in models]
    for name, weight in made.items():
        mean = sum(w / 5 * own[name] for w, own in zip((3, 1, 1, 0), originals, strict=True))
        assert float((weight - mean).abs().max()) < 1e-6
    found = judged(tmp_path, models, answer)
    assert answer["models"] == pytest.approx(found.models, rel=1e-3)
    assert answer["residual_share"] == pytest.approx(found.residual_share, rel=1e-3)


@pytest.mark.parametrize("wanted", ["relative", "component"])
def test_other_weights_of_layers_keep_the_meaning_of_the_figures(tmp_path, models, wanted):
    answer = hyper(models, tmp_path / "o", "--ranks", "4,3", "--layer-weights", wanted)
    plain = hyper(models, tmp_path / "plain", "--ranks", "4,3")
    assert answer["residual_share"] == pytest.approx(judged(tmp_path / "o", models, answer).residual_share, rel=1e-3)
    assert weights(tmp_path / "o", answer) != weights(tmp_path / "plain", plain)


@pytest.mark.parametrize("count", [None, 3])
def test_ranks_are_planned_for_a_size(tmp_path, models, count):
    size = 0.2
    more = () if count is None else ("--count", count)
    answer = hyper(models, tmp_path, "--size", size, *more)
    assert count is None or len(answer["loras"]) == count
    stored = sum((tmp_path / f"{one['name']}.safetensors").stat().st_size for one in answer["loras"])
    assert stored == sum(one["bytes"] for one in answer["loras"])
    numbers = sum(tensor.nbytes for one in answer["loras"]
                  for tensor in load_file(tmp_path / f"{one['name']}.safetensors").values())  # fmt: skip
    assert 0.3 * size * 2**20 < numbers <= size * 2**20
    assert stored <= 1.6 * size * 2**20  # of files as small as these, headers are a half
    assert answer["residual_share"] == pytest.approx(judged(tmp_path, models, answer).residual_share, rel=1e-3)


def test_more_bytes_come_closer(tmp_path, models):
    shares = [
        hyper(models, tmp_path / str(size), "--size", size, "--count", 2)["residual_share"] for size in (0.1, 0.2)
    ]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_number_formats(tmp_path, models, dtype):
    answer = hyper(models, tmp_path, "--ranks", "2", "--dtype", dtype, "--model-dtype", dtype)
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    for name in ("h", "h-1"):
        stored = load_file(tmp_path / f"{name}.safetensors")
        numbers = {key: tensor for key, tensor in stored.items() if tensor.is_floating_point() and "alpha" not in key}
        assert {tensor.dtype for tensor in numbers.values()} == {expected}
    assert answer["residual_share"] == pytest.approx(judged(tmp_path, models, answer).residual_share, rel=1e-3)


def test_equal_seeds_give_equal_files_whatever_the_threads(tmp_path, models):
    first, again, other = (
        hyper(models, tmp_path / name, "--ranks", "4,3", "--seed", seed, "--threads", threads)
        for name, seed, threads in (("first", 5, 2), ("again", 5, 2), ("other", 5, 1))
    )
    assert listing(tmp_path / "first") == listing(tmp_path / "again")
    assert other["residual_share"] == pytest.approx(first["residual_share"], rel=1e-4)
    assert weights(tmp_path / "first", first)["h.safetensors"] == weights(tmp_path / "other", other)["h.safetensors"]


@pytest.mark.parametrize("flags", [("--no-separate-te",), ("--allocation", "layers"), ("--ranks", "full")])
def test_a_preview_tells_the_same_figures_and_writes_nothing(tmp_path, models, flags):
    flags = ("--ranks", "4,3", *flags)
    preview = hyper(models, tmp_path, *flags, "--dry-run")
    assert listing(tmp_path) == {}
    answer = hyper(models, tmp_path, *flags)
    assert preview["preview"] is True
    assert answer["preview"] is False
    for figure in ("residual_share", "models", "multipliers", "loss", "ranks", "prompts", "similarity", "by_model"):
        assert preview[figure] == answer[figure], figure
    for table in ("loras", "curve"):
        for foreseen, real in zip(preview[table], answer[table], strict=True):
            assert foreseen.pop("bytes") == pytest.approx(real.pop("bytes"), rel=0.5)  # headers are a part of these
            assert foreseen == real


def test_files_that_exist_are_kept(tmp_path, models):
    hyper(models, tmp_path, "--ranks", "2")
    before = listing(tmp_path)
    refused = run_cli(arguments(models, tmp_path, "--ranks", "3"))
    assert refused.returncode == 2
    assert "exists already" in last_json(refused)["error"]["what"]
    assert listing(tmp_path) == before
    hyper(models, tmp_path, "--ranks", "3", "--overwrite")
    assert set(listing(tmp_path)) == set(before)
    assert set(lora_ranks(tmp_path / "h-1.safetensors").values()) <= {1, 2, 3}
