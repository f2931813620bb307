"""A hyper-merge that is killed leaves no half output, and the next run goes on; one that is stopped leaves nothing."""

import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hyper_families import arguments, gradual, hyper
from models import ROOT, last_json, listing, run_cli
from test_hyper_rests import few_layers

from lib_hypermerge.files.unnamed import UnnamedFile

OPTIONS = ("--ranks", "3,2", "--solver", "directions", "--remainders", "norms")

KILLING = textwrap.dedent("""
    import os, signal, sys
    from lib_hypermerge import cli
    from lib_hypermerge.files import unnamed
    from lib_hypermerge.jobs.hyper import finish, work
    where, count, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    owner, name = {
        "sketching": (work.Work, "save"), "finishing": (finish.Finisher, "finish"),
        "naming": (unnamed.UnnamedFile, "publish"),
    }[where]
    function, calls = getattr(owner, name), [0]
    def counted(self, *arguments):
        if where != "naming" or self.path.parent.name == "out":
            if calls[0] == count:
                os.kill(os.getpid(), number)
            calls[0] += 1
        return function(self, *arguments)
    setattr(owner, name, counted)
    sys.exit(cli.main(sys.argv[4:]))
""")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    family = gradual(3, K=2, own=0.5, divisor=64, rests=0.02)
    small = replace(family, base=few_layers(family.base), models=[few_layers(model) for model in family.models])
    return small.save(tmp_path_factory.mktemp("models"), torch.float16)


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    hyper(models, folder, *OPTIONS)
    return listing(folder)


def stopped(models, out: Path, where: str, count: int, sent: signal.Signals) -> subprocess.CompletedProcess:
    more = arguments(models, out, *OPTIONS)
    command = [sys.executable, "-c", KILLING, where, str(count), str(int(sent)), *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def again(models, out: Path) -> dict:
    result = run_cli(arguments(models, out, *OPTIONS))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in listing(folder).items() if not name.startswith(".")}


@pytest.mark.parametrize(("where", "count"), [("sketching", 20), ("finishing", 20), ("naming", 3)])
def test_after_a_kill_the_next_run_goes_on(tmp_path, models, undisturbed, where, count):
    out = tmp_path / "out"
    assert stopped(models, out, where, count, signal.SIGKILL).returncode == -signal.SIGKILL
    if where != "naming":
        assert outputs(out) == {}
    answer = again(models, out)
    assert answer["resumed"]
    assert listing(out) == undisturbed
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_stopped_one_leaves_nothing(tmp_path, models):
    result = stopped(models, tmp_path / "out", "finishing", 20, signal.SIGINT)
    assert result.returncode == 130 and "Cancelled." in result.stderr
    assert list(tmp_path.rglob("*")) == []


def test_a_name_that_is_refused_takes_all_back(tmp_path, models, monkeypatch):
    publish, calls = UnnamedFile.publish, [0]

    def refused(self):
        if self.path.parent == tmp_path:
            if calls[0] == 3:
                self.path.write_bytes(b"somebody else's")
            calls[0] += 1
        return publish(self)

    monkeypatch.setattr(UnnamedFile, "publish", refused)
    result = run_cli(arguments(models, tmp_path, *OPTIONS))
    assert result.returncode == 2 and "appeared" in result.stderr
    assert list(listing(tmp_path).values()) == [b"somebody else's"]
