"""Inspect and convert in a real browser: verbs without an output, and with one of several kinds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from models import base_weights, extract, rank_change, save_pair, tuned_weights
from pages import SOON, Site, choose, field, host_in, open_page, refresh_and_choose, result, served, text_box, type_into
from playwright.sync_api import Page, expect

from lib_hypermerge.jobs.runner import Runner


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("models"))
    checkpoints, loras = host.checkpoint_dir, host.lora_dir
    base = base_weights()
    pair = save_pair(checkpoints, base, tuned_weights(base, rank_change(2)))
    for name, rank in (("one", 1), ("two", 2)):
        extract(*pair, loras / name, "--rank", rank)
    with served(Runner(host)) as running:
        yield running


def pick(page: Page, *names: str) -> None:
    """Add files to the list of what to inspect."""
    for name in names:
        box = field(page, "files", "inspect").locator("input").first
        box.fill(name)
        expect(page.locator("ul.options li").filter(has_text=name).first).to_be_visible()
        box.press("Enter")
        box.blur()
    for name in names:
        expect(field(page, "files", "inspect")).to_contain_text(name)


def test_inspect_a_lora_and_a_checkpoint(page: Page, site: Site) -> None:
    before = sorted(site.checkpoints.parent.rglob("*"))
    open_page(page, site, "inspect")
    expect(field(page, "plan", "inspect")).to_have_text("")
    expect(field(page, "out", "inspect")).to_have_count(0)
    pick(page, "two.safetensors", "base.safetensors")
    field(page, "run", "inspect").click()
    expect(result(page, "inspect")).to_contain_text("two.safetensors", timeout=SOON)
    expect(result(page, "inspect")).to_contain_text("kohya")
    expect(result(page, "inspect")).to_contain_text("Stable Diffusion 1")
    assert sorted(site.checkpoints.parent.rglob("*")) == before


def test_inspect_two_loras_with_pictures(page: Page, site: Site) -> None:
    open_page(page, site, "inspect")
    pick(page, "one.safetensors", "two.safetensors")
    field(page, "spectra", "inspect").locator("input").check()
    field(page, "run", "inspect").click()
    expect(result(page, "inspect").locator("img")).to_have_count(3, timeout=SOON)  # two of spectra, one of likeness
    widths = page.evaluate("Array.from(document.querySelectorAll('.hypermerge-picture'), (one) => one.naturalWidth)")
    assert min(widths) > 300


def test_convert_a_lora_to_a_folder(page: Page, site: Site) -> None:
    open_page(page, site, "convert")
    choose(page, "lora", "two.safetensors", "convert")
    expect(text_box(page, "out", "convert")).to_have_value("two-kohya", timeout=SOON)
    choose(page, "to", "peft", "convert")
    expect(text_box(page, "out", "convert")).to_have_value("two-peft", timeout=SOON)
    field(page, "run", "convert").click()
    expect(result(page, "convert")).to_contain_text("two-peft", timeout=SOON)
    assert (site.loras / "two-peft" / "unet" / "adapter_config.json").exists()
    expect(text_box(page, "out", "convert")).to_have_value("two-peft-2", timeout=SOON)
    type_into(page, "out", "two-peft", "convert")
    field(page, "run", "convert").click()
    expect(result(page, "convert")).to_contain_text("exists already", timeout=SOON)
    refresh_and_choose(page, "lora", "two-peft", "convert")


def test_convert_a_checkpoint(page: Page, site: Site) -> None:
    open_page(page, site, "convert")
    choose(page, "checkpoint", "base.safetensors", "convert")
    choose(page, "dtype", "fp16", "convert")
    expect(text_box(page, "out", "convert")).to_have_value("base-fp16", timeout=SOON)
    field(page, "run", "convert").click()
    expect(result(page, "convert")).to_contain_text("base-fp16.safetensors", timeout=SOON)
    assert (site.checkpoints / "base-fp16.safetensors").exists()
