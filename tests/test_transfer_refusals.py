"""transfer: what is wrong is refused, says what to do, and leaves every file as it was."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import convert_files as files
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from models import ATTENTION, cast, last_json, listing, run_cli, save_checkpoint
from safetensors.torch import load_file, save_file
from transfer_models import arguments, refusal, replacing, save_models, transfer, values

from lib_hypermerge import api
from lib_hypermerge.errors import Cancelled, InputChangedError, LayoutError, OutputError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.jobs.transfer import job
from lib_hypermerge.jobs.transfer.spec import TransferSpec


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def refused(models: Path, tmp_path: Path):
    """The error of a run on files of the folder; nothing in it, and no new file, may come of it."""

    def run(*more, lora: str = "style", source: str = "source", target: str = "target", out="new") -> dict:
        before = listing(models)
        error = refusal(*(models / f"{name}.safetensors" for name in (lora, source, target)), tmp_path / out, *more)
        assert listing(models) == before and listing(tmp_path) == {}
        return error

    return run


# --- models that do not go together ---------------------------------------------------------------------------


def test_bases_of_different_architectures(refused):
    error = refused(target="sd2")
    assert error["code"] == "wrong_model" and "different architectures" in error["what"]
    assert "Stable Diffusion 1" in error["why"] and "Stable Diffusion 2" in error["why"]


def test_a_lora_for_another_architecture_than_its_base(refused):
    error = refused(lora="xl")
    assert error["code"] == "wrong_model" and "Stable Diffusion XL" in error["why"]


def test_the_same_base_twice(refused, models, tmp_path):
    assert refused(target="source")["code"] == "nothing_changed"


def test_unrelated_models_unless_forced(refused, models, tmp_path):
    for method in ("copy", "prolora", "cross"):
        error = refused("--method", method, target="stranger")
        assert error["code"] == "wrong_model" and "not related" in error["what"]
        assert "0.0" in error["why"] and "force" in error["hint"]
    report = transfer(models / "style.safetensors", models / "source.safetensors", models / "stranger.safetensors",
                      tmp_path / "new", "--force")  # fmt: skip
    assert abs(report["similarity"]) < 0.05 and report["forced"] is True and report["skipped"] == 0
    assert any(warning.startswith("Forced. The similarity of the two bases is") for warning in report["warnings"])


def test_strangers_are_known_by_a_sample_long_before_all_layers_are_read(models, tmp_path):
    files.save(tmp_path / "all.safetensors", files.lora("sd15"))
    spec = TransferSpec.from_json({
        "loras": [str(tmp_path / "all.safetensors")], "source_base": str(models / "source.safetensors"),
        "target_base": str(models / "stranger.safetensors"), "out": str(tmp_path / "new"),
    })  # fmt: skip
    seen: list[float] = []
    with job.make_plan(spec, PathHost()) as plan, pytest.raises(LayoutError, match="24 of their layers"):
        job.run(plan, PathHost(), Context(lambda fraction, _: seen.append(fraction)))
    assert max(seen) < 0.1


def test_a_preview_refuses_the_same(refused):
    assert "not related" in refused("--dry-run", target="stranger")["what"]


def test_no_layer_above_the_least_similarity(refused, models, tmp_path):
    error = refused("--threshold", 1)
    assert error["code"] == "nothing_changed" and "below the least similarity" in error["why"]


@pytest.mark.parametrize("part", ["lora_up.weight", "alpha"])
def test_a_lora_that_changes_nothing(models, tmp_path, part):
    style = load_file(models / "style.safetensors")
    zero = {k: t * 0 if k.endswith(part) else t for k, t in style.items()}
    files.save(tmp_path / "zero.safetensors", zero)
    for more in (("--method", "copy"), ("--method", "prolora"), ("--method", "lora-x", "--threshold", 1)):
        error = refusal(tmp_path / "zero.safetensors", models / "source.safetensors", models / "target.safetensors",
                        tmp_path / "new", *more)  # fmt: skip
        assert error["code"] == "nothing_changed" and error["what"] == "zero.safetensors changes nothing."
        assert "similarity" not in error["hint"] and set(listing(tmp_path)) == {"zero.safetensors"}


def test_modules_that_are_zero_are_counted(models, tmp_path):
    style = load_file(models / "style.safetensors")
    first = next(k for k in style if k.endswith("lora_up.weight"))
    files.save(tmp_path / "some.safetensors", style | {first: style[first] * 0})
    report = transfer(tmp_path / "some.safetensors", models / "source.safetensors", models / "target.safetensors",
                      tmp_path / "new")  # fmt: skip
    assert report["skipped_because"] == {"zero as it is": 1} and report["skipped"] == 1


def test_a_lora_of_layers_that_the_target_lacks(models, tmp_path):
    small = {k: w for k, w in load_file(models / "target.safetensors").items() if "middle_block" not in k}
    save_checkpoint(tmp_path / "small.safetensors", small)
    files.save(tmp_path / "mid.safetensors", files.lora("sd15", only=lambda m: m.block == "MID"))
    error = refusal(tmp_path / "mid.safetensors", models / "source.safetensors", tmp_path / "small.safetensors",
                    tmp_path / "new")  # fmt: skip
    assert error["code"] == "wrong_model" and "no layer that the target base has" in error["what"]


# --- broken files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["source", "target", "style"])
def test_files_that_are_broken(models, tmp_path, which):
    broken = tmp_path / "models"
    broken.mkdir()
    for name in ("source", "target", "style"):
        content = (models / f"{name}.safetensors").read_bytes()
        (broken / f"{name}.safetensors").write_bytes(content[:5000] if name == which else content)
    error = refusal(*(broken / f"{name}.safetensors" for name in ("style", "source", "target")), tmp_path / "new")
    assert error["code"] == "bad_file" and which in error["what"]
    assert not (tmp_path / "new.safetensors").exists()


def test_a_checkpoint_where_a_lora_is_asked_for_and_the_other_way_round(refused):
    assert "is a checkpoint, not a LoRA" in refused(lora="source")["what"]
    assert "is a LoRA, not a checkpoint" in refused(source="style")["what"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["source", "target", "style"])
def test_numbers_that_are_none(models, tmp_path, which, value):
    paths = {}
    for name in ("style", "source", "target"):
        tensors = load_file(models / f"{name}.safetensors")
        if name == which:
            key = ATTENTION if name != "style" else next(k for k in tensors if "attn1_to_q.lora_up" in k)
            tensors[key] = tensors[key].clone()
            tensors[key].view(-1)[3] = value
        paths[name] = tmp_path / f"{name}.safetensors"
        save_file(tensors, paths[name])
    result = run_cli(arguments(paths["style"], paths["source"], paths["target"], tmp_path / "new"))
    assert result.returncode == 1
    error = last_json(result)["error"]
    assert error["code"] == "numerical" and "NaN or Inf" in error["what"] and f"{which}.safetensors" in error["what"]
    assert not (tmp_path / "new.safetensors").exists()


def test_numbers_too_large_for_the_format(models, tmp_path):
    tensors = load_file(models / "style.safetensors")
    large = {k: t.float() * (1 if k.endswith("alpha") else 1e7) for k, t in tensors.items()}
    save_file(large, tmp_path / "l.safetensors")
    for method in ("copy", "prolora"):
        command = arguments(tmp_path / "l.safetensors", models / "source.safetensors", models / "target.safetensors",
                            tmp_path / "new", "--method", method, "--dtype", "fp16")  # fmt: skip
        result = run_cli(command)
        assert result.returncode == 1 and last_json(result)["error"]["code"] == "numerical"
        assert not (tmp_path / "new.safetensors").exists()


# --- parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--method", "magic"), "'method' must be one of copy, lora-x, prolora, cross"),
        (("--threshold", "1.5"), "'threshold' must be between 0 and 1"),
        (("--threshold", "-0.1"), "'threshold' must be between 0 and 1"),
        (("--basis-energy", "0"), "'basis_energy' must be between 0.01 and 1"),
        (("--basis-energy", "1.01"), "'basis_energy' must be between 0.01 and 1"),
        (("--basis-energy", "nan"), "'basis_energy' must be a number"),
        (("--rank", "0"), "'rank' must be between 1 and 4096"),
        (("--rank", "2.5"), "whole number"),
        (("--dtype", "int8"), "'dtype' must be one of"),
        (("--method", "copy", "--basis-energy", "0.5"), "Copying uses no leading directions"),
        (("--device", "cpu"), "unrecognized arguments"),
    ],
)
def test_parameters_that_are_wrong_or_contradict_each_other(refused, more, told):
    error = refused(*more)
    assert error["code"] == "bad_request" and told.lower() in error["what"].lower()


@pytest.mark.parametrize("missing", ["--lora", "--source-base", "--target-base", "--out"])
def test_parameters_that_are_missing(models, tmp_path, missing):
    command = arguments(models / "style.safetensors", models / "source.safetensors", models / "target.safetensors",
                        tmp_path / "new")  # fmt: skip
    at = command.index(missing)
    result = run_cli(command[:at] + command[at + 2 :])
    assert result.returncode == 2 and missing in last_json(result)["error"]["what"]


def test_several_loras_need_names_of_their_own(refused, models, tmp_path):
    paths = [models / "style.safetensors"] * 1 + [models / "xl.safetensors"]
    error = refusal(paths, models / "source.safetensors", models / "target.safetensors", tmp_path / "new")
    assert error["code"] == "bad_request" and "{name}" in error["hint"]
    twice = tmp_path / "other" / "style.safetensors"
    twice.parent.mkdir()
    twice.write_bytes(paths[0].read_bytes())
    error = refusal([paths[0], twice], models / "source.safetensors", models / "target.safetensors",
                    tmp_path / "{name}-new")  # fmt: skip
    assert "would be called style-new.safetensors" in error["what"]


# --- outputs --------------------------------------------------------------------------------------------------


def test_an_existing_file_is_replaced_only_if_asked_to(models, tmp_path):
    out = tmp_path / "new.safetensors"
    out.write_bytes(b"mine")
    paths = [models / f"{name}.safetensors" for name in ("style", "source", "target")]
    assert "exists already" in refusal(*paths, out)["what"] and out.read_bytes() == b"mine"
    transfer(*paths, out, "--overwrite")
    assert len(files.load(out)) > 10


def test_inputs_are_no_outputs(models, tmp_path):
    before = listing(models)
    for name in ("style", "source", "target"):
        error = refusal(models / "style.safetensors", models / "source.safetensors", models / "target.safetensors",
                        models / name, "--overwrite")  # fmt: skip
        assert "would replace the file that it is made from" in error["what"]
    assert listing(models) == before


def test_a_folder_that_is_not_there(models, tmp_path):
    error = refusal(models / "style.safetensors", models / "source.safetensors", models / "target.safetensors",
                    tmp_path / "none" / "new")  # fmt: skip
    assert "There is no folder" in error["what"]


def test_a_full_disk(models, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(total=9, free=9))
    with pytest.raises(OutputError, match="too full"):
        job.make_plan(values(models, tmp_path), PathHost())


def test_a_preview_needs_neither_room_nor_a_free_name(models, tmp_path):
    (tmp_path / "new.safetensors").write_bytes(b"mine")
    with job.make_plan(values(models, tmp_path, preview=True), PathHost()) as plan:
        report = job.run(plan, PathHost(), Context())
    assert report.outputs == [] and listing(tmp_path) == {"new.safetensors": b"mine"}


@pytest.mark.parametrize("at", [0.0, 0.5, 0.99])
def test_a_cancelled_job_leaves_nothing(models, tmp_path, at):
    seen = [-1.0]
    with job.make_plan(values(models, tmp_path), PathHost()) as plan, pytest.raises(Cancelled):
        job.run(plan, PathHost(), Context(lambda f, _: seen.append(f), lambda: seen[-1] >= at))
    assert seen[-1] >= at and listing(tmp_path) == {}


def test_cancelled_while_blocks_are_compared(models, tmp_path):
    small = {k: w for k, w in load_file(models / "target.safetensors").items() if "input_blocks.2." not in k}
    save_checkpoint(tmp_path / "small.safetensors", small)
    told: list[str] = []
    spec = values(models, tmp_path, target_base=str(tmp_path / "small.safetensors"))
    with job.make_plan(spec, PathHost()) as plan, pytest.raises(Cancelled):
        job.run(plan, PathHost(), Context(lambda f, text: told.append(text), lambda: "unet.input.0" in told))
    assert set(listing(tmp_path)) == {"small.safetensors"}


@pytest.mark.parametrize("which", ["style", "source", "target"])
def test_a_file_that_changes_while_it_is_read(models, tmp_path, which):
    for name in ("style", "source", "target"):
        (tmp_path / f"{name}.safetensors").write_bytes((models / f"{name}.safetensors").read_bytes())
    context, done = replacing(tmp_path / f"{which}.safetensors")
    with job.make_plan(values(tmp_path, tmp_path), PathHost()) as plan, pytest.raises(InputChangedError, match=which):
        job.run(plan, PathHost(), context)
    assert done and "new.safetensors" not in listing(tmp_path)


def test_a_refused_plan_leaves_no_file_open(models, tmp_path, monkeypatch):
    opened = []
    from lib_hypermerge.files import source

    monkeypatch.setattr(source.StoredFile, "__init__", _noting(source.StoredFile.__init__, opened))
    with pytest.raises(SpecError):
        job.make_plan(values(models, tmp_path, out=str(tmp_path / "none" / "x")), PathHost())
    assert opened and all(file._file.closed for file in opened)  # noqa: SLF001


def _noting(init, opened: list):
    def noting(self, path):
        init(self, path)
        opened.append(self)

    return noting


# --- by the API -----------------------------------------------------------------------------------------------


def test_the_api_forecasts_runs_and_refuses(models, tmp_path):
    app, loras = FastAPI(), tmp_path / "loras"
    loras.mkdir()
    save_file(load_file(models / "style.safetensors"), loras / "style.safetensors")
    api.mount(app, Runner(FolderHost(models, loras)))
    client = TestClient(app)
    params = {"loras": ["style.safetensors"], "source_base": "source.safetensors", "out": "new",
              "target_base": "target.safetensors"}  # fmt: skip

    def post(**more) -> tuple[int, dict]:
        answer = client.post(f"{api.ROOT}/jobs", json={"verb": "transfer", **more})
        return answer.status_code, answer.json()

    status, forecast = post(params=params, dry_run=True)
    assert status == 202 and forecast["paired"] == {"place": forecast["modules"]} and forecast["expected_seconds"] > 0
    status, told = post(params={**params, "target_base": "sd2.safetensors"})
    assert status == 422 and told["error"]["code"] == "wrong_model"
    status, told = post(params={**params, "method": "copy", "basis_energy": 0.5})
    assert status == 422 and told["error"]["code"] == "bad_request"
    _, started = post(params=params)
    deadline = time.monotonic() + 120
    while started["status"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        started = client.get(f"{api.ROOT}/jobs/{started['id']}").json()
    assert started["status"] == "done" and started["report"]["similarity"] > 0.9
    assert started["report"]["modules"] == forecast["modules"]
    size = (loras / "new.safetensors").stat().st_size
    assert 0.5 < forecast["expected_bytes"] / size < 2
    schema = client.get(f"{api.ROOT}/schema").json()["verbs"]["transfer"]["parameters"]
    assert schema["properties"]["method"]["enum"] == ["copy", "lora-x", "prolora", "cross"]
    assert schema["required"] == ["loras", "source_base", "target_base", "out"]


def test_the_forecast_of_a_pruned_target_says_what_is_to_be_paired(models, tmp_path):
    small = {k: w for k, w in load_file(models / "target.safetensors").items() if "input_blocks.5." not in k}
    save_checkpoint(tmp_path / "small.safetensors", cast(small, torch.float16))
    with job.make_plan(values(models, tmp_path, target_base=str(tmp_path / "small.safetensors")), PathHost()) as plan:
        told = plan.to_json(PathHost())
    assert told["lists_to_pair_by_similarity"] == 1 and told["unmatched"] > 0
    assert told["bytes_to_read"] > 0 and told["expected_memory"] > 0 and len(told["outputs"]) == 1
