"""Hyper-merge of many models: what it holds in memory, how often it reads, and what a stopped one leaves behind."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hyper_families import arguments, gradual, hyper, reached
from models import ROOT, base_weights, cast, listing, save_checkpoint, tuned_weights

# Runs the command line, and says at its end what the system counted.
COUNTED = """
import json, sys
from pathlib import Path
from lib_hypermerge import cli
def counted(path):
    rows = (line.split() for line in Path(path).read_text().splitlines())
    return {row[0].strip(":"): int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}
before = counted("/proc/self/io")["rchar"]
code = cli.main(sys.argv[1:])
print(json.dumps({"read": counted("/proc/self/io")["rchar"] - before, "peak": counted("/proc/self/status")["VmHWM"]}))
sys.exit(code)
"""


def counted(models: list[Path], folder: Path, *more) -> tuple[int, float, dict]:
    """Bytes read, MiB resident at most, the answer."""
    folder.mkdir()
    flags = arguments(models, folder, "--threads", 1, "--ranks", "2,1", *more)
    command = [sys.executable, "-c", COUNTED, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *_, answer, counts = map(json.loads, done.stdout.splitlines())
    return counts["read"], counts["peak"] / 1024, answer


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """Nine models of 30 MB."""
    folder, base = tmp_path_factory.mktemp("many"), base_weights("sd15", 8)
    keys, out = set(reached(base)), []

    def change(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        return 0.05 * weight.std() * torch.randn(weight.shape, generator=generator) if key in keys else None

    for m in range(9):
        model = cast(tuned_weights(base, change, m), torch.float16)
        out.append(save_checkpoint(folder / f"{m}.safetensors", model))
    return out


def test_memory_is_not_that_of_the_models_and_they_are_read_a_few_times(tmp_path, many):
    size = many[0].stat().st_size
    _, few, _ = counted(many[:3], tmp_path / "few")
    read, most, answer = counted(many, tmp_path / "most", "--tolerance", 0, "--iterations", 5)
    again, _, longer = counted(many, tmp_path / "longer", "--tolerance", 0, "--iterations", 20)
    assert len(longer["loss"]) > len(answer["loss"])
    # a layer's rows and cores of every model are held: in so narrow a model as this, a quarter of it
    assert most - few < 0.4 * 6 * size / 2**20
    imported = 80 << 20
    assert read < 4 * 9 * size + imported
    assert again < read + 0.5 * 9 * size


# Says what it is about to do, and takes its time.
SLOW = """
import os, sys, time
from lib_hypermerge import cli
from lib_hypermerge.jobs.hyper.finish import Finisher
from lib_hypermerge.jobs.hyper.sketch import Sketcher
def slowed(owner, name, seconds):
    work = getattr(owner, name)
    def slowly(*arguments, **named):
        os.write(2, name.encode() + b"\\n")
        time.sleep(seconds)
        return work(*arguments, **named)
    setattr(owner, name, slowly)
slowed(Sketcher, "sketch", 0.002)
slowed(Finisher, "finish", 0.002)
slowed(os, "link", 0.2)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    return gradual(3, K=2, own=0.5, divisor=64).save(tmp_path_factory.mktemp("models"), torch.float16)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, models) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    hyper(models, folder, "--ranks", "3,2", "--threads", 2)
    return listing(folder)


def stopped(models: list[Path], folder: Path, step: str, times: int, sent: signal.Signals) -> int:
    """Send a signal to a process of its own when it begins that step for the n-th time; returns its exit code."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments(models, folder, "--ranks", "3,2", "--threads", 2))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            times -= line == f"{step}\n"
            if not times:
                break
        process.send_signal(sent)
        process.communicate(timeout=60)
    assert times == 0, "it ended before that"
    return process.returncode


# several moments of every part of the work: the passes over the files, and when files get their names; the first that
# does is the description of the job in the work folder
MOMENTS = [("link", 1), ("sketch", 200), ("finish", 1), ("finish", 300), ("link", 3), ("link", 5)]


@pytest.mark.parametrize(("step", "times"), MOMENTS, ids=lambda v: str(v))
def test_a_killed_process_leaves_no_half_file_and_the_next_run_completes(tmp_path, models, undisturbed, step, times):
    assert stopped(models, tmp_path, step, times, signal.SIGKILL) == -signal.SIGKILL
    left = listing(tmp_path)
    shown = {name for name in left if not name.startswith(".")}
    assert all(left[name] == undisturbed[name] for name in shown)
    assert step == "link" or not shown
    answer = hyper(models, tmp_path, "--ranks", "3,2", "--threads", 2)
    assert listing(tmp_path) == undisturbed
    assert answer["resumed"] is ((step, times) != ("link", 1))


@pytest.mark.parametrize(("step", "times"), [("sketch", 100), ("finish", 100)])
def test_a_cancelled_process_leaves_nothing(tmp_path, models, step, times):
    assert stopped(models, tmp_path, step, times, signal.SIGINT) == 130
    assert list(tmp_path.iterdir()) == []


def test_cores_of_other_parameters_are_not_taken(tmp_path, models, undisturbed):
    stopped(models, tmp_path, "finish", 1, signal.SIGKILL)
    answer = hyper(models, tmp_path, "--ranks", "4,2", "--threads", 2)
    assert answer["resumed"] is False
    assert answer["ranks"] == [4, 2]
    assert listing(tmp_path).keys() == undisturbed.keys()
