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

MOMENT = training.Effort(vae=2, text=2, base=2, tuned=2, judge=2, pictures=64, tuned_pictures=64, tuned_rate=0.02)
EVIDENCE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole family, two steps of each."""
    folder = tmp_path_factory.mktemp("family")
    training.train(folder, 2, MOMENT)
    return folder


@pytest.fixture
def asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> study.Study:
    """One prompt, two seeds, two steps."""
    monkeypatch.setattr(study, "PROMPTS", study.PROMPTS[:1])
    for module in (study, family):
        monkeypatch.setattr(module, "SEEDS", range(1000, 1002))
    drawn = study.pictures
    monkeypatch.setattr(study, "pictures", lambda *given: drawn(*given, steps=2))
    return study.Study(folder, tmp_path / "work")


def cells(content: str) -> list[list[str]]:
    """The rows of a table, without its head; all have as many cells as that."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in content.splitlines()]
    assert len(rows) > 2 and len({len(row) for row in rows}) == 1
    return rows[2:]


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


def test_a_family_that_was_trained_otherwise_is_not_mixed_with(folder: Path) -> None:
    with pytest.raises(training.OtherFamilyError, match="other settings"):
        training.train(folder, 2, training.Effort())
    assert training.main(["--folder", str(folder)]) == page.main(["--family", str(folder)]) == 1


def test_a_model_is_like_itself_and_unlike_another(asked: study.Study) -> None:
    itself = asked.compare(asked.original("ink"), "ink")
    assert itself.pixels.mean == itself.unlike.mean == itself.features.mean == itself.missed.mean == 0
    assert itself.same.mean == 1
    other = asked.compare(asked.original(SECOND), "ink")
    assert other.pixels.mean > 0 and other.features.mean > 0 and other.missed.mean > 1
    base = asked.compare(asked.original(BASE), "ink")
    assert base.missed.mean == pytest.approx(1) and base.unlike.mean == pytest.approx(1)
    assert other.unlike.mean == pytest.approx(other.pixels.mean / base.pixels.mean)


def test_a_made_checkpoint_is_deleted_and_its_pictures_are_kept(asked: study.Study) -> None:
    made = asked.applied(asked.original(BASE), extraction.lora(asked, "ink", "one", rank=1))
    assert made.exists()
    first = asked.compare(made, "ink")
    assert not made.exists() and asked.first_seed(made, "ink").shape == (1, 3, 64, 64)
    assert 0 < first.missed.mean < 1
    asked.new(made)
    with pytest.raises(FileNotFoundError):
        asked.first_seed(made, "ink")


def test_spread_is_that_between_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SEEDS", range(2))
    spread = study.Spread.over_seeds(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0]))  # three prompts, two seeds of each
    assert spread.mean == 0.5 and spread.deviation == pytest.approx(0.5**0.5)
    other = study.Spread((1.0, 0.0))
    both = study.average([study.Likeness(*[one] * 7) for one in (spread, other)])
    assert both.pixels.by_seed == (0.5, 0.5)


def test_sizes_are_those_of_the_numbers(folder: Path) -> None:
    tensors = load_file(folder / "base.safetensors")
    assert study.numbers_of(folder / "base.safetensors") == sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_family_and_the_judge_are_told_of(asked: study.Study, tmp_path: Path) -> None:
    answers = dict(family.answer(asked, tmp_path))
    assert [row[0] for row in cells(answers["family"])] == [BASE, SECOND, *(member.name for member in EVERY)]
    assert all(0 <= float(cell) <= 100 for row in cells(answers["judge"]) for cell in row[1:])
    alike = cells(answers["alike"])
    assert [row[0] for row in alike] == [*study.RELATED, study.OUTLIER]
    assert all(float(row[1 + number]) == pytest.approx(1, abs=0.01) for number, row in enumerate(alike))
    assert np.asarray(Image.open(tmp_path / "family.png")).std() > 1


