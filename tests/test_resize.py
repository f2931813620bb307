"""Resized LoRAs against full SVDs of the whole change, for every family; ladders, sizes, filling up."""

import json

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from convert_files import convert, layers, linear_or_conv, load, lora, same_bits, save, some, texts
from models import base_weights, save_checkpoint
from resize_files import best, chosen, deltas, distance, resize, sample, wanted

from lib_hypermerge.layouts.adapter_file import open_adapter

NEED_WEIGHT = ("ia3", "glora", "oft")
DORA = ("dora_input", "dora_output")
PLAIN = [family for family in SAMPLES if family not in DORA]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors", base_weights("sd15", 16))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("family", PLAIN)
def test_every_family_is_cut_as_a_full_svd_of_its_change_would(tmp_path, checkpoint, family, rank):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    needs = ["--checkpoint", checkpoint] if family in NEED_WEIGHT else []
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", rank, "--dtype", "fp32", *needs)
    goal = wanted(changes, checkpoint)
    optimum = best(goal, rank)
    made = deltas(tmp_path / "b.safetensors")
    assert made.keys() == goal.keys()
    exact = family in ("lora", "locon_cp", "loha", "loha_cp", "lokr")  # the others are randomised or of float32
    assert distance(made, goal) <= distance(optimum, goal) * (1 + (1e-5 if exact else 0.02)) + 1e-6
    if exact:
        assert distance(made, optimum) < 1e-4
    assert answer["relative_error"] == pytest.approx(distance(made, goal), rel=1e-3, abs=1e-6)
    assert answer["files"][0]["results"][0]["errors"]["svd"] == pytest.approx(answer["relative_error"])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rounding_costs_no_more_than_the_number_format(tmp_path, checkpoint, dtype):
    tensors, changes = sample("lora")
    source = save(tmp_path / "a.safetensors", tensors)
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 2, "--dtype", dtype)
    goal = wanted(changes, checkpoint)
    excess = distance(deltas(tmp_path / "b.safetensors"), goal) / distance(best(goal, 2), goal) - 1
    assert 0 <= excess < {"fp16": 1e-5, "bf16": 1e-3}[dtype]


def test_without_alpha_the_rank_is_meant_before_and_after(tmp_path, checkpoint):
    tensors, _ = sample("lora")
    without = {k: t for k, t in tensors.items() if not k.endswith("alpha")}
    source = save(tmp_path / "a.safetensors", without)
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 2, "--dtype", "fp32")
    goal = deltas(source)
    assert distance(deltas(tmp_path / "b.safetensors"), best(goal, 2)) < 1e-5


@pytest.mark.parametrize("family", DORA)
def test_a_dora_gets_magnitudes_that_fit_its_lower_rank(tmp_path, checkpoint, family):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    with_base = ["--checkpoint", checkpoint, "--dtype", "fp32", "--rank", 1]
    answer = resize("--lora", source, "--out", tmp_path / "b", *with_base)
    goal, stored = wanted(changes, checkpoint), load(tmp_path / "b.safetensors")
    axis = 1 if family == "dora_input" else 0
    error2 = kept2 = 0.0
    from lib_hypermerge.files.opening import open_tensors
    from lib_hypermerge.layouts.detect import recognise

    with open_tensors(checkpoint) as file:
        model = recognise(file)
        for module in chosen():
            W = file.read(model.components[module.component][module.path].weight).double()
            down, up = stored[f"{module.name}.lora_down.weight"], stored[f"{module.name}.lora_up.weight"]
            assert len(down) == 1
            V = W + (up.double().flatten(1) @ down.double().flatten(1)).reshape(W.shape)
            others = [d for d in range(W.dim()) if d != axis]

            def applied(m, V=V, others=others):
                return m.double() * V / V.square().sum(others, keepdim=True).sqrt()

            change = (applied(stored[f"{module.name}.dora_scale"]) - W).flatten(1).numpy()
            error2 += np.square(change - goal[module.name]).sum()
            as_before = (applied(tensors[f"{module.name}.dora_scale"]) - W).flatten(1).numpy()
            kept2 += np.square(as_before - goal[module.name]).sum()
    energy = sum(np.square(g).sum() for g in goal.values())
    assert answer["relative_error"] == pytest.approx((error2 / energy) ** 0.5, rel=1e-4)
    assert error2 < kept2  # than the same directions with the magnitudes of the file
    plain = resize("--lora", source, "--out", tmp_path / "c", "--dora", "lora", *with_base)
    assert plain["relative_error"] == pytest.approx(distance(deltas(tmp_path / "c.safetensors"), goal), rel=1e-3)
    assert not any("dora_scale" in key for key in load(tmp_path / "c.safetensors"))


