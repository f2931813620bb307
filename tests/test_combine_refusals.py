"""combine: what is wrong is refused before anything is computed; what stops in the middle leaves no file."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from combine_files import combine, missed, read, refused, save_base, some, twin, write
from convert_files import lora, save
from convert_files import some as some_layers
from fastapi import FastAPI
from fastapi.testclient import TestClient
from killing import die, killed
from models import last_json, listing, run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge import api
from lib_hypermerge.errors import Cancelled, InputChangedError, OutputError
from lib_hypermerge.files import writer
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.combine.job import CombineSpec, make_plan, run
from lib_hypermerge.jobs.combine.names import told_apart
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import Runner


@pytest.fixture
def loras(tmp_path) -> Path:
    """a, b for SD1, xl for SDXL."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for seed, name in enumerate("ab"):
        save(folder / f"{name}.safetensors", lora("sd15", only=some_layers, seed=seed), {})
    save(folder / "xl.safetensors", lora("sdxl", only=some_layers), {})
    return folder


def refusal(folder: Path, *arguments) -> str:
    """All that is said; nothing in the folder may have changed."""
    before = listing(folder)
    error = refused(*arguments)
    assert listing(folder) == before
    return " ".join(error[part] for part in ("what", "why", "hint"))


def test_different_architectures(loras, tmp_path):
    out, xl = ["--out", tmp_path / "o"], loras / "xl.safetensors"
    said = refusal(tmp_path, "--lora", loras / "a.safetensors", "--lora", xl, *out)
    assert all(part in said for part in ("a.safetensors", "xl.safetensors", "Stable Diffusion 1", "XL"))
    base = save_base(tmp_path / "base.safetensors")
    said = refusal(tmp_path, "--lora", xl, "--checkpoint", base, *out)
    assert "xl.safetensors" in said and "XL" in said


def test_models_of_different_widths(loras, tmp_path):
    wide = save(tmp_path / "wide.safetensors", lora("sd15", only=some_layers, divisor=16), {})
    said = refusal(tmp_path, "--lora", loras / "a.safetensors", "--lora", wide, "--out", tmp_path / "o")
    assert "different widths" in said and "wide.safetensors" in said


def test_a_sum_of_nothing(loras, tmp_path):
    a = loras / "a.safetensors"
    assert "weight 0" in refusal(tmp_path, "--lora", a, 0, "--out", tmp_path / "o")
    assert "weight 0" in refusal(tmp_path, "--lora", a, "--blocks", "NONE", "--out", tmp_path / "o")
    same = shutil.copyfile(a, loras / "same.safetensors")
    for more in ([], ["--rank", 2], ["--energy", 0.5], ["--size", 1], ["--dtype", "fp32"]):
        said = refusal(tmp_path, "--lora", a, 0.3, "--lora", same, -0.3, "--out", tmp_path / "o", *more)
        assert "cancel each other exactly" in said
    tensors = load_file(a)
    save_file({k: torch.zeros_like(t) if "up" in k else t for k, t in tensors.items()}, loras / "zero.safetensors")
    zero, out = loras / "zero.safetensors", ["--out", tmp_path / "o"]
    said = refusal(tmp_path, "--lora", zero, *out)
    assert "zero.safetensors changes nothing" in said and "cancel" not in said
    same = shutil.copyfile(zero, loras / "same.safetensors")
    for more in ([], ["--method", "ties"], ["--size", 1]):
        said = refusal(tmp_path, "--lora", zero, "--lora", same, *out, *more)
        assert "All changes of each of them are zero" in said and "cancel" not in said


def test_whole_matrices_that_cancel_but_for_rounding(tmp_path):
    base = save_base(tmp_path / "base.safetensors")
    full = write(tmp_path / "a.safetensors", base, "full", 0, some)
    second = twin(full)
    weights = ((full, 0.3), (second, 0.4), (twin(second), -0.7))
    flagged = [item for lora, weight in weights for item in ("--lora", lora.path, weight)]
    said = refusal(tmp_path, *flagged, "--out", tmp_path / "o")
    assert "cancel each other exactly" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "No LoRA was named"), (["--lora", "none.safetensors"], "none.safetensors"),
        (["--lora", "a.safetensors", "101"], "beyond ±100"), (["--lora", "a.safetensors", "nan"], "number"),
        (["--lora", "a.safetensors", "--blocks", "1,2"], "17 or 26"),
        (["--lora", "a.safetensors", "--dtype", "fp8"], "fp16"),
        (["--prompt", "<lora:a:0.5"], "is not closed"), (["--prompt", "<lora:a:many>"], "no weight"),
        (["--prompt", "<lora:a:1><lora:a:2>"], "2 times"),
        (["--prompt", "<lora:c:1>", "--lora-dir", "."], "no LoRA called 'c'"),
        (["--prompt", "<lora:a:1>", "--lora-dir", "nodir"], "There is no folder nodir"),
        (["--lora", "a.safetensors", "--lora-dir", "nodir"], "There is no folder nodir"),
        (["--lora", "a.safetensors", "--lora", "../loras/a.safetensors", "2"], "a.safetensors is named 2 times"),
        (["--lora", "a.safetensors", "--prompt", "<lora:a:-1>"], "Its weights are 1 and -1"),
        (["--lora", "a.safetensors", "--size", "0.02"], "too small"),
        (["--lora", "a.safetensors", "--checkpoint", "b.safetensors"], "is a LoRA"),
        (["--lora", "a.safetensors", "--out", "a"], "would replace the file"),
        (["--lora", "a.safetensors", "--out", "b"], "exists already"),
    ],
)  # fmt: skip
def test_requests_that_are_wrong(loras, arguments, said, monkeypatch):
    monkeypatch.chdir(loras)
    more = [] if "--out" in arguments else ["--out", "o"]
    assert said in refusal(loras, *arguments, *more)


