"""transfer of several LoRAs: what is wrong with one stands in its row, what is wrong with all ends the job."""

from __future__ import annotations

from pathlib import Path

import convert_files as files
import pytest
from models import ATTENTION, last_json, listing, run_cli, save_checkpoint
from safetensors.torch import load_file
from transfer_models import arguments, replacing, save_models, transfer, values

from lib_hypermerge.errors import InputChangedError
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.transfer import job


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def batch(models: Path, tmp_path: Path, *more, only: str = "*") -> tuple[int, dict]:
    """(exit code, answer) for a folder with one sound LoRA in it and one of each kind that is not."""
    folder, out = tmp_path / "loras", tmp_path / "out"
    if not folder.exists():
        folder.mkdir()
        out.mkdir()
        style = load_file(models / "style.safetensors")
        ups = [k for k in style if k.endswith("lora_up.weight")]
        files.save(folder / "good.safetensors", style)
        files.save(folder / "zero.safetensors", {k: t * 0 if k in ups else t for k, t in style.items()})
        damaged = style | {ups[-1]: style[ups[-1]] * float("nan")}
        files.save(folder / "nan.safetensors", damaged)
        for name in ("source", "xl"):
            (folder / f"{name}.safetensors").write_bytes((models / f"{name}.safetensors").read_bytes())
        (folder / "broken.safetensors").write_bytes(b"no header")
        (out / "good-new.safetensors").write_bytes(b"mine")
        files.save(folder / "there.safetensors", style)
        (out / "there-other.safetensors").write_bytes(b"mine")
    command = arguments(folder / only, models / "source.safetensors", models / "target.safetensors",
                        out / "{name}-other", *more)  # fmt: skip
    result = run_cli(command)
    return result.returncode, last_json(result)


def test_what_is_wrong_with_one_of_several_stands_in_its_row(models, tmp_path):
    code, answer = batch(models, tmp_path)
    assert code == 1 and [row["name"] for row in answer["loras"]] == ["good.safetensors"]
    failed = {row["name"].partition(".")[0]: row["error"] for row in answer["failed"]}
    assert failed.keys() == {"zero", "nan", "source", "xl", "broken", "there"}
    for name, told in (("zero", "changes nothing"), ("nan", "NaN or Inf"), ("source", "checkpoint, not a LoRA"),
                       ("there", "exists already")):  # fmt: skip
        assert told in failed[name]["what"]
    assert failed["xl"]["code"] == "wrong_model" and failed["broken"]["code"] == "bad_file"
    out = tmp_path / "out"
    assert set(listing(out)) == {"good-new.safetensors", "good-other.safetensors", "there-other.safetensors"}
    assert (out / "there-other.safetensors").read_bytes() == b"mine"
    assert answer["prompt"] == "<lora:good-other:1>"
    alone = transfer(tmp_path / "loras" / "good.safetensors", models / "source.safetensors",
                     models / "target.safetensors", out / "alone")  # fmt: skip
    assert files.same_bits(load_file(out / "alone.safetensors"), load_file(out / "good-other.safetensors"))
    for figure in ("similarity", "layers", "components", "actions", "skipped", "modules", "relative_error"):
        assert answer[figure] == alone[figure], figure


def test_a_preview_of_several_has_the_same_rows(models, tmp_path):
    code, answer = batch(models, tmp_path, "--dry-run")
    assert code == 1 and sorted(row["name"] for row in answer["loras"]) == ["good.safetensors", "there.safetensors"]
    assert len(answer["failed"]) == 5 and len(listing(tmp_path / "out")) == 2


@pytest.mark.parametrize("only", ["[xb]*", "[nz]*"])
def test_where_none_of_several_is_right_the_first_ones_error_is_told(models, tmp_path, only):
    code, answer = batch(models, tmp_path, only=only)
    assert code == 2 and answer["error"]["what"].startswith("None of the 2 LoRAs c")
    assert answer["error"]["why"].startswith(("broken.safetensors: ", "nan.safetensors: "))
    assert len(listing(tmp_path / "out")) == 2


def test_bases_that_are_wrong_end_a_batch(models, tmp_path):
    folder = tmp_path / "loras"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.safetensors").write_bytes((models / "style.safetensors").read_bytes())
    broken = load_file(models / "target.safetensors")
    broken[ATTENTION] = broken[ATTENTION] * float("nan")
    save_checkpoint(tmp_path / "broken.safetensors", broken)
    for target in (models / "stranger.safetensors", tmp_path / "broken.safetensors"):
        result = run_cli(arguments(folder, models / "source.safetensors", target, tmp_path / "{name}-new"))
        assert result.returncode in (1, 2)
        assert last_json(result)["error"]["code"] == ("wrong_model" if "stranger" in target.name else "numerical")
        assert {path.name for path in tmp_path.iterdir()} == {"loras", "broken.safetensors"}


def test_the_forecast_of_several_tells_which_cannot_be(models, tmp_path):
    paths = [str(models / f"{name}.safetensors") for name in ("style", "xl")]
    with job.make_plan(values(models, tmp_path, loras=paths, out=str(tmp_path / "{name}-new")), PathHost()) as plan:
        told = plan.to_json(PathHost())
    assert len(told["outputs"]) == 1 and any("xl.safetensors" in warning for warning in told["warnings"])


@pytest.mark.parametrize("which", ["style", "target"])
def test_one_of_several_that_changes_while_it_is_read(models, tmp_path, which):
    for name in ("style", "target"):
        (tmp_path / f"{name}.safetensors").write_bytes((models / f"{name}.safetensors").read_bytes())
    (tmp_path / "second.safetensors").write_bytes((models / "style.safetensors").read_bytes())
    context, _ = replacing(tmp_path / f"{which}.safetensors")
    spec = values(models, tmp_path, loras=[str(tmp_path / f"{name}.safetensors") for name in ("style", "second")],
                  target_base=str(tmp_path / "target.safetensors"), out=str(tmp_path / "{name}-new"))  # fmt: skip
    with job.make_plan(spec, PathHost()) as plan:
        if which == "target":
            with pytest.raises(InputChangedError):
                job.run(plan, PathHost(), context)
        else:
            report = job.run(plan, PathHost(), context)
            assert report.exit_code == 1 and report.details["failed"][0]["error"]["code"] == "input_changed"
    new = {name for name in listing(tmp_path) if name.endswith("-new.safetensors")}
    assert new == (set() if which == "target" else {"second-new.safetensors"})