def test_a_ladder_comes_from_one_run_and_equals_single_runs(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 8))
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 6, "--rank", 4, "--rank", 1)
    assert [r["rank"] for r in answer["files"][0]["results"]] == [6, 4, 1]
    errors = [r["relative_error"] for r in answer["files"][0]["results"]]
    assert errors == sorted(errors)
    resize("--lora", source, "--out", tmp_path / "single", "--rank", 4)
    assert same_bits(load(tmp_path / "b-4.safetensors"), load(tmp_path / "single.safetensors"))
    told = texts(tmp_path / "b-1.safetensors")
    assert told["ss_output_name"] == "b-1" and told["ss_network_dim"] == "1"


def test_modules_of_no_higher_rank_keep_their_very_bits(tmp_path):
    tensors = lora("sd15", rank=lambda i: 2 if i % 2 else 6)
    source = save(tmp_path / "a.safetensors", tensors)
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 3)
    made = load(tmp_path / "b.safetensors")
    small = {k: t for k, t in tensors.items() if len(tensors[f"{k.split('.')[0]}.lora_down.weight"]) == 2}
    assert same_bits({k: made[k] for k in small}, small)
    methods = answer["files"][0]["results"][0]["methods"]
    assert methods["as it was"] == len(small) // 3 and methods["svd"] > 0


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.3, None])
def test_filled_up_files_change_the_model_by_the_very_same_numbers(tmp_path, alpha):
    tensors = lora("sd15", rank=lambda i: 3 + i % 3, alpha=lambda i: alpha)
    source = save(tmp_path / "a.safetensors", tensors)
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 12, "--fill")
    before, after = deltas(source, as_loaded=True), deltas(tmp_path / "b.safetensors", as_loaded=True)
    made = load(tmp_path / "b.safetensors")
    assert {len(t) for k, t in made.items() if k.endswith("lora_down.weight")} == {12}
    for name, delta in before.items():
        np.testing.assert_array_equal(after[name], delta)
        down = made[f"{name}.lora_down.weight"].double().flatten(1)
        new = down[len(tensors[f"{name}.lora_down.weight"]) :]
        if down.shape[1] >= 12:
            gram = (new @ new.mT).numpy()
            np.testing.assert_allclose(gram, np.eye(len(new)), atol=2e-2)  # half precision
    assert answer["relative_error"] == 0


def test_filling_up_makes_one_rank_of_many(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 2 if i % 2 else 8))
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 5, "--fill")
    made = load(tmp_path / "b.safetensors")
    assert {len(t) for k, t in made.items() if k.endswith("lora_down.weight")} == {5}
    assert texts(tmp_path / "b.safetensors")["ss_network_dim"] == "5"


@pytest.mark.parametrize(("rule", "target"), [("energy", 0.7), ("ratio", 0.4), ("cumulative", 0.6)])
def test_rules_choose_the_least_rank_that_serves(tmp_path, checkpoint, rule, target):
    tensors, changes = sample("lora")
    source = save(tmp_path / "a.safetensors", tensors)
    resize("--lora", source, "--out", tmp_path / "b", "--rank-rule", rule, "--rank-target", target)
    made = load(tmp_path / "b.safetensors")
    for name, A in wanted(changes, checkpoint).items():
        S = np.linalg.svd(A, compute_uv=False)[:3]
        rank = len(made[f"{name}.lora_down.weight"])
        enough = {
            "energy": lambda r, S=S: (S[:r] ** 2).sum() >= target * (S**2).sum(),
            "ratio": lambda r, S=S: r == 3 or S[r] < target * S[0],
            "cumulative": lambda r, S=S: S[:r].sum() >= target * S.sum(),
        }[rule]
        assert enough(rank) and (rank == 1 or not enough(rank - 1))


