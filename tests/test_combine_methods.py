"""combine by every method: each layer is what the method's definition makes of the LoRAs' changes of it."""

from __future__ import annotations

import zlib

import merging_naive as naive
import numpy as np
import pytest
import torch
from combine_files import combine, flags, missed, ranks, read, refused, save_base, summed, twin, write
from models import run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge.algebra.merging.methods import DENSE, DENSITY, ENERGY, METHODS, SEED

DEFINED = {
    "linear": lambda terms, **_: naive.summed(terms),
    "ties": lambda terms, density, **_: naive.ties(terms, density),
    "dare": lambda terms, density, seed, **_: naive.dare(terms, density, seed),
    "dare-ties": lambda terms, density, seed, **_: naive.dare_ties(terms, density, seed),
    "della": lambda terms, density, seed, **_: naive.della(terms, density, seed),
    "breadcrumbs": lambda terms, density, **_: naive.breadcrumbs(terms, density),
    "knots": lambda terms, density, **_: naive.knots(terms, density),
    "tsv": lambda terms, energy, **_: naive.tsv(terms, energy),
    "iso-c": lambda terms, energy, **_: naive.iso_c(terms, energy),
    "iso-cts": lambda terms, energy, **_: naive.iso_cts(terms, energy),
    "aligned": lambda terms, **_: naive.aligned(terms),
    "without": lambda terms, energy, **_: naive.without(terms, energy),
    "shared": lambda terms, energy, **_: naive.shared(terms, energy),
}
DENSITY_USED, ENERGY_USED, SEED_USED = 0.4, 0.8, 7


def few(name: str) -> bool:
    return "mid_block_attentions_0_transformer_blocks_0_attn1" in name or "layers_3_mlp" in name


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "base.safetensors", divisor=16)


def given(method: str) -> list:
    names = {DENSITY: ("--density", DENSITY_USED), ENERGY: ("--directions", ENERGY_USED), SEED: ("--seed", SEED_USED)}
    return [item for use in METHODS[method].uses for item in names[use]]


def test_every_method_has_a_definition():
    assert DEFINED.keys() == METHODS.keys()


@pytest.mark.parametrize("goal_of", [("--rank", 4096), ("--energy", 1)], ids=["rank", "energy"])
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_is_what_the_method_says(base, tmp_path, method, goal_of):
    """All directions are kept, side by side or decomposed: what a rank loses is measured elsewhere."""
    weights = [(0.8, 0.8), (-0.4, 0.3), (0.6, 0.6)]
    terms = [(write(tmp_path / f"{i}.safetensors", base, "lora", i, few), *pair) for i, pair in enumerate(weights)]
    answer = combine(*flags(terms), "--method", method, *given(method), "--out", tmp_path / "out", "--dtype", "fp32",
                     *goal_of)  # fmt: skip
    alone = [summed(base, [(lora, 1, 1)]) for lora, _, _ in terms]
    goal = {}
    for name in alone[0]:
        te = name.startswith("lora_te")
        own = [(pair[te], changes[name].numpy()) for pair, changes in zip(weights, alone, strict=True)]
        seed = SEED_USED ^ zlib.crc32(name.encode())
        goal[name] = torch.from_numpy(DEFINED[method](own, density=DENSITY_USED, energy=ENERGY_USED, seed=seed))
    goal = {name: delta for name, delta in goal.items() if delta.any()}
    assert missed(read(tmp_path / "out.safetensors"), goal) < 2e-5
    assert answer["relative_error"] < 2e-5
    assert answer["method"] == method
    assert all(told in answer["advice"] for told in (METHODS[method].advice, METHODS[method].source))


@pytest.mark.parametrize("method", METHODS)
def test_without_a_rank_the_result_is_as_large_as_all_loras(base, tmp_path, method):
    loras = [write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2)]
    answer = combine("--lora", loras[0].path, "--lora", loras[1].path, "--method", method, "--out", tmp_path / "out")
    assert max(ranks(tmp_path / "out.safetensors").values()) <= 6
    cut = METHODS[method].kind == DENSE
    assert (answer["relative_error"] > 0.01) == cut
    assert any("cut to the ranks of all LoRAs together" in note for note in answer["warnings"]) == cut
    assert answer["cut"] == ("the ranks of all LoRAs together" if cut else "")
    ways = {"decomposed by whole matrices"} if cut else {"side by side", "decomposed by factors"}
    assert set(answer["made"]) <= ways


