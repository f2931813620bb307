"""The resize panel in a real browser: one LoRA, a ladder, many at once, a preview with all methods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from convert_files import lora, save
from pages import SOON, Site, choose, field, open_page, result, served, text_box, type_into
from playwright.sync_api import Page, expect

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.runner import Runner

RESIZE = "resize"


@pytest.fixture
def site(tmp_path) -> Iterator[Site]:
    checkpoints, loras = tmp_path / "checkpoints", tmp_path / "loras"
    checkpoints.mkdir()
    (loras / "people").mkdir(parents=True)
    save(loras / "style.safetensors", lora("sd15", rank=lambda i: 8, seed=1))
    for number, name in enumerate(("ann", "bob")):
        save(loras / "people" / f"{name}.safetensors", lora("sd15", rank=lambda i: 6, seed=2 + number))
    with served(Runner(FolderHost(checkpoints, loras))) as running:
        yield running


def pick(page: Page, name: str) -> None:
    box = field(page, "loras", RESIZE).locator("input").first
    box.fill(name)
    expect(page.locator("ul.options li").filter(has_text=name).first).to_be_visible()
    box.press("Enter")
    box.blur()
    expect(field(page, "loras", RESIZE)).to_contain_text(name)


def run(page: Page) -> None:
    field(page, "run", RESIZE).click()


def test_a_lora_gets_a_lower_rank(page: Page, site: Site) -> None:
    open_page(page, site, RESIZE)
    type_into(page, "rank", "4", RESIZE)
    pick(page, "style.safetensors")
    expect(text_box(page, "out", RESIZE)).to_have_value("style-4", timeout=SOON)
    expect(field(page, "plan", RESIZE)).to_contain_text("Stable Diffusion 1", timeout=SOON)
    run(page)
    expect(result(page, RESIZE)).to_contain_text("style-4.safetensors", timeout=SOON)
    expect(result(page, RESIZE)).to_contain_text("of the change")
    expect(result(page, RESIZE).locator("img")).to_have_count(1)
    expect(result(page, RESIZE)).to_contain_text("<lora:style-4:1>")
    assert (site.loras / "style-4.safetensors").exists()
    expect(text_box(page, "out", RESIZE)).to_have_value("style-4-2", timeout=SOON)


def test_a_rank_above_the_files_is_refused_unless_it_is_filled_up(page: Page, site: Site) -> None:
    open_page(page, site, RESIZE)
    type_into(page, "rank", "16", RESIZE)
    pick(page, "style.safetensors")
    expect(field(page, "plan", RESIZE)).to_contain_text("above that of style.safetensors, 8", timeout=SOON)
    field(page, "fill", RESIZE).locator("input").check()
    expect(field(page, "plan", RESIZE)).to_contain_text("layers", timeout=SOON)
    run(page)
    expect(result(page, RESIZE)).to_contain_text("style-16.safetensors", timeout=SOON)
    expect(result(page, RESIZE)).to_contain_text("0.0 %")


def test_a_folder_and_a_ladder_give_a_row_for_each_file(page: Page, site: Site) -> None:
    open_page(page, site, RESIZE)
    type_into(page, "rank", "4, 2", RESIZE)
    type_into(page, "pattern", "people/*", RESIZE)
    expect(text_box(page, "out", RESIZE)).to_have_value("{name}-{rank}", timeout=SOON)
    expect(field(page, "plan", RESIZE)).to_contain_text("Stable Diffusion 1", timeout=SOON)
    run(page)
    expect(result(page, RESIZE)).to_contain_text("4 files", timeout=SOON)
    for name in ("ann-4", "ann-2", "bob-4", "bob-2"):
        expect(result(page, RESIZE)).to_contain_text(f"{name}.safetensors")
        assert (site.loras / f"{name}.safetensors").exists()


def test_a_preview_shows_what_each_method_misses_and_writes_nothing(page: Page, site: Site) -> None:
    before = sorted(site.loras.rglob("*"))
    open_page(page, site, RESIZE)
    type_into(page, "rank", "4", RESIZE)
    pick(page, "style.safetensors")
    expect(field(page, "plan", RESIZE)).to_contain_text("Stable Diffusion 1", timeout=SOON)
    page.locator("#hypermerge_resize_advanced").first.get_by_text("Advanced").click()
    choose(page, "method", "random", RESIZE)
    field(page, "preview", RESIZE).click()
    for text in ("Nothing was written", "randomised SVD", "sparse projection", "expected", "Take the method svd"):
        expect(result(page, RESIZE)).to_contain_text(text, timeout=SOON, ignore_case=True)
    assert sorted(site.loras.rglob("*")) == before
