"""The HTTP API: jobs by POST, their state, cancelling, the schema, authentication."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from models import base_weights, rank_change, save_pair, tuned_weights

from lib_hypermerge import api
from lib_hypermerge.errors import BusyError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost, file_stem
from lib_hypermerge.jobs.extract_layers import LayerWork
from lib_hypermerge.jobs.extract_spec import ExtractSpec
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import CANCELLED, DONE, QUEUED, Runner

JOBS = api.ROOT + "/jobs"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> FolderHost:
    folder = tmp_path_factory.mktemp("api")
    (folder / "loras").mkdir()
    base = base_weights()
    save_pair(folder, base, tuned_weights(base, rank_change(4)))
    return FolderHost(folder, folder / "loras")


def client_of(host: FolderHost, credentials: dict[str, str] | None = None) -> TestClient:
    app = FastAPI()
    api.mount(app, Runner(host), credentials)
    return TestClient(app)


@pytest.fixture
def client(host: FolderHost) -> TestClient:
    return client_of(host)


def body(out: str, **more) -> dict:
    params = {"base": "base.safetensors", "tuned": "tuned.safetensors", "out": out, "rank": 4, **more}
    return {"verb": "extract", "params": params}


def ended(client: TestClient, job_id: str) -> dict:
    deadline = time.monotonic() + 60
    while (job := client.get(f"{JOBS}/{job_id}").json())["status"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return job


def test_a_job_runs_and_reports(client: TestClient, host: FolderHost) -> None:
    answer = client.post(JOBS, json=body("made"))
    assert answer.status_code == 202
    job = ended(client, answer.json()["id"])
    assert (job["status"], job["progress"], job["error"]) == ("done", 1.0, None)
    assert job["report"]["modules"] == 354
    assert Path(job["report"]["outputs"][0]["path"]) == host.lora_dir / "made.safetensors"
    assert [j["id"] for j in client.get(JOBS).json()["jobs"]] == [job["id"]]


def test_dry_run_writes_nothing(client: TestClient, host: FolderHost) -> None:
    before = sorted(host.lora_dir.iterdir())
    answer = client.post(JOBS, json={**body("dry"), "dry_run": True})
    assert answer.status_code == 202
    assert answer.json()["modules"] == 354
    assert sorted(host.lora_dir.iterdir()) == before


@pytest.mark.parametrize(
    ("request_body", "says"),
    [
        ({"verb": "extrude", "params": {}}, "no job 'extrude'"),
        ([], "object with verb"),
        ({**body("x"), "surprise": 1}, "object with verb"),
        (body("x", colour="red"), "Unknown parameter 'colour'"),
        (body("x", rank="many"), "must be a number"),
        (body("x", rank=0), "between 1 and 4096"),
        (body("x", rank=True), "must be a number"),
        (body("x", norms="yes"), "must be true or false"),
        (body("../x"), "cannot be a file name"),
        (body("a/b"), "cannot be a file name"),
        (body("x", base="../base.safetensors"), "no checkpoint"),
        (body("x", base="/etc/passwd"), "no checkpoint"),
        (body("x", base="tuned.safetensors"), "same file"),
        ({"verb": "extract", "params": None}, "must be an object"),
    ],
)
def test_wrong_requests_are_refused_at_once(client: TestClient, host: FolderHost, request_body, says: str) -> None:
    before = sorted(host.lora_dir.iterdir())
    answer = client.post(JOBS, json=request_body)
    assert answer.status_code == 422
    assert says in answer.json()["error"]["what"]
    assert sorted(host.lora_dir.iterdir()) == before
    assert client.get(JOBS).json()["jobs"] == []


def test_only_json_is_taken(client: TestClient) -> None:
    assert client.post(JOBS, content="{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post(JOBS, content="{", headers={"content-type": "application/json"}).status_code == 400


def test_cancel_leaves_nothing(client: TestClient, host: FolderHost, monkeypatch: pytest.MonkeyPatch) -> None:
    extract = LayerWork.extract
    monkeypatch.setattr(LayerWork, "extract", lambda *args: (time.sleep(0.05), extract(*args))[1])
    before = sorted(host.lora_dir.iterdir())
    job_id = client.post(JOBS, json=body("cancelled")).json()["id"]
    while client.get(f"{JOBS}/{job_id}").json()["progress"] == 0:
        time.sleep(0.02)
    assert client.post(f"{JOBS}/{job_id}/cancel").status_code == 200
    job = ended(client, job_id)
    assert (job["status"], job["error"]["code"], job["report"]) == ("cancelled", "cancelled", None)
    assert sorted(host.lora_dir.iterdir()) == before


def test_two_jobs_take_turns_and_the_second_to_a_name_loses(client: TestClient, host: FolderHost) -> None:
    ids = [client.post(JOBS, json=body("twice")).json()["id"] for _ in range(2)]
    jobs = [ended(client, job_id) for job_id in ids]
    assert sorted(job["status"] for job in jobs) == ["done", "failed"]
    assert "exists already" in next(job["error"]["what"] for job in jobs if job["error"])


class Watched(FolderHost):
    """Counts what the runner tells its host."""

    def __init__(self, like: FolderHost) -> None:
        super().__init__(like.checkpoint_dir, like.lora_dir)
        self.forgotten: list[str] = []
        self.turns = 0

    def forget(self, job_id: str) -> None:
        self.forgotten.append(job_id)

    @contextlib.contextmanager
    def running(self, job_id: str, on_wait: Callable[[], None]) -> Iterator[Context]:
        with super().running(job_id, on_wait) as context:
            self.turns += 1
            yield context


def test_a_waiting_job_is_cancelled_at_once_and_never_runs(host: FolderHost) -> None:
    watched = Watched(host)
    runner = Runner(watched)
    with watched._turn:
        job = runner.submit("extract", body("never")["params"])
        job.cancel()
        assert job.wait(0)
        assert (job.status, job.error and job.error.code, job.text) == (CANCELLED, "cancelled", "cancelled")
        assert watched.forgotten == [job.id]
        job.cancel()  # again: nothing more to do
    after = runner.submit("extract", body("after-never")["params"])
    assert after.wait(60)
    assert after.status == DONE, "the turn was given back"
    deadline = time.monotonic() + 30
    while watched.turns < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (job.status, watched.forgotten) == (CANCELLED, [job.id])
    assert not watched.lora_output("never").exists()


def test_cancelling_a_job_as_its_turn_comes_is_clean(host: FolderHost) -> None:
    watched = Watched(host)
    runner = Runner(watched)
    for _ in range(20):
        job = runner.submit("extract", body("race", overwrite=True)["params"])
        job.cancel()
        assert job.wait(30)
        assert job.status == CANCELLED
    assert watched._turn.acquire(timeout=30)
    assert not watched.lora_output("race").exists()


def test_only_so_many_jobs_may_wait(host: FolderHost) -> None:
    watched = Watched(host)
    runner = Runner(watched)
    with watched._turn:
        jobs = [runner.submit("extract", body("many")["params"]) for _ in range(20)]
        assert {job.status for job in jobs} == {QUEUED}
        with pytest.raises(BusyError, match="20 jobs are waiting"):
            runner.submit("extract", body("many")["params"])
        for job in jobs:
            job.cancel()
        runner.submit("extract", body("many")["params"]).cancel()


def test_a_failing_refresh_is_a_warning_beside_the_file(host: FolderHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no list today")

    runner = Runner(host)
    monkeypatch.setattr(host, "refresh", broken)
    job = runner.submit("extract", body("unlisted")["params"])
    assert job.wait(60)
    assert (job.status, job.error) == (DONE, None)
    assert host.lora_output("unlisted").exists()
    assert job.report is not None
    assert "no list today" in job.report.warnings[-1]


def test_linked_folders_of_checkpoints_are_listed_and_loops_are_not(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.SafeTensors").touch()
    models = tmp_path / "models"
    models.mkdir()
    (models / "linked").symlink_to(tmp_path / "elsewhere")
    (models / "loop").symlink_to(models)
    (models / "gone").symlink_to(tmp_path / "nothing")
    (models / "b.ckpt").touch()
    host = FolderHost(models, tmp_path)
    assert host.checkpoints() == ["b.ckpt", "linked/a.SafeTensors"]
    assert host.resolve_checkpoint("linked/a.SafeTensors").exists()
    assert FolderHost(tmp_path / "missing", tmp_path).checkpoints() == []


def test_folders_that_are_one_model_are_listed_as_one(tmp_path: Path) -> None:
    models = {
        "checkpoints": ["diffusers/model_index.json", "diffusers/unet/diffusion_pytorch_model.safetensors",
                        "big/model.safetensors.index.json", "big/model-00001-of-00002.safetensors",
                        "big/model-00002-of-00002.safetensors", "big/other.safetensors"],
        "loras": ["parts/unet/adapter_config.json", "parts/unet/adapter_model.safetensors", "peft/adapter_config.json",
                  "peft/adapter_model.safetensors", "sub/a.pt", "b.safetensors", "c.txt"],
    }  # fmt: skip
    for root, files in models.items():
        for file in files:
            (tmp_path / root / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / file).touch()
    host = FolderHost(tmp_path / "checkpoints", tmp_path / "loras")
    assert host.checkpoints() == ["big/model.safetensors.index.json", "big/other.safetensors", "diffusers"]
    assert host.loras() == ["b.safetensors", "parts", "peft", "sub/a.pt"]
    assert host.resolve_checkpoint("diffusers") == tmp_path / "checkpoints" / "diffusers"
    assert host.resolve_lora("peft") == tmp_path / "loras" / "peft"
    for wrong in ("../loras/b.safetensors", "c.txt", "", str(tmp_path / "loras" / "b.safetensors")):
        with pytest.raises(SpecError, match="no LoRA"):
            host.resolve_lora(wrong)


def test_a_host_without_a_model_in_memory_says_so(tmp_path: Path) -> None:
    host = FolderHost(tmp_path / "checkpoints", tmp_path / "loras")
    assert host.checkpoint_output("new.safetensors") == tmp_path / "checkpoints" / "new.safetensors"
    with pytest.raises(SpecError, match="file name"):
        host.checkpoint_output("sub/new")
    assert PathHost().checkpoint_output("sub/new") == Path("sub/new.safetensors")
    assert host.loaded_checkpoint() is PathHost().loaded_checkpoint() is None


def test_names_of_files_lose_their_suffix_and_must_be_text() -> None:
    assert file_stem("x.SafeTensors") == file_stem(" x.safetensors ") == file_stem("x") == "x"
    assert PathHost().lora_output("folder/x.SAFETENSORS") == Path("folder/x.safetensors")
    with pytest.raises(SpecError, match="cannot be a file name"):
        file_stem("half\udc80")


def test_an_unknown_job_is_not_found(client: TestClient) -> None:
    assert client.get(f"{JOBS}/nothing").status_code == 404
    assert client.post(f"{JOBS}/nothing/cancel").status_code == 404


def test_loras_are_listed(client: TestClient, host: FolderHost) -> None:
    (host.lora_dir / "listed.safetensors").touch()
    assert "listed.safetensors" in client.get(api.ROOT + "/loras").json()["loras"]
    assert {"base.safetensors", "tuned.safetensors"} <= {*client.get(api.ROOT + "/checkpoints").json()["checkpoints"]}


def test_the_schema_is_the_spec(client: TestClient) -> None:
    verbs = client.get(api.ROOT + "/schema").json()["verbs"]
    parameters = verbs["extract"]["parameters"]
    assert list(parameters["properties"]) == list(ExtractSpec.params())
    assert parameters["required"] == ["base", "tuned", "out"]
    assert parameters["properties"]["rank"]["default"] == ExtractSpec.defaults()["rank"]


def test_credentials_guard_every_route(host: FolderHost) -> None:
    client = client_of(host, {"ann": "s3cret:with colon"})
    routes = [("get", "/schema"), ("get", "/checkpoints"), ("get", "/loras"), ("get", "/jobs"), ("get", "/jobs/x"),
              ("post", "/jobs"), ("post", "/jobs/x/cancel")]  # fmt: skip
    for method, path in routes:
        call = getattr(client, method)
        assert call(api.ROOT + path).status_code == 401
        assert call(api.ROOT + path, auth=("ann", "wrong")).status_code == 401
        assert call(api.ROOT + path, auth=("bob", "s3cret:with colon")).status_code == 401
    assert client.get(api.ROOT + "/schema", auth=("ann", "s3cret:with colon")).status_code == 200


def test_no_credentials_where_there_should_be_some_let_nobody_in(host: FolderHost) -> None:
    assert client_of(host, {}).get(api.ROOT + "/schema").status_code == 401
    assert client_of(host, {}).get(api.ROOT + "/schema", auth=("", "")).status_code == 401
    assert client_of(host, None).get(api.ROOT + "/schema").status_code == 200