@pytest.mark.parametrize("kind", ["dora_input", "ia3", "oft", "glora"])
def test_what_depends_on_a_checkpoint_asks_for_it(tmp_path, kind):
    base = save_base(tmp_path / "base.safetensors")
    one = write(tmp_path / "a.safetensors", base, kind, 0, some)
    said = refusal(tmp_path, "--lora", one.path, "--out", tmp_path / "o")
    assert "depends on the checkpoint's weights" in said and "a.safetensors" in said


def test_files_of_one_name_are_told_apart(loras, tmp_path):
    a, b = loras / "a.safetensors", loras / "sub" / "a.safetensors"
    b.parent.mkdir()
    shutil.copyfile(loras / "b.safetensors", b)
    answer = combine("--lora", a, "--lora", b, "--lora", loras / "b.safetensors", "--out", tmp_path / "o", "--dry-run")
    assert [one["name"] for one in answer["loras"]] == ["loras/a.safetensors", "sub/a.safetensors", "b.safetensors"]
    shutil.copyfile(loras / "xl.safetensors", b)
    said = refusal(tmp_path, "--lora", a, "--lora", b, "--out", tmp_path / "o")
    assert "loras/a.safetensors and sub/a.safetensors are for different models" in said


def test_names_that_tell_apart():
    paths = [Path("/x/y/a"), Path("/z/y/a"), Path("/x/y/b"), Path("/a"), Path("/z/y/a")]
    assert told_apart(paths) == ["x/y/a", "z/y/a", "b", "/a", "z/y/a"]


def test_a_size_that_no_disk_has(loras, tmp_path):
    """What there is needs no more room than it needs."""
    flagged = ["--lora", loras / "a.safetensors", "--lora", loras / "b.safetensors"]
    answer = combine(*flagged, "--out", tmp_path / "o", "--size", 1e9)
    size = (tmp_path / "o.safetensors").stat().st_size
    with make_plan(spec(loras, tmp_path / "p", size=1e9), PathHost()) as plan:
        told = plan.to_json(PathHost())["expected_bytes"]
    assert any("stays below the size" in note for note in answer["warnings"])
    assert 0.9 * size <= told < 1.5 * size


def test_numbers_that_are_none(loras, tmp_path):
    for value, part in ((float("nan"), "lora_up"), (float("inf"), "lora_down")):
        tensors = load_file(loras / "b.safetensors")
        key = next(k for k in tensors if part in k)
        tensors[key].view(-1)[0] = value
        save_file(tensors, loras / "broken.safetensors")
        before = listing(tmp_path)
        flagged = ["--lora", loras / "a.safetensors", "--lora", loras / "broken.safetensors"]
        result = run_cli(["combine", "--json", "--quiet", *flagged, "--out", tmp_path / "o"])
        assert result.returncode == 1 and last_json(result)["error"]["code"] == "numerical"
        assert key.split(".")[0] in result.stderr and "broken.safetensors" in result.stderr
        assert listing(tmp_path) == before


def test_what_fp16_cannot_hold_names_the_layer_and_the_way_out(loras, tmp_path):
    tensors = {k: t.float() * (1e5 if "lora_" in k else 1) for k, t in load_file(loras / "a.safetensors").items()}
    save_file(tensors, loras / "huge.safetensors")
    flagged = ["--lora", loras / "huge.safetensors", 100, "--out", tmp_path / "o"]
    result = run_cli(["combine", "--json", "--quiet", *flagged])
    assert result.returncode == 1 and "lora_" in last_json(result)["error"]["what"]
    assert "fp32 or bf16" in last_json(result)["error"]["hint"]
    combine(*flagged, "--dtype", "bf16")


# --- stopped in the middle ------------------------------------------------------------------------------------------


def spec(loras: Path, out: Path, **more) -> CombineSpec:
    names = [{"lora": str(loras / f"{name}.safetensors"), "weight": 0.5} for name in "ab"]
    return CombineSpec.from_json({"loras": names, "out": str(out), **more})


