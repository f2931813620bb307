"""The means of docs/evidence.md: a family trained for a moment, comparisons, tables, and the page they go into."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.family import pack
from benchmarks.family import train as training
from benchmarks.family.evidence import __main__ as page
from benchmarks.family.evidence import combining, extraction, family, hypermerge, resizing, study, tables, transferring
from benchmarks.family.evidence.sheets import save_sheet
from benchmarks.family.evidence.weights import change, weighted_sum
from benchmarks.family.members import BASE, EVERY, SECOND

MOMENT = training.Effort(vae=2, text=2, base=2, tuned=2, judge=2, pictures=64, tuned_pictures=64)
EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole family, two steps of each."""
    folder = tmp_path_factory.mktemp("family")
    training.train(folder, 2, MOMENT)
    return folder


@pytest.fixture
def asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> study.Study:
    """One prompt, two seeds, few steps."""
    monkeypatch.setattr(study, "PROMPTS", study.PROMPTS[:1])
    for module in (study, family, extraction):
        monkeypatch.setattr(module, "SEEDS", range(1000, 1002))
        monkeypatch.setattr(module, "PROMPTS", study.PROMPTS) if hasattr(module, "PROMPTS") else None
    drawn = study.pictures
    monkeypatch.setattr(study, "pictures", lambda *given: drawn(*given, steps=2))
    return study.Study(folder, tmp_path / "work")


def test_every_member_is_there_and_can_be_loaded_by_a_webui(folder: Path) -> None:
    for name in (BASE, SECOND, *(member.name for member in EVERY)):
        assert (folder / f"{name}.safetensors").exists()
        assert str(folder / "text") in (folder / f"{name}.yaml").read_text(encoding="utf-8")
    text_only = load_file(folder / "turned.safetensors")
    base = load_file(folder / "base.safetensors")
    moved = {key.split(".")[0] for key, t in text_only.items() if not torch.equal(t, base[key])}
    assert moved == {"cond_stage_model"}
    moved = {
        key.split(".")[0] for key, t in load_file(folder / "ink.safetensors").items() if not torch.equal(t, base[key])
    }
    assert moved == {"model"}


def test_what_is_there_is_not_trained_again_and_what_is_not_comes_out_the_same(folder: Path) -> None:
    kept, again = folder / "base.safetensors", folder / "contour.safetensors"
    stamp, before = kept.stat().st_mtime_ns, again.read_bytes()
    again.unlink()
    training.train(folder, 2, MOMENT)
    assert kept.stat().st_mtime_ns == stamp
    assert again.read_bytes() == before


def test_a_model_is_like_itself_and_unlike_another(asked: study.Study) -> None:
    itself = asked.compare(asked.original("ink"), "ink")
    assert itself.pixels.mean == itself.features.mean == 0 and itself.same.mean == 1
    other = asked.compare(asked.original(SECOND), "ink")
    assert other.pixels.mean > 0 and other.features.mean > 0


def test_spread_is_that_between_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SEEDS", range(2))
    spread = study.Spread.over_seeds(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))  # three prompts, two seeds of each
    assert spread.mean == 0.5 and spread.deviation == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    "question", [family, extraction, resizing, combining, transferring], ids=lambda m: m.__name__.split(".")[-1]
)
def test_a_question_is_answered(asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, question) -> None:
    monkeypatch.setattr(extraction, "RANKS", (2, 4))
    monkeypatch.setattr(extraction, "DRAWN_RANKS", (2, 8))
    for module in (extraction, resizing):
        monkeypatch.setattr(module, "TYPICAL", ("ink", "night"))
    monkeypatch.setattr(combining, "PAIRS", {"ink-night": ("ink", "night")})
    monkeypatch.setattr(transferring, "CASES", transferring.CASES[2:3])
    if question is resizing:
        for name in extraction.TYPICAL:
            extraction.lora(asked, name, f"r{resizing.TO}", rank=resizing.TO)
    if question is extraction:
        extraction.lora(asked, "ink", f"r{extraction.SMALL}", rank=extraction.SMALL)
    answers = question.answer(asked, tmp_path / "pictures")
    text = EVIDENCE.read_text(encoding="utf-8")
    for name, content in answers.items():
        assert f"<!-- begin {name} -->" in text
        rows = [line.split("|") for line in content.splitlines()]
        assert len(rows) > 2 and len({len(row) for row in rows}) == 1
    for picture in (tmp_path / "pictures").glob("*.png"):
        assert np.asarray(Image.open(picture)).std() > 1
        assert f"evidence/{picture.name}" in text


