"""Try in memory and Take it back, in a page whose host has a model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from memory import module_tree, parameters
from models import base_weights, extract, rank_change, save_pair, tuned_weights
from pages import SOON, Site, choose, field, open_page, panel_of, queued, result, served, text_box, type_into
from playwright.sync_api import Page, expect
from safetensors.torch import load_file

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.hosts.webui_model import PlainModel
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.jobs.trial import current

MERGE = "merge"


class Memory(PlainModel):
    def forget_results(self) -> None:
        pass


class MemoryHost(FolderHost):
    """Two folders, and base.safetensors as the model in memory."""

    trial = None

    def __init__(self, checkpoints: Path, loras: Path):
        super().__init__(checkpoints, loras)
        self.model = module_tree(load_file(checkpoints / "base.safetensors"))

    def model_in_memory(self) -> Memory:
        return Memory(self.model, self.checkpoint_dir / "base.safetensors")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("trial")
    (folder / "loras").mkdir()
    base = base_weights()
    pair = save_pair(folder, base, tuned_weights(base, rank_change(2)))
    extract(*pair, folder / "loras" / "change", "--rank", 2)
    with served(Runner(MemoryHost(folder, folder / "loras"))) as running:
        yield running


def test_try_reload_the_page_and_take_it_back(page: Page, site: Site) -> None:
    model, files = site.host.model, sorted(site.checkpoints.rglob("*"))
    before = parameters(model)
    open_page(page, site, MERGE)
    expect(field(page, "take_back", MERGE)).to_be_hidden()
    choose(page, "checkpoint", "base.safetensors", MERGE)
    choose(page, "loras_0_lora", "change.safetensors", MERGE)
    expect(field(page, "plan", MERGE)).to_contain_text("354 layers", timeout=SOON)
    type_into(page, "out", "", MERGE)  # nothing is written, so it needs no name
    field(page, "try", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("The model in memory is changed", timeout=SOON)
    expect(field(page, "trial", MERGE)).to_contain_text("changed by change.safetensors (1)", timeout=SOON)
    assert not all(torch.equal(value, before[key]) for key, value in parameters(model).items())
    assert sorted(site.checkpoints.rglob("*")) == files
    open_page(page, site, MERGE)
    expect(field(page, "trial", MERGE)).to_contain_text("changed by change.safetensors (1)", timeout=SOON)
    field(page, "take_back", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("is as it was", timeout=SOON)
    expect(field(page, "trial", MERGE)).to_have_text("", timeout=SOON)
    expect(field(page, "take_back", MERGE)).to_be_hidden(timeout=SOON)
    assert all(torch.equal(value, before[key]) for key, value in parameters(model).items())
    assert current(site.host) is None


def test_a_checkpoint_that_is_not_in_memory_is_refused(page: Page, site: Site) -> None:
    open_page(page, site, MERGE)
    choose(page, "checkpoint", "tuned.safetensors", MERGE)
    choose(page, "loras_0_lora", "change.safetensors", MERGE)
    expect(text_box(page, "out", MERGE)).to_have_value("tuned-change", timeout=SOON)
    field(page, "try", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("The model in memory is base.safetensors", timeout=SOON)
    expect(field(page, "take_back", MERGE)).to_be_hidden()


def test_the_webui_s_checkpoint_is_switched_by_its_own_function(page: Page, site: Site) -> None:
    page.add_init_script("window.selectCheckpoint = (name) => { window.selected = name; }")
    open_page(page, site, MERGE)
    choose(page, "checkpoint", "base.safetensors", MERGE)
    choose(page, "loras_0_lora", "change.safetensors", MERGE)
    type_into(page, "out", "loaded", MERGE)
    field(page, "run", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("loaded.safetensors", timeout=SOON)
    page.evaluate("document.documentElement.classList.remove('hypermerge-alone')")  # as in a WebUI's page
    # the end of a run draws the panel anew, and a press that begins on one button and ends on its successor is none
    expect(field(page, "panel", MERGE)).not_to_have_class(re.compile("hypermerge-running"), timeout=SOON)
    page.locator("#hypermerge_merge_load").dispatch_event("click")
    page.wait_for_function("window.selected === 'loaded.safetensors'", timeout=SOON)


def test_a_host_without_one_has_no_such_buttons(site: Site) -> None:
    assert panel_of(site.runner, MERGE).trial is not None
    plain = Runner(FolderHost(site.checkpoints, site.loras))
    assert panel_of(plain, MERGE).trial is None
    assert panel_of(site.runner, "extract").trial is None
    assert queued(site.runner) == []