def test_extraction_misses_less_with_more_and_never_more_than_the_size(
    asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("RANKS", (1, 8)), ("DRAWN_RANKS", (1, 4, 16)), ("ALLOTTED", (16,)), ("TYPICAL", ("ink",)),
        ("RELATED", ["ink"]),
    ):  # fmt: skip
        monkeypatch.setattr(extraction, name, value)
    answers = dict(extraction.answer(asked, tmp_path))
    assert [row[0] for row in cells(answers["extract-weights"])] == ["ink", study.OUTLIER]
    assert all(float(row[1]) > float(row[2]) for row in cells(answers["extract-weights"]))
    base, *rows = cells(answers["extract-rank"])
    assert float(base[2]) == pytest.approx(100)
    ranks = [row for row in rows if "allotted" not in row[0]]
    same = next(row for row in rows if "the bytes of rank 16" in row[0])
    assert float(same[1]) == pytest.approx(float(ranks[-1][1]), rel=0.03)
    assert [float(row[2]) for row in ranks] == sorted((float(row[2]) for row in ranks), reverse=True)
    variants = {row[0]: row for row in cells(answers["extract-variants"])}
    size = float(variants["rank 4 in all layers"][1])
    for title in ("ranks allotted", "ranks allotted, norms and biases"):
        assert float(variants[title][1]) == pytest.approx(size, rel=0.03)
    assert 0.7 * size < float(variants["linear layers alone, of one rank"][1]) <= size
    assert any(title.startswith("DoRA, in the ") for title in variants)
    plain, cut = (
        float(variants[title][2]) for title in ("rank 4 in all layers", "the same, clamped at the 0.99 quantile")
    )
    assert plain < cut
    assert float(variants["ranks allotted"][2]) <= plain
    assert (tmp_path / "extract.png").exists()