def decaying(power: float, divisor: int = 16) -> dict[str, torch.Tensor]:
    """A LoRA with spectra that decay at a pace of their own in every layer."""
    tensors = lora("sd15", rank=lambda i: 16, divisor=divisor, dtype=torch.float32)
    for index, key in enumerate(k for k in tensors if k.endswith("lora_up.weight")):
        S = torch.arange(1, 17.0) ** -(power * (1 + index % 5 / 2))
        tensors[key] = tensors[key] * S.reshape(1, -1, *[1] * (tensors[key].dim() - 2)) * (1 + index % 3)
    return {k: t.half() for k, t in tensors.items()}


@pytest.mark.parametrize("power", [0.3, 1.0, 2.0])
def test_a_size_is_kept_to_and_beats_one_rank_for_all_at_the_same_bytes(tmp_path, power):
    source = save(tmp_path / "a.safetensors", decaying(power))
    uniform = resize("--lora", source, "--out", tmp_path / "u", "--rank", 6)
    size = (tmp_path / "u.safetensors").stat().st_size
    answer = resize("--lora", source, "--out", tmp_path / "s", "--rank-rule", "size", "--rank-target", size / 2**20)
    written = (tmp_path / "s.safetensors").stat().st_size
    assert 0.98 * size <= written <= size
    assert answer["relative_error"] < uniform["relative_error"]
    assert len(answer["files"][0]["results"][0]["ranks"]) > 1


def test_random_directions_are_as_far_off_as_expected_and_said_to_be(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 8))
    for method in ("random", "sparse"):
        answer = resize("--lora", source, "--out", tmp_path / method, "--rank", 4, "--method", method)
        result = answer["files"][0]["results"][0]
        assert result["errors"][method] == pytest.approx(answer["relative_error"])
        assert result["errors"][method] == pytest.approx(result["expected"][method], rel=0.1)
        assert result["errors"]["svd"] < 0.8 * result["errors"][method]
        assert any("Take the method svd" in warning for warning in answer["warnings"])
        measured = distance(deltas(tmp_path / f"{method}.safetensors"), deltas(source))
        assert measured == pytest.approx(answer["relative_error"], rel=1e-3)
    again = resize("--lora", source, "--out", tmp_path / "again", "--rank", 4, "--method", "random")
    assert same_bits(load(tmp_path / "again.safetensors"), load(tmp_path / "random.safetensors"))
    other = resize("--lora", source, "--out", tmp_path / "other", "--rank", 4, "--method", "random", "--seed", 1)
    assert other["relative_error"] != again["relative_error"]


def test_randomised_svd_comes_close(tmp_path):
    source = save(tmp_path / "a.safetensors", decaying(1.0))
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 4, "--method", "rsvd")
    errors = answer["files"][0]["results"][0]["errors"]
    assert errors["svd"] * (1 - 1e-6) <= errors["rsvd"] < 1.02 * errors["svd"]


def test_a_preview_measures_every_method_and_writes_nothing(tmp_path):
    source = save(tmp_path / "a.safetensors", decaying(1.0))
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", "8,2", "--dry-run")
    assert answer["outputs"] == [] and sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
    for result in answer["files"][0]["results"]:
        errors = result["errors"]
        assert errors.keys() == {"svd", "rsvd", "random", "sparse"}
        assert errors["svd"] == min(errors.values()) < errors["random"]
        assert result["bytes"] > 0
    real = resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    assert real["relative_error"] == pytest.approx(answer["files"][0]["results"][1]["relative_error"])


def test_norms_biases_and_embeddings_go_along(tmp_path):
    tensors = lora("sd15", rank=lambda i: 4)
    name = next(k for k in tensors if k.endswith("lora_up.weight")).split(".")[0]
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    more = {f"{name}.diff_b": torch.randn(len(tensors[f"{name}.lora_up.weight"])).half(),
            f"{norm}.w_norm": torch.randn(10).half(), f"{norm}.b_norm": torch.randn(10).half(),
            "bundle_emb.token.string_to_param.*": torch.randn(2, 24).half()}  # fmt: skip
    source = save(tmp_path / "a.safetensors", tensors | more)
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    made = load(tmp_path / "b.safetensors")
    assert same_bits({k: made[k] for k in more}, more)
    with open_adapter(tmp_path / "b.safetensors") as file:
        assert not file.unknown


