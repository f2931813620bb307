"""The transfer panel in a real browser: LoRAs and two bases, the forecast, a preview, the result with its picture."""

from __future__ import annotations

from collections.abc import Iterator

import convert_files as files
import pytest
from models import base_weights, save_checkpoint
from pages import SOON, Site, choose, field, host_in, open_page, result, served, text_box
from playwright.sync_api import Page, expect
from transfer_models import noisy

from lib_hypermerge.jobs.runner import Runner

VERB = "transfer"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("transfer"))
    checkpoints, loras = host.checkpoint_dir, host.lora_dir
    base = base_weights()
    save_checkpoint(checkpoints / "source.safetensors", base)
    save_checkpoint(checkpoints / "relative.safetensors", noisy(base, 0.1))
    save_checkpoint(checkpoints / "stranger.safetensors", base_weights(seed=3))
    for seed, name in enumerate(("style", "pose")):
        files.save(loras / f"{name}.safetensors", files.lora("sd15", only=files.some, seed=seed))
    with served(Runner(host)) as running:
        yield running


def choose_models(page: Page, target: str = "relative") -> None:
    field(page, "loras", VERB).locator("input").first.click()
    page.locator("ul.options li").filter(has_text="style.safetensors").first.click()
    page.keyboard.press("Escape")
    choose(page, "source_base", "source.safetensors", VERB)
    choose(page, "target_base", f"{target}.safetensors", VERB)


def test_preview_and_run(page: Page, site: Site) -> None:
    open_page(page, site, VERB)
    choose_models(page)
    expect(text_box(page, "out", VERB)).to_have_value("style-for-relative", timeout=SOON)
    expect(field(page, "plan", VERB)).to_contain_text("layers, about", timeout=SOON)
    field(page, "preview", VERB).click()
    expect(result(page, VERB)).to_contain_text("Preview: nothing was written.", timeout=SOON)
    assert not (site.loras / "style-for-relative.safetensors").exists()
    field(page, "run", VERB).click()
    expect(result(page, VERB)).to_contain_text("style-for-relative.safetensors (", timeout=SOON)
    shown = result(page, VERB)
    expect(shown).to_contain_text("Transfer works between related models. These have a similarity Φ of 0.9")
    expect(shown).to_contain_text("projected")
    picture = shown.locator("img.hypermerge-picture")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") > 500
    expect(page.locator("#hypermerge_transfer_prompt")).to_have_text("<lora:style-for-relative:1>")
    assert (site.loras / "style-for-relative.safetensors").exists()
    expect(text_box(page, "out", VERB)).to_have_value("style-for-relative-2", timeout=SOON)


def test_strangers_are_refused(page: Page, site: Site) -> None:
    open_page(page, site, VERB)
    choose_models(page, "stranger")
    expect(text_box(page, "out", VERB)).to_have_value("style-for-stranger", timeout=SOON)
    field(page, "run", VERB).click()
    expect(result(page, VERB)).to_contain_text("are not related", timeout=SOON)
    assert not (site.loras / "style-for-stranger.safetensors").exists()
