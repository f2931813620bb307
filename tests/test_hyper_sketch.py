"""The first pass: cores and bases of all models' changes against float64, on checkpoints with one layer of note."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import ATTENTION, CONVOLUTION, base_weights, save_checkpoint

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.hyper import sketch
from lib_hypermerge.jobs.hyper.inputs import Inputs, Layer, open_inputs
from lib_hypermerge.jobs.hyper.sketch import Sketch, Sketcher
from lib_hypermerge.jobs.hyper.spec import HyperSpec
from lib_hypermerge.jobs.hyper.stack import Stack

WIDE = {ATTENTION: (96, 200), CONVOLUTION: (150, 20, 3, 3)}


@pytest.fixture(scope="module")
def changes() -> dict[str, torch.Tensor]:
    """(M, n, k) float32 of either layer: decaying spectra, some directions shared."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for key, shape in WIDE.items():
        n, k = shape[0], torch.Size(shape[1:]).numel()
        falling = torch.arange(1, 97) ** -1.0
        shared = torch.randn(n, 8, generator=generator) @ torch.randn(8, k, generator=generator)
        own = (torch.randn(4, n, 96, generator=generator) * falling) @ torch.randn(4, 96, k, generator=generator)
        out[key] = torch.randn(4, generator=generator)[:, None, None] * shared + own
    return out


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, changes):
    folder: Path = tmp_path_factory.mktemp("sketch")
    base, names = base_weights(), []
    for m in range(4):
        weights = {key: w.clone() for key, w in base.items()}
        for key, change in changes.items():
            weights[key] = change[m].reshape(WIDE[key]).clone()
        names.append(str(save_checkpoint(folder / f"{m}.safetensors", weights)))
    opened = open_inputs(HyperSpec.from_json({"models": names, "name": "x"}), PathHost())
    yield opened
    opened.close()


def layer_of(inputs: Inputs, key: str) -> Layer:
    return next(layer for layer in inputs.layers if layer.module.weight and layer.module.weight.name == key)


def look(inputs: Inputs, key: str, rank: int) -> Sketch:
    return Sketcher(Stack(inputs, None), rank, torch.float32, "cpu", 0).sketch(layer_of(inputs, key))


def centred(change: torch.Tensor) -> torch.Tensor:
    change = change.double()
    return change - change.mean(0)


@pytest.mark.parametrize("key", WIDE)
@pytest.mark.parametrize("within", [sketch.WITHIN_BYTES, 0])
def test_cores_hold_what_the_best_shared_bases_would(inputs, changes, key, within, monkeypatch) -> None:
    monkeypatch.setattr(sketch, "WITHIN_BYTES", within)
    found, change = look(inputs, key, 8), centred(changes[key])
    q, p = len(found.basis), found.cores.shape[1]
    assert torch.allclose(found.basis @ found.basis.mT, torch.eye(q), atol=1e-5)
    rows = torch.linalg.eigvalsh(torch.einsum("mnk,mnl->kl", change, change)).flip(0)[:q].sum()
    onto = change @ found.basis.double().mT
    columns = torch.linalg.eigvalsh(torch.einsum("mnq,moq->no", onto, onto)).flip(0)[:p].sum()
    assert float(onto.square().sum()) >= 0.99 * float(rows)
    assert float(found.cores.double().square().sum()) >= (0.999 if within else 0.97) * float(columns)


@pytest.mark.parametrize("within", [sketch.WITHIN_BYTES, 0])
def test_cores_are_whole_where_the_layer_is_small(inputs, changes, within, monkeypatch) -> None:
    monkeypatch.setattr(sketch, "WITHIN_BYTES", within)
    found, change = look(inputs, ATTENTION, 100), centred(changes[ATTENTION])
    assert found.basis is None
    assert torch.allclose(found.cores.double(), change, atol=1e-4)


@pytest.mark.parametrize("key", WIDE)
def test_the_gram_matrix_is_that_of_the_whole_changes(inputs, changes, key) -> None:
    change = centred(changes[key]).flatten(1)
    expected = change @ change.mT
    assert torch.allclose(look(inputs, key, 4).gram, expected, rtol=1e-6, atol=1e-6 * float(expected.max()))


def test_a_second_look_at_a_large_layer_reads_it_again(inputs, monkeypatch) -> None:
    whole = look(inputs, CONVOLUTION, 8)
    monkeypatch.setattr(sketch, "_CACHE", 0)
    monkeypatch.setattr(sketch, "_SLAB", 4096)
    again = look(inputs, CONVOLUTION, 8)
    for m in range(4):  # bases may turn by rounding; what lies within them may not
        assert float(again.cores[m].norm()) == pytest.approx(float(whole.cores[m].norm()), rel=1e-3)
