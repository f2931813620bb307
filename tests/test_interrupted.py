"""A job that is cancelled, killed, overtaken or disturbed leaves nothing and loses nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from models import (
    ROOT,
    base_weights,
    extract_arguments,
    listing,
    rank_change,
    save_pair,
    tuned_weights,
)

from lib_hypermerge.errors import Cancelled, InputChangedError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs import extract as job
from lib_hypermerge.jobs.extract_spec import ExtractSpec
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import Runner


@pytest.fixture
def pair(tmp_path) -> tuple[Path, Path]:
    base = base_weights("sd15", 64)
    return save_pair(tmp_path, base, tuned_weights(base, rank_change(2)))


def run_with(pair, out: Path, **context):
    spec = ExtractSpec.from_json({"base": str(pair[0]), "tuned": str(pair[1]), "out": str(out), "device": "cpu"})
    with job.make_plan(spec, PathHost()) as plan:
        return job.run(plan, PathHost(), Context(**context))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def modified(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("what", [replaced, modified, Path.unlink, lambda path: os.truncate(path, 100_000)])
@pytest.mark.parametrize("side", [0, 1], ids=["base", "tuned"])
def test_a_checkpoint_that_changes_while_it_is_read(tmp_path, pair, what, side):
    done = []

    def on_progress(fraction: float, _text: str) -> None:
        if fraction > 0.3 and not done:
            done.append(what(pair[side]))

    with pytest.raises(InputChangedError, match=pair[side].name):
        run_with(pair, tmp_path / "o", on_progress=on_progress)
    assert done
    assert not any("o.safetensors" in name or "hypermerge" in name for name in listing(tmp_path))


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_a_cancelled_job_leaves_nothing(tmp_path, pair, at):
    before, seen = listing(tmp_path), [-1.0]
    with pytest.raises(Cancelled):
        run_with(
            pair, tmp_path / "o", on_progress=lambda f, _: seen.append(f), interrupted=lambda: seen[-1] >= at
        )  # fmt: skip
    assert seen[-1] >= at
    assert listing(tmp_path) == before


def test_the_output_that_appears_meanwhile_is_kept(tmp_path, pair):
    target = tmp_path / "o.safetensors"
    with pytest.raises(SpecError, match="appeared"):
        run_with(pair, target, on_progress=lambda f, _: target.write_bytes(b"precious") if f > 0.9 else None)
    assert target.read_bytes() == b"precious"
    assert listing(tmp_path).keys() == {"base.safetensors", "tuned.safetensors", "o.safetensors"}


SLOW = textwrap.dedent("""
    import os, sys, time
    from lib_hypermerge import cli
    from lib_hypermerge.jobs import extract_layers
    work = extract_layers.LayerWork.extract
    def slowly(self, *arguments):
        os.write(2, b"working\\n")
        time.sleep(0.1)
        return work(self, *arguments)
    extract_layers.LayerWork.extract = slowly
    sys.exit(cli.main(sys.argv[1:]))
""")


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=lambda v: str(int(v)),
)
def test_a_stopped_process_leaves_nothing(tmp_path, pair, sent, code):
    before = listing(tmp_path)
    command = [sys.executable, "-c", SLOW, *map(str, extract_arguments(*pair, tmp_path / "o"))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(10):
        assert process.stderr.readline() == "working\n"
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert listing(tmp_path) == before
    if code == 130:
        assert json.loads(out.splitlines()[-1])["error"]["code"] == "cancelled"
        assert "Cancelled." in err


def test_two_jobs_at_once_wait_for_each_other(tmp_path, pair, monkeypatch):
    host = FolderHost(tmp_path, tmp_path)
    runner = Runner(host)
    at_work, most = [], []
    real_run = job.run

    def counting(*arguments):
        at_work.append(1)
        most.append(len(at_work))
        try:
            return real_run(*arguments)
        finally:
            at_work.pop()

    monkeypatch.setattr(job, "run", counting)
    values = {"base": "base.safetensors", "tuned": "tuned.safetensors", "rank": 2, "device": "cpu"}
    with host.running("first", lambda: None):
        jobs = [runner.submit("extract", values | {"out": name}) for name in ("one", "two", "one")]
        assert not any(submitted.wait(0.05) for submitted in jobs)
    assert all(submitted.wait(60) for submitted in jobs)
    assert most == [1, 1]
    assert sorted(submitted.status for submitted in jobs) == ["done", "done", "failed"]
    failed = next(submitted for submitted in jobs if submitted.status == "failed")
    assert "one.safetensors exists already" in str(failed.error)
    assert listing(tmp_path).keys() == {"base.safetensors", "tuned.safetensors", "one.safetensors", "two.safetensors"}
