"""Hyper-merge of many models: what it holds in memory, and how often it reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hyper_families import arguments, reached
from models import ROOT, base_weights, cast, save_checkpoint, tuned_weights

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
    flags = arguments(models, folder, "--ranks", "2,1", "--starts", 1, "--iterations", 2, *more)
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

    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))

    def change(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        if key not in keys:
            return None
        start = int(torch.randint(len(noise) - weight.numel(), (1,), generator=generator))
        return 0.05 * weight.std() * noise[start : start + weight.numel()].view(weight.shape)

    for m in range(9):
        model = cast(tuned_weights(base, change, m), torch.float16)
        out.append(save_checkpoint(folder / f"{m}.safetensors", model))
    return out


def test_memory_is_not_that_of_the_models_and_they_are_read_a_few_times(tmp_path, many):
    size = many[0].stat().st_size
    few_read, few, answer = counted(many[:3], tmp_path / "few")
    read, most, _ = counted(many, tmp_path / "most")
    again, _, longer = counted(many[:3], tmp_path / "longer", "--tolerance", 0, "--iterations", 20)
    # a layer's rows and cores of every model are held, and more models get wider cores: in so narrow a model as
    # this, with ranks of 2 and 1, that is a good half of it
    assert most - few < 0.9 * 6 * size / 2**20
    imported = 80 << 20
    assert read < 4 * 9 * size + imported
    assert len(longer["loss"]) > len(answer["loss"])
    assert again < few_read + 0.5 * 3 * size
