"""The combine panel in a real browser: a pasted prompt becomes rows, a preview shows how alike the LoRAs are first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from combine_files import missed, read
from convert_files import lora, save, some
from pages import SOON, Site, choose, field, open_page, refresh_and_choose, result, served, text_box, type_into
from playwright.sync_api import Page, expect

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.ui.lora_rows import ROWS
from lib_hypermerge.ui.prompt_rows import rows_of

COMBINE = "combine"


def save_loras(folder: Path) -> None:
    (folder / "people").mkdir(parents=True)
    for seed, name in enumerate(("one", "people/two", "people/three")):
        save(folder / f"{name}.safetensors", lora("sd15", only=some, seed=seed), {"ss_output_name": f"alias {seed}"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("combine")
    (folder / "checkpoints").mkdir()
    save_loras(folder / "loras")
    with served(Runner(FolderHost(folder / "checkpoints", folder / "loras"))) as running:
        yield running


def read_prompt(page: Page, text: str) -> None:
    type_into(page, "prompt_box", text, COMBINE)
    field(page, "prompt_read", COMBINE).click()


def row(page: Page, index: int) -> tuple[str, str, str, str]:
    parts = ("lora", "weight", "te_weight", "blocks")
    values = (text_box(page, f"loras_{index}_{part}", COMBINE).input_value() for part in parts)
    return tuple(values)  # type: ignore[return-value]


def visible_rows(page: Page) -> list[int]:
    return [i for i in range(ROWS) if field(page, f"loras_{i}_row", COMBINE).is_visible()]


def test_a_prompt_becomes_rows_and_the_rows_a_lora(page: Page, site: Site) -> None:
    open_page(page, site, COMBINE)
    read_prompt(page, "a cat <lora:one:0.7>, <lora:alias 1:-0.3:0.1> sitting <lyco:three:0.5:lbw=OUTALL>")
    expect(field(page, "prompt_note", COMBINE)).to_contain_text("3 LoRAs read into the rows", timeout=SOON)
    expect(text_box(page, "loras_2_lora", COMBINE)).to_have_value("people/three.safetensors")
    assert visible_rows(page) == [0, 1, 2]
    assert row(page, 0) == ("one.safetensors", "0.7", "", "")
    assert row(page, 1) == ("people/two.safetensors", "0.1", "-0.3", "")
    assert row(page, 2) == ("people/three.safetensors", "0.5", "", "OUTALL")
    expect(text_box(page, "prompt_box", COMBINE)).to_have_value("")  # else it would count twice
    expect(field(page, "plan", COMBINE)).to_contain_text("Stable Diffusion 1", timeout=SOON)
    expect(text_box(page, "out", COMBINE)).to_have_value("one-two-three", timeout=SOON)

    field(page, "preview", COMBINE).click()
    shown = result(page, COMBINE)
    expect(shown).to_contain_text("Preview: nothing was written", timeout=SOON)
    expect(shown).to_contain_text("How alike they are")
    expect(shown.locator("img.hypermerge-picture")).to_have_count(2)
    expect(shown).to_contain_text("cosine")
    assert not (site.loras / "one-two-three.safetensors").exists()

    field(page, "run", COMBINE).click()
    expect(shown).to_contain_text("one-two-three.safetensors", timeout=SOON)
    expect(page.locator("#hypermerge_combine_prompt")).to_have_text("<lora:one-two-three:1>")
    assert (site.loras / "one-two-three.safetensors").exists()
    refresh_and_choose(page, "loras_0_lora", "one-two-three.safetensors", COMBINE)


def test_fewer_rows_are_shown_for_a_shorter_prompt(page: Page, site: Site) -> None:
    open_page(page, site, COMBINE)
    read_prompt(page, "<lora:one:1><lora:two:2><lora:three:3>")
    expect(text_box(page, "loras_2_weight", COMBINE)).to_have_value("3", timeout=SOON)
    read_prompt(page, "<lora:two:0.25>")
    expect(text_box(page, "loras_0_weight", COMBINE)).to_have_value("0.25", timeout=SOON)
    expect(text_box(page, "loras_2_lora", COMBINE)).to_have_value("")
    assert visible_rows(page) == [0]
    expect(field(page, "loras_add", COMBINE)).to_be_visible()
    field(page, "loras_add", COMBINE).click()
    assert visible_rows(page) == [0, 1]


def test_a_prompt_that_cannot_be_read_changes_nothing(page: Page, site: Site) -> None:
    open_page(page, site, COMBINE)
    choose(page, "loras_0_lora", "one.safetensors", COMBINE)
    note = field(page, "prompt_note", COMBINE)
    for prompt, said in (
        ("<lora:on:1>", "Did you mean one?"), ("<lora:one:much>", "is no weight"), ("<lora:one:1000>", "beyond ±100"),
        ("a cat", "There is no LoRA in the prompt"), ("<lora:one:1:1:16>", "Leave it as a prompt"),
    ):  # fmt: skip
        read_prompt(page, prompt)
        expect(note).to_contain_text(said, timeout=SOON)
        expect(text_box(page, "prompt_box", COMBINE)).to_have_value(prompt)
        assert row(page, 0)[0] == "one.safetensors"


def test_a_prompt_alone_is_enough(page: Page, site: Site) -> None:
    open_page(page, site, COMBINE)
    type_into(page, "prompt_box", "<lora:one:0.5:0.25:2>", COMBINE)
    expect(field(page, "plan", COMBINE)).to_contain_text("Stable Diffusion 1", timeout=SOON)
    expect(text_box(page, "out", COMBINE)).to_have_value("one-weighted", timeout=SOON)
    type_into(page, "out", "from-prompt", COMBINE)
    field(page, "run", COMBINE).click()
    expect(result(page, COMBINE)).to_contain_text("from-prompt.safetensors", timeout=SOON)
    made, whole = read(site.loras / "from-prompt.safetensors"), read(site.loras / "one.safetensors")
    assert made.keys() == whole.keys()
    assert missed(made, whole) > 0.1  # two of four directions


def test_an_empty_panel_asks_for_a_lora(page: Page, site: Site) -> None:
    open_page(page, site, COMBINE)
    type_into(page, "out", "nothing", COMBINE)
    expect(field(page, "plan", COMBINE)).to_have_text("")
    field(page, "run", COMBINE).click()
    expect(result(page, COMBINE)).to_contain_text("No LoRA was named", timeout=SOON)


def test_rows_hold_only_so_many(tmp_path: Path) -> None:
    many = "".join(f"<lora:{i}:1>" for i in range(ROWS + 1))
    for i in range(ROWS + 1):
        (tmp_path / f"{i}.safetensors").touch()
    from lib_hypermerge.errors import SpecError

    with pytest.raises(SpecError, match=f"{ROWS + 1} LoRAs"):
        rows_of(many, FolderHost(tmp_path, tmp_path))