@pytest.mark.parametrize("family", ["loha", "lokr", "full", "lora"])
def test_numbers_keep_their_format_and_a_size_is_kept_to_for_every_family(tmp_path, family):
    tensors = {}
    for i, module in enumerate(m for m in layers("sd15", 8) if linear_or_conv(m)):
        parts, _ = SAMPLES[family](tuple(module.weight.shape), Dice(i))
        tensors |= {f"{module.name}.{part}": t.clone() for part, t in parts.items()}
        if i == 40:
            break
    source = save(tmp_path / "a.safetensors", tensors)
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    assert {t.dtype for k, t in load(tmp_path / "b.safetensors").items() if ".lora_" in k} == {torch.float16}
    target = 0.9 * (tmp_path / "b.safetensors").stat().st_size
    resize("--lora", source, "--out", tmp_path / "s", "--rank-rule", "size", "--rank-target", target / 2**20)
    assert 0.98 * target <= (tmp_path / "s.safetensors").stat().st_size <= target


def test_a_size_is_kept_to_where_a_dialect_keeps_q_k_and_v_apart(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("flux_dev", rank=lambda i: 8))
    convert(source, tmp_path / "d", "--to", "diffusers")
    other = tmp_path / "d.safetensors"
    target = 0.5 * source.stat().st_size
    answer = resize("--lora", other, "--to", "kohya", "--out", tmp_path / "s", "--rank-rule", "size",
                    "--rank-target", target / 2**20)  # fmt: skip
    assert 0.98 * target <= (tmp_path / "s.safetensors").stat().st_size <= target
    assert not any("below the target" in warning for warning in answer["warnings"])


@pytest.mark.parametrize("other", ["dora_input", "full"])
def test_methods_are_compared_on_what_all_can_do(tmp_path, checkpoint, other):
    plain, _ = sample("lora")
    mixed, _ = sample(other)
    keys = [m.name for m in chosen()]
    tensors = {k: t for k, t in plain.items() if k.split(".")[0] in keys[:2]}
    tensors |= {k: t for k, t in mixed.items() if k.split(".")[0] in keys[2:]}
    source = save(tmp_path / "a.safetensors", tensors)
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 2, "--checkpoint", checkpoint, "--dry-run",
                    "--method", "sparse")  # fmt: skip
    result = answer["files"][0]["results"][0]
    errors, expected = result["errors"], result["expected"]
    assert errors["svd"] <= errors["rsvd"] * (1 + 1e-6) < errors["random"]
    for kind in ("random", "sparse"):
        assert errors[kind] == pytest.approx(expected[kind], rel=0.6)
    assert any("DoRA modules were cut along singular" in w for w in answer["warnings"]) == (other == "dora_input")


def test_trainers_that_go_on_with_a_filled_file_are_told_its_alphas(tmp_path):
    source = save(tmp_path / "a.safetensors", lora("sd15", rank=lambda i: 4, alpha=lambda i: 2.0))
    resize("--lora", source, "--out", tmp_path / "b", "--rank", 8, "--fill")
    made, told = load(tmp_path / "b.safetensors"), texts(tmp_path / "b.safetensors")
    assert {float(t) for k, t in made.items() if k.endswith("alpha")} == {4.0}
    assert told["ss_network_dim"] == "8" and told["ss_network_alpha"] == "4"
    assert json.loads(told["ss_network_args"]).get("conv_alpha", "4") == "4"


def test_a_lora_of_zeros_is_said_to_change_nothing(tmp_path):
    tensors = lora("sd15", rank=lambda i: 4, only=some)
    source = save(tmp_path / "a.safetensors", {k: torch.zeros_like(t) if "up" in k else t for k, t in tensors.items()})
    answer = resize("--lora", source, "--out", tmp_path / "b", "--rank", 2)
    assert any("changes nothing" in warning for warning in answer["warnings"])
