"""The preview of a hyper-merge by command line and API: everything is measured, nothing is written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from models import base_weights, last_json, listing, rank_change, run_cli, save_checkpoint, tuned_weights

from lib_hypermerge import api
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.runner import Runner

QUICK = {"ranks": "2,1", "starts": 1, "iterations": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models and their base."""
    made = tmp_path_factory.mktemp("preview")
    base = base_weights()
    save_checkpoint(made / "base.safetensors", base)
    for seed, name in enumerate("abc"):
        save_checkpoint(made / f"{name}.safetensors", tuned_weights(base, rank_change(2), seed))
    return made


@pytest.mark.parametrize("from_base", [False, True])
def test_dry_run_of_the_command_line_measures_and_writes_nothing(folder: Path, from_base: bool) -> None:
    before = listing(folder)
    models = [folder / f"{name}.safetensors" for name in "abc"]
    flags = [part for name, value in QUICK.items() for part in (f"--{name}", value)]
    command = ["hyper", "--model", *models[:2], "--model", models[2], "--name", "family", "--out-dir", folder / "out",
               *flags, *(["--base", folder / "base.safetensors"] if from_base else []), "--device", "cpu", "--quiet",
               "--dry-run", "--json"]  # fmt: skip
    told = run_cli(command)
    assert told.returncode == 0, told.stderr
    report = last_json(told)
    assert list(report["models"]) == ["a", "b", "c"]
    assert all(prompt.startswith("<lora:family-1:") for prompt in report["prompts"].values())
    assert report["outputs"] == []
    assert 0 < report["residual_share"] < 1
    assert report["from_base"] is from_base and len(report["alternatives"]) == 5
    assert listing(folder) == before
    said = run_cli([part for part in command if part not in ("--json", "--quiet")])
    assert said.returncode == 0, said.stderr
    assert ("choose it as the base to compare" in said.stdout) is not from_base


def test_the_api_has_a_quick_forecast_and_previews_as_jobs(folder: Path) -> None:
    before = listing(folder)
    app = FastAPI()
    api.mount(app, Runner(FolderHost(folder, folder)))
    client = TestClient(app)
    params = {"models": [f"{name}.safetensors" for name in "abc"], "name": "family", "device": "cpu", **QUICK}
    forecast = client.post(f"{api.ROOT}/jobs", json={"verb": "hyper", "params": params, "dry_run": True}).json()
    assert [lora["rank"] for lora in forecast["loras"]] == [2, 1]
    assert "residual_share" not in forecast
    job = client.post(f"{api.ROOT}/jobs", json={"verb": "hyper", "params": {**params, "preview": True}}).json()
    deadline = time.monotonic() + 120
    while job["status"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        job = client.get(f"{api.ROOT}/jobs/{job['id']}").json()
    assert job["status"] == "done", job["error"]
    assert job["report"]["preview"] is True
    assert listing(folder) == before