@pytest.mark.parametrize("kind", ["full", "dora_output", "lokr"])
@pytest.mark.parametrize("method", ["ties", "tsv", "without", "aligned"])
def test_other_families_are_merged_as_well(base, tmp_path, method, kind):
    """Each LoRA changes the checkpoint's own weight: a method compares them, it does not apply them in turn."""
    one = write(tmp_path / "a.safetensors", base, kind, 1, few)
    two = write(tmp_path / "b.safetensors", base, "lora", 2, few)
    combine("--lora", one.path, "--lora", two.path, 0.5, "--method", method, *given(method), "--checkpoint", base,
            "--out", tmp_path / "out", "--dtype", "fp32", "--rank", 4096)  # fmt: skip
    first, second = (summed(base, [(lora, 1, 1)]) for lora in (one, two))
    goal = {
        name: torch.from_numpy(DEFINED[method]([(1.0, first[name].numpy()), (0.5, second[name].numpy())],
                               density=DENSITY_USED, energy=ENERGY_USED, seed=0))
        for name in first
    }  # fmt: skip
    assert missed(read(tmp_path / "out.safetensors"), goal) < 1e-4


def test_the_first_is_the_one_that_is_worked_on(base, tmp_path):
    """Layers that only the others change are no part of the result; what only the first changes stays as it is."""
    a = write(tmp_path / "a.safetensors", base, "lora", 1, lambda name: few(name) and "to_v" not in name)
    b = write(tmp_path / "b.safetensors", base, "lora", 2, lambda name: few(name) and "to_k" not in name)
    flagged = ["--lora", a.path, 0.5, "--lora", b.path, 9]
    combine(*flagged, "--method", "without", "--out", tmp_path / "without", "--dtype", "fp32")
    made, own = read(tmp_path / "without.safetensors"), summed(base, [(a, 0.5, 0.5)])
    assert made.keys() == own.keys()
    for name, delta in made.items():
        if "to_k" in name:
            assert float((delta - own[name]).norm() / own[name].norm()) < 1e-6
        else:
            other = b.changes[name](torch.zeros_like(own[name])).flatten(1)
            assert float((other.mT @ delta).norm()) < 1e-5 * float(other.norm() * own[name].norm())
    combine(*flagged, "--method", "shared", "--out", tmp_path / "shared", "--dtype", "fp32")
    assert not any("to_k" in name or "to_v" in name for name in read(tmp_path / "shared.safetensors"))


@pytest.mark.parametrize("method", ["without", "shared"])
def test_weights_of_the_others_are_of_no_account(base, tmp_path, method):
    """Be they 0: only block weights of 0 leave a layer alone."""
    a, b = (write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2))
    common = ["--method", method, "--dtype", "fp32", "--overwrite"]
    made: list[dict] = []
    for more in ([1], [0], [0.5, 0], [-3, 2], [0, "--blocks", "ALL", "--blocks", "BASE=0.5,default=2"]):
        answer = combine("--lora", a.path, "--lora", b.path, *more, *common, "--out", tmp_path / "o")
        made.append(load_file(tmp_path / "o.safetensors"))
        assert any("of no account, be they 0" in note for note in answer["warnings"])
    for other in made[1:]:
        assert other.keys() == made[0].keys() and all(torch.equal(t, made[0][key]) for key, t in other.items())
    flagged = ["--lora", a.path, "--lora", b.path, *common]
    combine(*flagged, "--blocks", "ALL", "--blocks", "BASE=0", "--out", tmp_path / "o")
    combine(*flagged, "--out", tmp_path / "all")
    own = summed(base, [(a, 1, 1)])
    some_blocks, all_blocks = read(tmp_path / "o.safetensors"), read(tmp_path / "all.safetensors")
    te = {name for name in own if name.startswith("lora_te")}
    for name in own.keys() - te:
        torch.testing.assert_close(some_blocks[name], all_blocks[name])
    for name in te:
        if method == "without":
            torch.testing.assert_close(some_blocks[name], own[name], rtol=1e-5, atol=1e-7)
        else:
            assert name not in some_blocks