def test_resizing_by_chance_misses_more(asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (extraction, resizing):
        monkeypatch.setattr(module, "TYPICAL", ("ink",))
    missed = {row[0]: float(row[2]) for row in cells(dict(resizing.answer(asked, tmp_path))["resize"])}
    assert missed["extracted at rank 32"] < missed["rank 32 resized to 4, SVD"] < missed["random directions, seed 0"]
    assert missed["rank 32 resized to 4, SVD"] == pytest.approx(missed["extracted at rank 4"], rel=0.02)


def test_hyper_merges_keep_to_the_bytes(asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("stripes", "night", "turned")
    ways = {w: hypermerge.WAYS[w] for w in (hypermerge.JOINT, "container")}
    for name, value in (
        ("ORDER", names), ("RELATED", list(names)), ("WAYS", ways), ("RANKS", "6,5"), ("OTHER_RANKS", ("2,2",)),
        ("COUNTS", (2, 3)), ("COUNTED_RANKS", "3,3"), ("SOLVER", {"starts": 1, "iterations": 3}),
    ):  # fmt: skip
        monkeypatch.setattr(hypermerge, name, value)
    answers = dict(hypermerge.answer(asked, tmp_path))
    assert set(answers) == {f"hyper-{name}" for name in ("ways", "budget", "how-many", "left-out", "outlier")}
    ways = {row[0]: row for row in cells(answers["hyper-ways"])}
    for title, row in ways.items():
        if title not in ("the base", "the plain average"):
            size, most = float(row[1]), float(ways[hypermerge.JOINT][1])
            if "of its own" in title:  # of whole ranks, no more than that
                assert 0.6 * most < size <= most, title
            else:
                assert size == pytest.approx(most, rel=0.04), title
            assert float(row[2]) < float(ways["the plain average"][2]), title
    assert [row[0] for row in cells(answers["hyper-how-many"])] == ["2", "3"] and (tmp_path / "hyper.png").exists()
    few, container = cells(answers["hyper-budget"])
    assert float(few[1]) == pytest.approx(float(container[1]), rel=0.04) and float(few[1]) < 0.5 * most
    assert cells(answers["hyper-left-out"])[-1][0] == BASE


def test_two_styles_are_combined_in_every_way(
    asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(combining, "PAIRS", {"ink-night": ("ink", "night")})
    monkeypatch.setattr(combining, "ORDER", ("ink", "night", "turned"))
    monkeypatch.setattr(combining, "WEIGHTS", {})
    monkeypatch.setattr(combining, "USUAL_WEIGHTS", (1.0,))
    monkeypatch.setattr(combining, "RANKS", "6,5")
    monkeypatch.setattr(hypermerge, "SOLVER", {"starts": 1, "iterations": 3})
    monkeypatch.setattr(combining, "SHOWN", ("trained on both", "TIES, 1", "hyper-model"))
    rows = cells(dict(combining.answer(asked, tmp_path))["combine"])
    assert len(rows) == 4 + len(combining.METHODS) + 3
    assert rows[0][3].startswith("0.0") and all(not row[3].startswith("0.0 ") for row in rows[1:])


def test_transfers_say_when_they_were_refused(
    asked: study.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transferring, "CASES", (transferring.CASES[0], transferring.CASES[4]))
    rows = cells(dict(transferring.answer(asked, tmp_path))["transfer"])
    assert [row[1] for row in rows] == ["nothing", *transferring.METHODS] * 2
    assert {row[3] for row in rows[1:5]} == {"yes"} and {row[3] for row in rows[6:]} == {"no"}


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


def test_clamping_cuts_the_largest_numbers_of_the_svd(folder: Path, tmp_path: Path) -> None:
    file = extraction.lora(study.Study(folder, tmp_path), "ink", "plain", rank=4)
    cut = load_file(extraction.clamped(file, tmp_path / "clamped.safetensors"))
    plain = load_file(file)
    assert set(cut) == set(plain)
    for key in [k for k in plain if k.endswith("lora_up.weight")][::20]:
        up, down = (plain[k].flatten(1).numpy().astype(np.float64) for k in (key, key.replace("lora_up", "lora_down")))
        rank = len(down)
        u, sigma, v = np.linalg.svd(up @ down, full_matrices=False)  # alpha is the rank
        entries = np.abs(np.concatenate([(u[:, :rank] * sigma[:rank]).ravel(), v[:rank].ravel()]))
        found = [cut[k].flatten(1).numpy().astype(np.float64) for k in (key, key.replace("lora_up", "lora_down"))]
        sizes = np.abs(np.concatenate([part.ravel() for part in found]))
        assert sizes.max() < entries.max()
        # the entries' signs are the SVD's own, and with them the 0.99 quantile: the limit is read from the result
        assert np.allclose(np.sort(sizes), np.sort(entries.clip(max=sizes.max())), atol=2e-3)
        assert 0.005 < (entries > sizes.max() + 1e-3).mean() < 0.05
        off = np.linalg.norm(found[0] @ found[1] - up @ down) / np.linalg.norm(up @ down)
        assert 1e-3 < off < 0.5


def test_a_packed_checkpoint_is_close_and_smaller(folder: Path) -> None:
    tensors = load_file(folder / "base.safetensors")
    packed = pack.pack(tensors)
    again = pack.unpack(packed)
    assert set(again) == set(tensors) and len(packed) < 0.5 * (folder / "base.safetensors").stat().st_size
    for key, tensor in tensors.items():
        assert again[key].dtype == tensor.dtype and again[key].shape == tensor.shape
        if tensor.is_floating_point():
            step = tensor.float().flatten(1).abs().amax(1, keepdim=True) / pack.MOST if tensor.ndim > 1 else 1e-9
            off = (again[key].float() - tensor.float()).abs().reshape(len(tensor), -1)
            rounded = 2**-11 * again[key].float().abs().reshape(len(tensor), -1)  # to fp16 once more
            assert (off <= 0.5001 * step + rounded + 1e-6).all()


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
