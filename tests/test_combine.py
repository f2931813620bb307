"""combine: one file that changes what several LoRAs change together, told against dense float64 sums and full SVDs."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES
from combine_files import (
    NEED_WEIGHT,
    WITHOUT_FACTORS,
    blocks_of,
    combine,
    every,
    flags,
    half,
    missed,
    ranks,
    read,
    save_base,
    some,
    summed,
    twin,
    worst,
    write,
)
from safetensors.torch import load_file

HALF = 2**-11  # fp16's half spacing: the most that one rounding moves a number


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """family → a narrow fp16 checkpoint."""
    return functools.cache(lambda family: save_base(tmp_path_factory.mktemp(family) / "base.safetensors", family))


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """An SD1 checkpoint whose layers are larger than the LoRAs' ranks."""
    return save_base(tmp_path_factory.mktemp("wide") / "base.safetensors", divisor=16)


def terms_of(folder: Path, base: Path, kinds, **more):
    weights = ((0.7, 0.7), (-0.3, 0.1), (0.45, -0.2))
    own = [write(folder / f"{i}{kind}.safetensors", base, kind, i, **more) for i, kind in enumerate(kinds)]
    return [(lora, *pair) for lora, pair in zip(own, itertools.cycle(weights), strict=False)]


@pytest.mark.parametrize(
    ("family", "kind", "only"),
    [*(("sd15", kind, some) for kind in SAMPLES), ("sd21", "loha", every), ("sdxl", "dora_input", every)],
)
def test_every_family_is_summed_exactly(base, tmp_path, family, kind, only):
    """As a host applies them: each to the weight that those before it have changed."""
    terms = terms_of(tmp_path, base(family), (kind, "lora", kind), only=only)
    answer = combine(*flags(terms), "--checkpoint", base(family), "--out", tmp_path / "out", "--dtype", "fp32")
    made, goal = read(tmp_path / "out.safetensors"), summed(base(family), terms)
    # changes that depend on weights lose digits to these: W' − W of numbers a hundred times larger
    assert missed(made, goal) < (3e-6 if kind in WITHOUT_FACTORS else 3e-7)
    assert answer["modules"] == len(goal) and answer["skipped"] == answer["unreachable"] == 0
    assert answer["relative_error"] < 1e-6


@pytest.mark.parametrize("kind", SAMPLES)
def test_what_fp16_rounds_is_what_the_report_says(base, tmp_path, kind):
    terms = terms_of(tmp_path, base("sd15"), (kind, "lora"), only=some)
    answer = combine(*flags(terms), "--checkpoint", base("sd15"), "--out", tmp_path / "out")
    made, goal = read(tmp_path / "out.safetensors"), summed(base("sd15"), terms)
    assert missed(made, goal) < HALF
    assert worst(made, goal) < 2 * HALF
    assert missed(made, goal) == pytest.approx(answer["relative_error"], rel=0.02, abs=1e-6)
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_loras_alone_need_no_checkpoint_and_keep_all_their_columns(wide, tmp_path, dtype):
    terms = terms_of(tmp_path, wide, ("lora", "lora", "lora"), only=half if dtype == "fp16" else some)
    answer = combine(*flags(terms), "--out", tmp_path / "out", "--dtype", dtype)
    made, goal = read(tmp_path / "out.safetensors"), summed(wide, terms)
    assert worst(made, goal) < {"fp16": 2**-10, "bf16": 2**-7, "fp32": 2**-23}[dtype]
    assert missed(made, goal) == pytest.approx(answer["relative_error"], rel=0.01)
    small = {name: delta for name, delta in goal.items() if min(delta.shape) >= 9}
    assert set(ranks(tmp_path / "out.safetensors")[name] for name in small) == {9}
    assert all(rank <= min(goal[name].shape) for name, rank in ranks(tmp_path / "out.safetensors").items())


def test_weights_and_scales_that_are_powers_of_two_round_nothing(wide, tmp_path):
    one = write(tmp_path / "a.safetensors", wide, "lora", only=some)
    combine("--lora", one.path, "--out", tmp_path / "out")  # the samples' scale is 2/3
    goal = summed(wide, [(one, 1, 1)])
    assert worst(read(tmp_path / "out.safetensors"), goal) > 1e-5
    combine("--lora", tmp_path / "out.safetensors", -0.25, 4, "--out", tmp_path / "again")
    before, after = read(tmp_path / "out.safetensors"), read(tmp_path / "again.safetensors")
    exact = {name: (4 if name.startswith("lora_te") else -0.25) * delta for name, delta in before.items()}
    assert worst(after, exact) < 1e-6  # what is as small as fp16's least numbers loses a bit


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full", "dora_output", "ia3"])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_keeps_the_best_there_is(wide, tmp_path, kind, rank):
    terms = terms_of(tmp_path, wide, (kind, "lora"), only=some)
    answer = combine(*flags(terms), "--checkpoint", wide, "--out", tmp_path / "out", "--rank", rank, "--dtype", "fp32")
    made, goal = read(tmp_path / "out.safetensors"), summed(wide, terms)
    for name, delta in goal.items():
        best = float(np.sqrt(np.square(np.linalg.svd(delta.numpy(), compute_uv=False)[rank:]).sum()))
        assert float((made[name] - delta).norm()) <= 1.005 * best + 2e-6 * float(delta.norm()), name
    assert missed(made, goal) == pytest.approx(answer["relative_error"], rel=1e-3, abs=1e-6)
    assert set(ranks(tmp_path / "out.safetensors").values()) == {rank}