def test_hyper_merges_are_answered(asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("ink", "night", "stripes", "turned")
    for module in (hypermerge, combining):
        monkeypatch.setattr(module, "ORDER", names)
    monkeypatch.setattr(hypermerge, "RELATED", list(names))
    monkeypatch.setattr(hypermerge, "BUDGETS", (1.0,))
    monkeypatch.setattr(hypermerge, "COUNTS", (2, 4))
    answers = hypermerge.answer(asked, tmp_path)
    assert set(answers) == {f"hyper-{name}" for name in ("ways", "models", "budget", "how-many", "left-out", "outlier")}
    assert (tmp_path / "hyper.png").exists()
    for content in answers.values():
        assert len({line.count("|") for line in content.splitlines()}) == 1


def test_a_sum_of_checkpoints_is_that_of_every_number(folder: Path, tmp_path: Path) -> None:
    first, second = folder / "ink.safetensors", folder / "night.safetensors"
    made = load_file(weighted_sum({first: 0.25, second: 0.75}, tmp_path / "sum.safetensors"))
    one, two = load_file(first), load_file(second)
    for key, tensor in made.items():
        if tensor.is_floating_point():
            expected = 0.25 * one[key].double() + 0.75 * two[key].double()
            assert (tensor.double() - expected).abs().max() <= 2e-3 * expected.abs().max() + 1e-7
    assert change(first, first) == 0
    assert change(first, second) > 0


def test_clamping_keeps_the_rank_and_cuts_the_largest(folder: Path, tmp_path: Path) -> None:
    work = study.Study(folder, tmp_path)
    file, _ = extraction.lora(work, "ink", "plain", rank=4)
    clamped = load_file(extraction._clamped(file, tmp_path / "clamped.safetensors"))
    plain = load_file(file)
    assert set(clamped) == set(plain)
    key = next(k for k in plain if k.endswith("lora_up.weight"))
    down = key.replace("up", "down")
    up_of, down_of = (plain[k].float().flatten(1).numpy().astype(np.float64) for k in (key, down))
    scale = float(plain[key.replace("lora_up.weight", "alpha")]) / len(down_of)
    u, sigma, v = np.linalg.svd(scale * up_of @ down_of)
    rank = len(down_of)
    limit = np.quantile(np.abs(np.concatenate([(u[:, :rank] * sigma[:rank]).ravel(), v[:rank].ravel()])), 0.97)
    assert clamped[key].abs().max() <= limit * 1.5
    assert clamped[down].abs().max() < np.abs(v[:rank]).max() + 1e-3


def test_a_packed_checkpoint_is_close_and_smaller(folder: Path) -> None:
    tensors = load_file(folder / "base.safetensors")
    packed = pack.pack(tensors)
    again = pack.unpack(packed)
    assert set(again) == set(tensors) and len(packed) < 0.5 * (folder / "base.safetensors").stat().st_size
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and again[key].shape == tensor.shape
        if tensor.is_floating_point():
            step = tensor.float().flatten(1).abs().amax(1, keepdim=True) / pack.MOST if tensor.ndim > 1 else 1e-9
            assert ((again[key].float() - tensor.float()).abs().reshape(len(tensor), -1) <= 0.51 * step + 1e-6).all()


def test_a_page_is_filled_between_its_marks(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- begin a -->\nold \\1\n<!-- end a -->\nafter\n", encoding="utf-8")
    tables.fill(file, "a", tables.table(["x", "y"], [["1", r"\g<0>"]]))
    filled = file.read_text(encoding="utf-8")
    assert filled == "before\n<!-- begin a -->\n| x | y |\n| --- | --- |\n| 1 | \\g<0> |\n<!-- end a -->\nafter\n"
    with pytest.raises(KeyError):
        tables.fill(file, "b", "")


def test_a_sheet_has_a_row_for_each_name(tmp_path: Path) -> None:
    save_sheet(tmp_path / "a" / "sheet.png", [("one", torch.ones(3, 3, 8, 8)), ("two", -torch.ones(3, 3, 8, 8))])
    pixels = np.asarray(Image.open(tmp_path / "a" / "sheet.png"))
    assert pixels[2, 175].tolist() == [255] * 3 and pixels[20, 175].tolist() == [0] * 3


def test_the_command_knows_every_question() -> None:
    modules = {f"benchmarks.family.evidence.{name}" for name in page.QUESTIONS.values()}
    assert modules == {m.__name__ for m in (family, extraction, resizing, hypermerge, combining, transferring)}
