"""Bad input is refused before anything is computed, with what, why and what to try; nothing is left behind."""

import json
import shutil

import pytest
import torch
from convert_files import arguments, convert, layers, linear_or_conv, load, lora, refusal, save, size, some
from models import base_weights, last_json, listing, run_cli, save_checkpoint
from safetensors.torch import save_file

from lib_hypermerge.errors import Cancelled
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs import convert_modules
from lib_hypermerge.jobs.convert_spec import ConvertSpec
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import execute
from lib_hypermerge.jobs.verbs import find_verb


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "a.safetensors", lora("sd15", only=some))


def test_an_unknown_architecture(tmp_path):
    names = [f"lora_unet_strange_{i}.lora_{end}.weight" for i in range(9) for end in ("up", "down")]
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "a.safetensors")
    error = refusal(tmp_path / "a.safetensors", tmp_path / "b")
    assert error["code"] == "wrong_model" and "does not know" in error["what"]


def test_a_mixture_of_two_architectures(tmp_path):
    mixed = lora("sd15", only=lambda m: m.component == "unet") | lora("sdxl", only=lambda m: m.component == "unet")
    error = refusal(save(tmp_path / "a.safetensors", mixed), tmp_path / "b", "--to", "diffusers")
    assert error["code"] == "bad_file" and "same layer twice" in error["what"]


@pytest.mark.parametrize("end", ["lora_up.weight", "lora_down.weight"])
def test_half_a_module(tmp_path, end):
    tensors = lora("sd15", only=some)
    del tensors[next(k for k in tensors if k.endswith(end))]
    error = refusal(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "peft")
    assert error["code"] == "bad_file" and end in error["what"]


def test_ranks_that_disagree(tmp_path):
    tensors = lora("sd15", only=some)
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[key] = tensors[key][:, :3].contiguous()
    error = refusal(save(tmp_path / "a.safetensors", tensors), tmp_path / "b")
    assert error["code"] == "bad_file" and key.split(".")[0] in error["what"]


def test_quantised_factors(tmp_path):
    tensors = lora("sd15", only=some)
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[key] = tensors[key].to(torch.int8)
    error = refusal(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "peft")
    assert error["code"] == "bad_file" and key in error["what"] and "I8" in error["what"]
    assert not (tmp_path / "b").exists()


def test_shapes_that_fit_no_weight(tmp_path):
    base = save_checkpoint(tmp_path / "base.safetensors", base_weights("sd15"))
    tensors = lora("sd15", only=some)
    key = next(k for k in tensors if k.endswith("attn1_to_q.lora_up.weight"))
    tensors[key] = torch.ones(7, 4).half()
    error = refusal(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--checkpoint", base)
    assert error["code"] == "wrong_model" and "does not fit" in error["what"]


def test_shapes_that_fit_no_weight_of_a_full_sized_model(tmp_path):
    """Without a checkpoint the architecture's own sizes are what a few odd modules are held against."""
    tensors = lora("sd15", divisor=1, rank=lambda i: 1, only=lambda m: some(m) and "attn1" in m.path)
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "diffusers")
    key = next(k for k in tensors if k.endswith("attn1_to_q.lora_up.weight"))
    error = refusal(save(tmp_path / "c.safetensors", tensors | {key: torch.ones(7, 1).half()}), tmp_path / "d")
    assert error["code"] == "wrong_model" and "not of the size" in error["what"]


def test_alpha_0_and_alpha_missing(tmp_path):
    """Alpha 0 changes nothing, and stays so; where it is missing the scale is 1."""
    tensors = lora("sd15", only=some, alpha=lambda i: (0.0, None)[i % 2])
    convert(save(tmp_path / "a.safetensors", tensors), tmp_path / "b", "--to", "peft")
    config = json.loads((tmp_path / "b" / "unet" / "adapter_config.json").read_text())
    assert {config["lora_alpha"], *config["alpha_pattern"].values()} == {0, 4}
    convert(tmp_path / "b", tmp_path / "c")
    after = load(tmp_path / "c.safetensors")
    assert {k: float(t) for k, t in after.items() if "alpha" in k} == {
        k: float(t) for k, t in tensors.items() if "alpha" in k
    }
    answer = convert(tmp_path / "a.safetensors", tmp_path / "d", "--to", "diffusers")
    idle = sorted(k.removesuffix(".alpha") for k, t in tensors.items() if "alpha" in k and float(t) == 0)
    told = f"a.safetensors: {len(idle)} modules have alpha 0, such as {idle[0]}: they change nothing."
    assert told in answer["warnings"]
    assert answer["inexact"] == sum(float(t) == 0 for k, t in tensors.items() if "alpha" in k)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_the_output_is_the_input(source, to):
    error = refusal(source, source, "--to", to, "--overwrite")
    assert "would replace" in error["what"]
    assert listing(source.parent).keys() == {"a.safetensors"}