@pytest.mark.parametrize("kind", ["lora", "loha", "full", "dora_input"])
@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_an_energy_is_kept_in_every_layer_with_no_rank_to_spare(wide, tmp_path, kind, energy):
    terms = terms_of(tmp_path, wide, (kind, "lora"), only=some)
    combine(*flags(terms), "--checkpoint", wide, "--out", tmp_path / "out", "--energy", energy, "--dtype", "fp32")
    made, goal = read(tmp_path / "out.safetensors"), summed(wide, terms)
    for name, rank in ranks(tmp_path / "out.safetensors").items():
        left = float((made[name] - goal[name]).square().sum() / goal[name].square().sum())
        S2 = np.square(np.linalg.svd(goal[name].numpy(), compute_uv=False))
        assert left <= 1 - energy + 1e-3
        assert S2[: rank - 1].sum() < energy * S2.sum() * (1 + 1e-4)


@pytest.mark.parametrize(
    ("kinds", "size"), [(("lora", "lora"), 0.25), (("lora", "full"), 0.6), (("dora_output", "lokr"), 0.4)]
)
def test_a_size_is_met_and_beats_one_rank_for_all(wide, tmp_path, kinds, size):
    terms = terms_of(tmp_path, wide, kinds, only=half)
    common = [*flags(terms), "--checkpoint", wide]
    answer = combine(*common, "--out", tmp_path / "out", "--size", size)
    assert 0.98 * size * 2**20 <= (tmp_path / "out.safetensors").stat().st_size <= size * 2**20
    made, goal = read(tmp_path / "out.safetensors"), summed(wide, terms)
    assert missed(made, goal) == pytest.approx(answer["relative_error"], rel=1e-2, abs=1e-6)
    uniform = next(
        rank for rank in range(9, 0, -1)
        if combine(*common, "--out", tmp_path / f"r{rank}", "--rank", rank)["outputs"][0]["bytes"] <= size * 2**20
    )  # fmt: skip
    assert missed(made, goal) < missed(read(tmp_path / f"r{uniform}.safetensors"), goal)


def test_more_than_there_is_stays_below_a_size_and_says_so(wide, tmp_path):
    terms = terms_of(tmp_path, wide, ("lora", "lora"), only=some)
    answer = combine(*flags(terms), "--out", tmp_path / "out", "--size", 50)
    assert (tmp_path / "out.safetensors").stat().st_size < 2**20
    assert any("stays below the size" in warning for warning in answer["warnings"]) and answer["cut"] == ""
    assert missed(read(tmp_path / "out.safetensors"), summed(wide, terms)) < HALF


def test_text_encoders_have_a_weight_of_their_own(base, tmp_path):
    lora = write(tmp_path / "a.safetensors", base("sdxl"), "lora", only=lambda name: half(name) or "_te2_" in name)
    combine("--lora", lora.path, 2, -0.5, "--out", tmp_path / "out")
    made, goal = read(tmp_path / "out.safetensors"), summed(base("sdxl"), [(lora, 2, -0.5)])
    assert worst(made, goal) < 2 * HALF
    answer = combine("--lora", lora.path, 2, 0, "--out", tmp_path / "unet")
    names = {name for name in goal if name.startswith("lora_unet")}
    assert read(tmp_path / "unet.safetensors").keys() == names
    assert answer["skipped_because"] == {"weight 0": len(goal) - len(names)}


def test_block_weights_reach_their_blocks(base, tmp_path):
    a, b = (write(tmp_path / f"{i}.safetensors", base("sd15"), "lora", i) for i in range(2))
    combine(
        "--lora", a.path, 0.5, "--blocks", "IN00-IN03=0, IN04=0.5, MID=0, BASE=0, default=1",
        "--lora", b.path, 1, "--blocks", "OUTALL", "--out", tmp_path / "out", "--dtype", "fp32",
    )  # fmt: skip
    made, blocks = read(tmp_path / "out.safetensors"), blocks_of(base("sd15"))
    first, second = (summed(base("sd15"), [(lora, 1, 1)]) for lora in (a, b))
    goal = {}
    for name in first:
        block = blocks[name]
        of_a = 0 if name.startswith("lora_te") or block in ("IN00", "IN01", "IN02", "IN03", "MID") else (
            0.25 if block == "IN04" else 0.5
        )  # fmt: skip
        of_b = 0 if block.startswith("IN") or block == "MID" else 1
        if of_a or of_b:
            goal[name] = of_a * first[name] + of_b * second[name]
    assert missed(made, goal) < 1e-6