def combined(wanted: CombineSpec, **context):
    with make_plan(wanted, PathHost()) as plan:
        return run(plan, PathHost(), Context(**context))


@pytest.mark.parametrize("more", [{}, {"size": 0.2}, {"method": "ties"}])
def test_cancelling_leaves_nothing(loras, tmp_path, more):
    before, seen = listing(tmp_path), []

    def on_progress(fraction: float, _text: str) -> None:
        seen.append(fraction)

    for stop in (0.0, 0.3, 0.9, 0.99):
        with pytest.raises(Cancelled):
            combined(
                spec(loras, tmp_path / "o", **more), on_progress=on_progress,
                interrupted=lambda s=stop: seen[-1:] >= [s],
            )  # fmt: skip
        assert listing(tmp_path) == before
        seen.clear()
    report = combined(spec(loras, tmp_path / "o", **more), on_progress=on_progress)
    assert report.modules and seen == sorted(seen) and seen[-1] == 0.99


@pytest.mark.parametrize("what", ["layer", "commit"])
def test_a_killed_job_leaves_no_file_and_keeps_what_was_there(loras, tmp_path, what, monkeypatch):
    (tmp_path / "o.safetensors").write_bytes(b"before")
    before = listing(tmp_path)

    def job() -> None:
        if what == "commit":
            writer.SafetensorsWriter.publish = lambda self: die()  # type: ignore[method-assign]
            combined(spec(loras, tmp_path / "o", overwrite=True))
        combined(spec(loras, tmp_path / "o", overwrite=True), on_progress=lambda f, _: die() if f > 0.5 else None)

    assert killed(job)
    assert {k: v for k, v in listing(tmp_path).items() if not k.startswith(".")} == before


def test_a_lora_that_changes_while_it_is_read(loras, tmp_path):
    path = loras / "b.safetensors"

    def replace(fraction: float, _text: str) -> None:
        if 0.2 < fraction < 0.9 and path.stat().st_mtime_ns != 1:
            os.utime(path, ns=(1, 1))

    with pytest.raises(InputChangedError):
        combined(spec(loras, tmp_path / "o"), on_progress=replace)
    assert not (tmp_path / "o.safetensors").exists()


def test_a_full_disk(loras, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        combined(spec(loras, tmp_path / "o"))
    assert not list(tmp_path.glob("*o*.safetensors"))


def test_a_preview_writes_nothing_and_minds_no_file_of_that_name(loras, tmp_path):
    (tmp_path / "o.safetensors").write_bytes(b"before")
    before = listing(tmp_path)
    report = combined(spec(loras, tmp_path / "o", preview=True))
    assert report.outputs == [] and report.details["preview"] and listing(tmp_path) == before
    assert not report.details["prompt"]
    written = combined(spec(loras, tmp_path / "p"))
    assert abs(report.details["bytes"] - written.outputs[0].bytes) < 16
    assert report.relative_error == written.relative_error


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_over_http_by_prompt(loras):
    app = FastAPI()
    api.mount(app, Runner(FolderHost(loras, loras)))
    client, jobs = TestClient(app), api.ROOT + "/jobs"
    params = {"prompt": "<lora:a:0.5><lora:b:0.25:-2>", "out": "made", "dtype": "fp32"}
    told = client.post(jobs, json={"verb": "combine", "params": params, "dry_run": True}).json()
    assert [lora["weight"] for lora in told["loras"]] == [0.5, -2] and told["modules"] > 50 and told["blocks"] == 26
    assert not (loras / "made.safetensors").exists()
    job = client.post(jobs, json={"verb": "combine", "params": params}).json()
    deadline = time.monotonic() + 60
    while (state := client.get(f"{jobs}/{job['id']}").json())["status"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert state["status"] == "done" and state["report"]["prompt"] == "<lora:made:1>"
    a, b = read(loras / "a.safetensors"), read(loras / "b.safetensors")
    goal = {name: 0.5 * a[name] + (0.25 if name.startswith("lora_te") else -2) * b[name] for name in a}
    assert missed(read(loras / "made.safetensors"), goal) < 1e-6
    for asked, status in (
        ({"prompt": "<lora:../a:1>"}, 422), ({"loras": ["/etc/passwd"]}, 422), ({}, 422),
        ({"prompt": "<lora:a:1>", "lora_dir": "/"}, 422),  # a page has its own list of LoRAs
        ({"prompt": "<lora:a:1>"}, 202),
    ):  # fmt: skip
        request = {"verb": "combine", "params": {**asked, "out": "x"}, "dry_run": True}
        assert client.post(jobs, json=request).status_code == status
    schema = client.get(api.ROOT + "/schema").json()["verbs"]["combine"]["parameters"]
    assert schema["required"] == ["out"] and schema["properties"]["prompt"]["type"] == ["string", "null"]