def test_a_folder_that_the_input_lies_in_is_not_replaced(tmp_path, source):
    convert(source, tmp_path / "o", "--to", "peft")
    inner = tmp_path / "o" / "unet"
    assert "lies within" in refusal(inner, tmp_path / "o", "--to", "peft", "--overwrite")["what"]
    assert "would replace" in refusal(tmp_path / "o", tmp_path / "o", "--to", "peft", "--overwrite")["what"]


def test_an_existing_output(tmp_path, source):
    (tmp_path / "o.safetensors").write_text("mine")
    assert "exists already" in refusal(source, tmp_path / "o")["what"]
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis").write_text("mine")
    assert "exists already" in refusal(source, tmp_path / "o", "--to", "peft")["what"]
    assert "other files" in refusal(source, tmp_path / "o", "--to", "peft", "--overwrite")["what"]
    convert(source, tmp_path / "o", "--overwrite")
    assert (tmp_path / "o" / "thesis").read_text() == "mine"


def test_a_full_disk(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    for to in ("kohya", "diffusers", "peft"):
        result = run_cli(arguments(source, tmp_path / "o", "--to", to))
        assert result.returncode == 1
        assert last_json(result)["error"]["code"] == "output"
    assert listing(tmp_path).keys() == {"a.safetensors"}


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, source, to, monkeypatch):
    make, made = convert_modules.ModuleWork.make, []

    def fails(self, unit):
        made.append(unit)
        if len(made) > 10:
            raise RuntimeError("boom")
        return make(self, unit)

    monkeypatch.setattr(convert_modules.ModuleWork, "make", fails)
    result = run_cli(arguments(source, tmp_path / "o", "--to", to))
    assert result.returncode == 1 and "boom" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_an_input_that_changes_meanwhile(tmp_path, source, to, monkeypatch):
    make = convert_modules.ModuleWork.make

    def meanwhile(self, unit):
        with source.open("ab") as file:
            file.write(b"x")
        return make(self, unit)

    monkeypatch.setattr(convert_modules.ModuleWork, "make", meanwhile)
    result = run_cli(arguments(source, tmp_path / "o", "--to", to))
    assert last_json(result)["error"]["code"] == "input_changed"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_number_too_large_for_the_format(tmp_path):
    tensors = lora("sd15", only=some, dtype=torch.float32)
    key = next(iter(tensors))
    tensors[key].fill_(1e6)
    result = run_cli(arguments(save(tmp_path / "a.safetensors", tensors), tmp_path / "o", "--dtype", "fp16"))
    error = last_json(result)["error"]
    assert result.returncode == 1 and error["code"] == "numerical"
    assert error["what"].startswith(key) and "Keep the number format" in error["hint"] and "fp32" in error["hint"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_change_that_is_computed_and_too_large_for_the_format(tmp_path):
    tensors = lora("sd15", only=lambda m: some(m) and "attn1" in m.path, dtype=torch.float32, alpha=lambda i: 4.0)
    key = next(iter(tensors)).split(".")[0]
    tensors[f"{key}.alpha"].fill_(1e15)
    source = save(tmp_path / "a.safetensors", tensors)
    result = run_cli(arguments(source, tmp_path / "o", "--family", "lora", "--rank", 2, "--dtype", "fp16"))
    error = last_json(result)["error"]
    assert result.returncode == 1 and error["code"] == "numerical" and key in error["what"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_alpha_that_does_not_fold_into_the_format(tmp_path):
    tensors = lora("sd15", only=some, alpha=lambda i: 4e6 if i == 0 else 4.0)
    source = save(tmp_path / "a.safetensors", tensors)
    result = run_cli(arguments(source, tmp_path / "o", "--to", "diffusers", "--dtype", "fp16"))
    error = last_json(result)["error"]
    assert result.returncode == 1 and error["code"] == "numerical" and error["what"].startswith("unet.")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_what_is_not_a_number_is_carried_and_told(tmp_path, to):
    """Of a layer, and in kohya's dialect of a module that no layer answers to."""
    tensors = lora("sd15", only=some)
    keys = [k for k in tensors if k.endswith("lora_up.weight")]
    tensors[keys[0]][0, 0], tensors[keys[1]][1, 1] = torch.nan, torch.inf
    odd = {f"lora_unet_odd.lora_{end}.weight": torch.full((2, 2), torch.nan) for end in ("up", "down")}
    more = odd if to == "kohya" else {}
    answer = convert(save(tmp_path / "a.safetensors", tensors | more), tmp_path / "b", "--to", to)
    wanted = sorted([k.split(".")[0] for k in keys[:2]] + (["lora_unet_odd"] if more else []))
    assert answer["strange"] == len(wanted)
    told = f"{len(wanted)} modules hold NaN or Inf, as they did before, such as {', '.join(wanted)}."
    assert told in answer["warnings"]


def test_what_is_not_a_number_is_no_lora_to_compute_with(tmp_path):
    tensors = lora("sd15", only=some)
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[key][0, 0] = torch.inf
    source = save(tmp_path / "a.safetensors", tensors)
    for more in ([], ["--rank", 2]):
        result = run_cli(arguments(source, tmp_path / "o", "--family", "lora", *more))
        error = last_json(result)["error"]
        assert result.returncode == 1 and error["code"] == "numerical" and key.split(".")[0] in error["what"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_not_a_number_in_what_has_to_be_decomposed(tmp_path):
    diffs = {f"{m.name}.diff": torch.zeros(size(m)) for m in layers("sd15") if linear_or_conv(m) and some(m)}
    next(iter(diffs.values())).fill_(torch.nan)
    source = save(tmp_path / "a.safetensors", diffs)
    result = run_cli(arguments(source, tmp_path / "o", "--family", "lora", "--rank", 2))
    assert last_json(result)["error"]["code"] == "numerical"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--rank", 4], "the family is to stay"), (["--family", "lora", "--rank", 4, "--energy", 0.5], "Both a rank"),
        (["--dtype", "fp8_e4m3"], "8-bit"), (["--prune"], "about checkpoints"),
        (["--vae-dtype", "fp16"], "about checkpoints"),
        (["--rank", 0, "--family", "lora"], "between 1"), (["--energy", 2, "--family", "lora"], "between"),
        (["--to", "comfy"], "kohya, diffusers, peft"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_go_together(tmp_path, source, more, told):
    assert told in refusal(source, tmp_path / "o", *more)["what"]


def test_nothing_to_convert():
    result = run_cli(["convert", "--out", "o", "--json"])
    assert result.returncode == 2 and "Nothing to convert" in last_json(result)["error"]["what"]


def test_names_are_suggested_after_what_goes_in():
    suggest = ConvertSpec.suggest_name
    assert suggest({}) == ""
    assert suggest({"lora": "x/style.safetensors", "to": "peft"}) == "style-peft"
    assert suggest({"lora": "style.safetensors", "to": "kohya", "family": "lora"}) == "style-lora"
    assert suggest({"checkpoint": "model.ckpt", "dtype": "fp16"}) == "model-fp16"
    assert suggest({"checkpoint": "model.ckpt"}) == "model-converted"


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft", "checkpoint"])
@pytest.mark.parametrize("after", [1, 20, 60])
def test_a_job_that_is_stopped_leaves_nothing(tmp_path, to, after):
    verb, asked = find_verb("convert"), []
    if to == "checkpoint":
        source = save_checkpoint(tmp_path / "a.safetensors", base_weights("sd15"))
        values = {"checkpoint": str(source), "dtype": "fp16"}
    else:
        source = save(tmp_path / "a.safetensors", lora("sd15", only=some))
        values = {"lora": str(source), "to": to}

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > after

    spec = verb.spec.from_json(values | {"out": str(tmp_path / "o")})
    with pytest.raises(Cancelled):
        execute(verb, spec, PathHost(), Context(interrupted=interrupted))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
