"""merge: what is wrong is refused before anything is computed, says what to do, and leaves every file as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_samples import SAMPLES, Dice
from models import ATTENTION, base_weights, cast, last_json, listing, reachable, run_cli, save_checkpoint
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import Cancelled, InputChangedError, NumericalError, OutputError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs import checkpoint_formats
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.merge import MergeSpec, make_plan, run


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with narrow fp16 checkpoints and a LoRA for each."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd15", "sdxl"):
        save_checkpoint(folder / f"{family}.safetensors", cast(base_weights(family), torch.float16))
        save_file(module_per_layer(folder / f"{family}.safetensors"), folder / f"{family}-lora.safetensors")
    return folder


def module_per_layer(checkpoint: Path, kind: str = "lora") -> dict[str, torch.Tensor]:
    dice, tensors, shapes = Dice(0), {}, {k: t.shape for k, t in load_file(checkpoint).items()}
    for name, key, rows in reachable(checkpoint):
        parts, _ = SAMPLES[kind]((rows.stop - rows.start, *shapes[key][1:]), dice)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def refusal(folder: Path, *arguments, code: int = 2) -> str:
    """What is said; nothing in the folder may have changed."""
    before = listing(folder)
    result = run_cli(["merge", "--quiet", "--json", *arguments])
    assert result.returncode == code, result.stdout + result.stderr
    assert last_json(result)["exit_code"] == code
    assert listing(folder) == before
    return result.stderr


def spec(**values) -> MergeSpec:
    return MergeSpec.from_json({key: value for key, value in values.items() if value is not None})


def test_a_lora_for_another_architecture(models, tmp_path):
    said = refusal(
        models, "--checkpoint", models / "sd15.safetensors", "--lora", models / "sdxl-lora.safetensors",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert "sdxl-lora.safetensors" in said and "XL" in said


def test_mixed_architectures_in_one_merge(models, tmp_path):
    said = refusal(
        models, "--checkpoint", models / "sdxl.safetensors", "--lora", models / "sdxl-lora.safetensors",
        "--lora", models / "sd15-lora.safetensors", 0.5, "--out", tmp_path / "o",
    )  # fmt: skip
    assert "sd15-lora.safetensors" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--checkpoint", "sd15-lora.safetensors", "--lora", "sd15-lora.safetensors"], "is a LoRA"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15.safetensors"], "checkpoint"),
        (["--checkpoint", "none.safetensors", "--lora", "sd15-lora.safetensors"], "none.safetensors"),
        (["--checkpoint", "sd15.safetensors", "--lora", "none.safetensors"], "none.safetensors"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15-lora.safetensors", "much"], "much"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15-lora.safetensors", "inf"], "number"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15-lora.safetensors", "1e9"], "100"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15-lora.safetensors", "--blocks", "1,1"], "17 or 26"),
        (["--checkpoint", "sd15.safetensors", "--lora", "sd15-lora.safetensors", "--dtype", "int4"], "fp16"),
        (["--checkpoint", "sd15.safetensors"], "lora"),
    ],
)
def test_requests_that_mean_nothing(models, tmp_path, arguments, complaint):
    placed = [str(models / a) if a.endswith(".safetensors") else a for a in arguments]
    assert complaint in refusal(models, *placed, "--out", tmp_path / "o")


def damaged(models: Path, tmp_path: Path, change) -> Path:
    tensors = load_file(models / "sd15-lora.safetensors")
    change(tensors, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q")
    save_file(tensors, tmp_path / "bad.safetensors")
    return tmp_path / "bad.safetensors"


def drop(part: str):
    def change(tensors, name):
        del tensors[f"{name}.{part}"]

    return change


def replaced(part: str, make):
    def change(tensors, name):
        tensors[f"{name}.{part}"] = make(tensors[f"{name}.{part}"])

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drop("lora_up.weight"), "lora_up.weight"),
        (drop("lora_down.weight"), "lora_down.weight"),
        (replaced("lora_down.weight", lambda t: t[:2].clone()), "fit together"),
        (replaced("lora_down.weight", lambda t: t[:, :-1].clone()), "does not fit"),
        (replaced("lora_up.weight", lambda t: t[:-1].clone()), "does not fit"),
    ],
    ids=["no up", "no down", "ranks disagree", "too narrow", "too short"],
)
def test_broken_modules_are_named(models, tmp_path, change, complaint):
    bad = damaged(models, tmp_path, change)
    said = refusal(models, "--checkpoint", models / "sd15.safetensors", "--lora", bad, "--out", tmp_path / "o")
    assert complaint in said and "attn1_to_q" in said and "bad.safetensors" in said
    assert not (tmp_path / "o.safetensors").exists()


def test_alpha_missing_is_one_and_alpha_zero_is_told(models, tmp_path):
    for name, change in (
        ("none", drop("alpha")),
        ("rank", replaced("alpha", lambda t: torch.tensor(3.0))),
        ("zero", replaced("alpha", lambda t: torch.tensor(0.0))),
    ):
        bad = damaged(models, tmp_path, change)
        result = run_cli(["merge", "--quiet", "--json", "--checkpoint", models / "sd15.safetensors", "--lora", bad,
                          "--out", tmp_path / name])  # fmt: skip
        assert result.returncode == 0
        report = last_json(result)
        assert any("alpha 0" in warning for warning in report["warnings"]) == (name == "zero")
        assert report["skipped_because"] == ({"alpha 0": 1} if name == "zero" else {})
    none, rank, zero = (load_file(tmp_path / f"{name}.safetensors")[ATTENTION] for name in ("none", "rank", "zero"))
    assert torch.equal(none, rank)
    assert torch.equal(zero, load_file(models / "sd15.safetensors")[ATTENTION])


def test_the_output_may_be_no_input(models, tmp_path):
    for name in ("sd15", "sd15-lora"):
        said = refusal(
            models, "--checkpoint", models / "sd15.safetensors", "--lora", models / "sd15-lora.safetensors",
            "--out", models / name, "--overwrite",
        )  # fmt: skip
        assert "made from" in said


def test_nothing_is_overwritten_unless_asked(models, tmp_path):
    (tmp_path / "o.safetensors").write_bytes(b"mine")
    arguments = ["--checkpoint", models / "sd15.safetensors", "--lora", models / "sd15-lora.safetensors",
                 "--out", tmp_path / "o"]  # fmt: skip
    assert "exists" in refusal(tmp_path, *arguments)
    assert run_cli(["merge", "--quiet", *arguments, "--overwrite"]).returncode == 0
    assert set(load_file(tmp_path / "o.safetensors")) == set(load_file(models / "sd15.safetensors"))


def test_the_loaded_checkpoint_is_not_replaced(models, tmp_path):
    class Host(FolderHost):
        def loaded_checkpoint(self):
            return tmp_path / "loaded.safetensors"

    (tmp_path / "loaded.safetensors").write_bytes((models / "sd15.safetensors").read_bytes())
    (tmp_path / "other.safetensors").write_bytes((models / "sd15.safetensors").read_bytes())
    host = Host(tmp_path, models)
    wanted = spec(checkpoint="other.safetensors", loras=["sd15-lora.safetensors"], out="loaded", overwrite=True)
    with pytest.raises(SpecError, match="loaded at the moment"):
        make_plan(wanted, host)


def test_a_disk_too_small_is_told_beforehand(models, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000, "total": 10**6})
    monkeypatch.setattr("lib_hypermerge.files.writer.shutil.disk_usage", lambda folder: usage)
    wanted = spec(checkpoint=str(models / "sd15.safetensors"), loras=[str(models / "sd15-lora.safetensors")],
                  out=str(tmp_path / "o"))  # fmt: skip
    with pytest.raises(OutputError, match="too full"):
        make_plan(wanted, PathHost())


def test_a_format_that_this_torch_lacks(models, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint_formats.DTYPES, "fp8_e4m3", "F8_OTHER")  # torch 2.1 and newer have both
    wanted = spec(checkpoint=str(models / "sd15.safetensors"), loras=[str(models / "sd15-lora.safetensors")],
                  out=str(tmp_path / "o"), dtype="fp8_e4m3")  # fmt: skip
    with pytest.raises(SpecError, match="fp8_e4m3"):
        make_plan(wanted, PathHost())


@pytest.mark.parametrize("where", ["checkpoint", "lora", "overflow"])
def test_numbers_that_are_none_are_named(models, tmp_path, where):
    weights, factors = load_file(models / "sd15.safetensors"), load_file(models / "sd15-lora.safetensors")
    strength = 1.0
    if where == "checkpoint":
        weights[ATTENTION][1, 2] = float("nan")
    elif where == "lora":
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        factors[f"{name}.lora_up.weight"][0, 0] = float("inf")
    else:
        strength, factors = 100.0, {k: 300 * t if "lora_" in k.split(".")[1] else t for k, t in factors.items()}
    save_file(weights, tmp_path / "model.safetensors")
    save_file(factors, tmp_path / "lora.safetensors")
    said = refusal(
        tmp_path, "--checkpoint", tmp_path / "model.safetensors", "--lora", tmp_path / "lora.safetensors", strength,
        "--out", tmp_path / "o", code=1,
    )  # fmt: skip
    assert "NaN or Inf" in said
    assert where == "overflow" or ATTENTION in said
    blamed = {"checkpoint": "in model.safetensors is damaged", "lora": "in lora.safetensors is damaged"}
    assert blamed.get(where, "too large for the number format") in said


def test_interrupted_it_leaves_nothing(models, tmp_path):
    wanted = spec(checkpoint=str(models / "sd15.safetensors"), loras=[str(models / "sd15-lora.safetensors")],
                  out=str(tmp_path / "o"))  # fmt: skip
    seen: list[float] = []
    context = Context(lambda fraction, text: seen.append(fraction), lambda: len(seen) > 20)
    with make_plan(wanted, PathHost()) as plan, pytest.raises(Cancelled):
        run(plan, PathHost(), context)
    assert list(tmp_path.iterdir()) == [] and seen == sorted(seen)


@pytest.mark.parametrize("which", ["model", "lora"])
def test_an_input_replaced_meanwhile(models, tmp_path, which):
    for name, source in (("model", "sd15"), ("lora", "sd15-lora")):
        (tmp_path / f"{name}.safetensors").write_bytes((models / f"{source}.safetensors").read_bytes())
    wanted = spec(checkpoint=str(tmp_path / "model.safetensors"), loras=[str(tmp_path / "lora.safetensors")],
                  out=str(tmp_path / "o"))  # fmt: skip
    with make_plan(wanted, PathHost()) as plan:
        other = tmp_path / "new"
        other.write_bytes((tmp_path / f"{which}.safetensors").read_bytes())
        other.replace(tmp_path / f"{which}.safetensors")
        with pytest.raises(InputChangedError):
            run(plan, PathHost(), Context())
    assert not (tmp_path / "o.safetensors").exists()


def test_weight_zero_is_a_copy_and_says_so(models, tmp_path):
    result = run_cli(["merge", "--quiet", "--json", "--checkpoint", models / "sd15.safetensors", "--lora",
                      models / "sd15-lora.safetensors", 0, "--out", tmp_path / "o"])  # fmt: skip
    report = last_json(result)
    assert any("copy" in warning for warning in report["warnings"])
    before, after = load_file(models / "sd15.safetensors"), load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_half_a_lora_merges_with_what_is_missing_named(models, tmp_path):
    tensors = load_file(models / "sd15-lora.safetensors")
    tensors |= {f"lora_unet_no_such_layer.{part}": torch.zeros(2, 2) for part in ("lora_up.weight", "lora_down.weight")}
    tensors["strange"] = torch.zeros(1)
    save_file(tensors, tmp_path / "l.safetensors")
    result = run_cli(["merge", "--quiet", "--json", "--checkpoint", models / "sd15.safetensors", "--lora",
                      tmp_path / "l.safetensors", "--out", tmp_path / "o"])  # fmt: skip
    report = last_json(result)
    assert report["unreachable"] == 2 and report["unreachable_tensors"][0] == "lora_unet_no_such_layer"
    assert any("no_such_layer" in warning for warning in report["warnings"])


def test_numerical_error_is_the_type(models, tmp_path):
    weights = load_file(models / "sd15.safetensors")
    weights[ATTENTION][0, 0] = float("inf")
    save_file(weights, tmp_path / "m.safetensors")
    wanted = spec(checkpoint=str(tmp_path / "m.safetensors"), loras=[str(models / "sd15-lora.safetensors")],
                  out=str(tmp_path / "o"))  # fmt: skip
    with make_plan(wanted, PathHost()) as plan, pytest.raises(NumericalError):
        run(plan, PathHost(), Context())