@pytest.mark.parametrize("method", ["without", "shared"])
def test_norms_and_biases_are_the_firsts(base, tmp_path, method):
    """They have no directions that could be taken out."""
    norm, layer = "lora_unet_mid_block_attentions_0_norm", "lora_unet_mid_block_attentions_0_proj_in"
    loras = [write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2)]
    for i, one in enumerate(loras):
        n = 1280 // 16
        vectors = {f"{norm}.w_norm": torch.full((n,), 1.0 + i), f"{norm}.b_norm": torch.full((n,), 3.0 + i),
                   f"{layer}.diff_b": torch.full((n,), 5.0 + i)}  # fmt: skip
        save_file(load_file(one.path) | vectors, one.path)
    combine(*flags([(lora, 1, 1) for lora in loras]), "--method", method, "--out", tmp_path / "o")
    made = load_file(tmp_path / "o.safetensors")
    for key, value in ((f"{norm}.w_norm", 1), (f"{norm}.b_norm", 3), (f"{layer}.diff_b", 5)):
        assert (made[key] == value).all()


def test_seeds_count_and_layers_have_their_own(base, tmp_path):
    loras = [write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2)]
    made = {}
    for seed in (1, 1, 2):
        combine(*flags([(lora, 1, 1) for lora in loras]), "--method", "dare", "--density", 0.3, "--seed", seed,
                "--out", tmp_path / "out", "--rank", 4096, "--overwrite")  # fmt: skip
        made.setdefault(seed, []).append(read(tmp_path / "out.safetensors"))
    (first, again), (other,) = made[1], made[2]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.allclose(first[name], other[name], rtol=0.1) for name in first)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "linear", "--density", "0.5"], "no use for 'density'"),
        (["--method", "ties", "--directions", "0.5"], "no use for 'directions'"),
        (["--method", "dare", "--density", "0"], "between"),
        (["--method", "mean"], "must be one of"),
        (["--rank", "4", "--energy", "0.5"], "Both rank and energy"),
        (["--size", "4", "--energy", "0.5"], "Both energy and size"),
        (["--rank", "0"], "between 1 and 4096"), (["--energy", "2"], "between"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_go_together(base, tmp_path, arguments, said):
    lora = write(tmp_path / "a.safetensors", base, "lora", 0, few)
    error = refused("--lora", lora.path, "--lora", lora.path, "--out", tmp_path / "out", *arguments)
    assert said in f"{error['what']} {error['why']}"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("method", ["without", "shared"])
def test_one_alone_has_no_others(base, tmp_path, method):
    lora = write(tmp_path / "a.safetensors", base, "lora", 0, few)
    assert "only one" in refused("--lora", lora.path, "--out", tmp_path / "o", "--method", method)["what"]
    error = refused("--lora", lora.path, 0, "--lora", twin(lora).path, "--out", tmp_path / "o", "--method", method)
    assert error["code"] == "nothing_changed" and "the first LoRA" in error["what"]


def test_nothing_left_is_no_file(base, tmp_path):
    lora = write(tmp_path / "a.safetensors", base, "lora", 0, few)
    other = twin(lora)
    error = refused("--lora", lora.path, "--lora", other.path, "--out", tmp_path / "o", "--method", "without")
    assert error["code"] == "nothing_changed" and "leaves nothing" in error["why"]
    assert {*tmp_path.iterdir()} == {lora.path, other.path}


def test_how_alike_they_are_is_measured_per_block(base, tmp_path):
    """Cosines are those of the dense changes at strength 1, whatever the weights."""
    kinds = ("lora", "full", "dora_input")
    loras = [write(tmp_path / f"{i}.safetensors", base, kind, i, few) for i, kind in enumerate(kinds)]
    twin = write(tmp_path / "twin.safetensors", base, "lora", 0, few)
    terms = [(lora, -2, 0.5) for lora in (*loras, twin)]
    answer = combine(*flags(terms), "--checkpoint", base, "--out", tmp_path / "o", "--method", "ties", "--dry-run")
    alike = answer["alike"]
    alone = [summed(base, [(lora, 1, 1)]) for lora in (*loras, twin)]

    def cosine(i: int, j: int, names) -> float:
        first, second = (np.concatenate([alone[k][n].numpy().ravel() for n in names]) for k in (i, j))
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    for i in range(4):
        for j in range(4):
            assert alike["cosine"][i][j] == pytest.approx(cosine(i, j, sorted(alone[0])), abs=1e-5)
    assert alike["cosine"][0][3] == pytest.approx(1) and alike["overlap"][0][3] == pytest.approx(1)
    assert alike["overlap"][0][1] is None  # a whole matrix has all directions
    assert alike["pairs"] == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    for component, names in (("unet", "mid_block"), ("te", "layers_3")):
        (block,) = alike["by_block"][component].values()
        own = sorted(name for name in alone[0] if names in name)
        for pair, found in zip(alike["pairs"], block["cosine"], strict=True):
            assert found == pytest.approx(cosine(*pair, own), abs=1e-5)
    assert not (tmp_path / "o.safetensors").exists() and answer["outputs"] == []


def test_why_two_have_no_cosine(base, tmp_path):
    a, b, zeros = (write(tmp_path / f"{name}.safetensors", base, "lora", 1, few) for name in ("a", "b", "zeros"))
    apart = write(tmp_path / "apart.safetensors", base, "lora", 1, lambda name: "up_blocks_1_attentions_0_proj" in name)
    save_file({key: 0 * t if "lora_up" in key else t for key, t in load_file(zeros.path).items()}, zeros.path)
    flagged = ["--lora", a.path, "--lora", b.path, 0, "--lora", zeros.path, "--lora", apart.path]
    result = run_cli(["combine", "--quiet", *flagged, "--out", tmp_path / "o", "--dry-run"])
    assert result.returncode == 0, result.stderr
    for said in (
        "a.safetensors and b.safetensors: b.safetensors changes no matrix at these weights",
        "a.safetensors and zeros.safetensors: all changes of zeros.safetensors are zero",
        "a.safetensors and apart.safetensors: have no layer in common",
    ):  # fmt: skip
        assert said in result.stdout
    assert result.stdout.count("no layer in common") == 1 and "prompt" not in result.stdout


def test_the_loss_is_put_down_to_what_was_cut(base, tmp_path):
    loras = [write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2)]
    flagged = flags([(lora, 1, 1) for lora in loras])
    for more, said in (
        ((), "by rounding\n"), (("--rank", 2), "by rounding and cutting to rank 2\n"),
        (("--energy", 0.9), "by rounding and cutting to 90 % of the squared change\n"),
        (("--method", "ties"), "by rounding and cutting to the ranks of all LoRAs together\n"),
    ):  # fmt: skip
        result = run_cli(["combine", "--quiet", *flagged, *more, "--out", tmp_path / "o", "--dry-run"])
        assert said in result.stdout


def test_what_a_sum_keeps_of_its_terms(base, tmp_path):
    a, b = (write(tmp_path / f"{i}.safetensors", base, "lora", i, few) for i in range(2))
    same = twin(a)
    for terms, kept in (([(a, 1, 1), (same, 1, 1)], 2), ([(a, 1, 1), (same, -0.5, -0.5)], 0.2), ([(a, 1, 1)], 1)):
        answer = combine(*flags(terms), "--out", tmp_path / "o", "--dry-run")
        assert answer["alike"]["kept"] == pytest.approx(kept, rel=1e-6)
    one, two = (summed(base, [(lora, 1, 1)]) for lora in (a, b))
    answer = combine(*flags([(a, 0.5, 0.5), (b, -2, -2)]), "--out", tmp_path / "o", "--dry-run")
    of_sum = sum(float((0.5 * one[n] - 2 * two[n]).square().sum()) for n in one)
    of_terms = sum(float(0.25 * one[n].square().sum() + 4 * two[n].square().sum()) for n in one)
    assert answer["alike"]["kept"] == pytest.approx(of_sum / of_terms, rel=1e-6)