def test_one_lora_alone_takes_its_weights_along(base, tmp_path):
    lora = write(tmp_path / "a.safetensors", base("sd15"), "loha", only=some)
    combine("--lora", lora.path, 0.4, "--checkpoint", base("sd15"), "--out", tmp_path / "out", "--dtype", "fp32")
    assert missed(read(tmp_path / "out.safetensors"), summed(base("sd15"), [(lora, 0.4, 0.4)])) < 1e-6


def test_what_nearly_cancels_is_not_drowned_in_rounding(wide, tmp_path):
    """Side by side, fp16 columns that cancel to a thousandth would be off by a fifth of what is left."""
    a = write(tmp_path / "a.safetensors", wide, "lora", only=some)
    near = {k: t.float() for k, t in load_file(a.path).items()}
    generator = torch.Generator().manual_seed(3)
    for key, tensor in near.items():
        if key.endswith("lora_up.weight"):
            near[key] = tensor * (1 + 1e-3 * torch.randn(tensor.shape, generator=generator))
    from safetensors.torch import save_file

    save_file(near, tmp_path / "b.safetensors")
    combine("--lora", a.path, 1, "--lora", tmp_path / "b.safetensors", -1, "--out", tmp_path / "out")
    goal = read(a.path)
    goal = {name: goal[name] - delta for name, delta in read(tmp_path / "b.safetensors").items()}
    assert missed(read(tmp_path / "out.safetensors"), goal) < 2 * HALF


def test_layers_whose_sum_is_zero_are_left_out_and_counted(base, tmp_path):
    a = write(tmp_path / "a.safetensors", base("sd21"), "lora")
    b = write(tmp_path / "b.safetensors", base("sd21"), "lora", 1, only=lambda name: "layers_0_self_attn_q" in name)
    answer = combine(
        "--lora", a.path, 0.3, "--lora", twin(a).path, -0.3, "--lora", b.path, "--out", tmp_path / "out",
        "--dtype", "fp32",
    )  # fmt: skip
    stored = load_file(tmp_path / "out.safetensors")
    names = {key.partition(".")[0] for key in stored}
    q = next(iter(b.changes))
    # A1111 applies q, k, v and out of SD2's text attention all or none: the others are there as zeros
    assert names == {q, *(q.replace("q_proj", other) for other in ("k_proj", "v_proj", "out_proj"))}
    assert missed({q: read(tmp_path / "out.safetensors")[q]}, summed(base("sd21"), [(b, 1, 1)])) < 1e-6
    assert answer["modules"] == 1 and answer["made"]["sums of zero"] == len(a.changes) - 1


@pytest.mark.parametrize("method", ["linear", "without", "iso-c"])
def test_a_rank_beyond_what_there_is_cuts_nothing_and_says_so(wide, tmp_path, method):
    terms = terms_of(tmp_path, wide, ("lora", "lora"), only=some)
    common = [*flags(terms), "--method", method]
    plain = combine(*common, "--out", tmp_path / "plain")
    answer = combine(*common, "--out", tmp_path / "out", "--rank", 6)  # 3 of each
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert answer["made"] == plain["made"] and answer["cut"] == plain["cut"] == ""
    assert any("rank 6 cuts nothing" in note and "side by side" in note for note in answer["warnings"])
    fewer = combine(*common, "--out", tmp_path / "o", "--rank", 5, "--dry-run")
    assert not any("cuts nothing" in note for note in fewer["warnings"]) and fewer["cut"] == "rank 5"


def test_equal_inputs_give_equal_files_on_any_number_of_threads(base, tmp_path):
    terms = terms_of(tmp_path, base("sd15"), ("lora", "loha", "lokr"), only=some)
    for method in ("linear", "dare"):
        files = []
        for threads in (1, 2, 4):
            out = tmp_path / f"{method}{threads}" / "out"
            out.parent.mkdir()
            combine(*flags(terms), "--checkpoint", base("sd15"), "--out", out, "--method", method, "--seed", 5,
                    "--threads", threads)  # fmt: skip
            files.append(out.with_suffix(".safetensors").read_bytes())
        assert files[0] == files[1] == files[2]


def test_the_checkpoint_is_asked_for_only_where_it_matters(base, tmp_path):
    for kind in SAMPLES:
        lora = write(tmp_path / f"{kind}.safetensors", base("sd15"), kind, only=some)
        if kind in NEED_WEIGHT:
            continue
        combine("--lora", lora.path, "--out", tmp_path / "out", "--overwrite", "--dtype", "fp32")
        assert missed(read(tmp_path / "out.safetensors"), summed(base("sd15"), [(lora, 1, 1)])) < 1e-6
