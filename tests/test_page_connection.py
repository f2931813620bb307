"""A page in a real browser whose connection to the server breaks: its jobs go on, and their results are shown."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from urllib.parse import urlsplit

import pytest
from cut_wires import Wires
from models import base_weights, rank_change, save_pair, tuned_weights
from pages import SOON, Site, choose_models, field, open_page, result, served, type_into
from playwright.sync_api import Page, expect

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.extract_layers import LayerWork
from lib_hypermerge.jobs.runner import Runner


@pytest.fixture
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    checkpoints, loras = folder / "checkpoints", folder / "loras"
    checkpoints.mkdir()
    loras.mkdir()
    base = base_weights()
    save_pair(checkpoints, base, tuned_weights(base, rank_change(4)))
    with served(Runner(FolderHost(checkpoints, loras))) as running:
        yield running


@pytest.fixture
def wires(site: Site) -> Iterator[Wires]:
    wires = Wires(urlsplit(site.url).port or 0)
    yield wires
    wires.close()


@pytest.fixture
def far(site: Site, wires: Wires) -> Site:
    """The same page, reached through the wires."""
    return replace(site, url=f"http://127.0.0.1:{wires.port}")


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that take their time, so that a connection can break meanwhile."""
    extract = LayerWork.extract

    def slowly(self, pair, rank=None):
        time.sleep(0.02)
        return extract(self, pair, rank)

    monkeypatch.setattr(LayerWork, "extract", slowly)


def start(page: Page, name: str) -> None:
    type_into(page, "out", name)
    type_into(page, "rank", "1")
    field(page, "run").click()
    expect(page.locator("#hypermerge_extract_progress_box .progressDiv")).to_contain_text("%", timeout=SOON)


def shows(page: Page, name: str) -> None:
    expect(result(page)).to_contain_text(f"{name}.safetensors", timeout=2 * SOON)
    expect(page.locator("#hypermerge_extract_panel.hypermerge-running")).to_have_count(0, timeout=SOON)
    expect(page.locator("#hypermerge_extract_copy")).to_be_visible()
    expect(result(page).locator("span.error")).to_have_count(0)  # gradio's own word for an event that failed


def test_a_connection_that_was_cut_while_a_job_ran_loses_no_result(page: Page, far: Site, wires: Wires) -> None:
    open_page(page, far)
    choose_models(page)
    start(page, "cut")
    page.wait_for_timeout(1000)
    wires.cut()
    shows(page, "cut")


def test_a_connection_that_was_away_when_the_job_ended_loses_no_result(page: Page, far: Site, wires: Wires) -> None:
    open_page(page, far)
    choose_models(page)
    start(page, "away")
    with wires.broken():
        deadline = time.monotonic() + SOON / 1000
        while not (far.loras / "away.safetensors").exists():
            assert time.monotonic() < deadline
            page.wait_for_timeout(200)
        page.wait_for_timeout(1000)
    shows(page, "away")


def test_a_connection_that_was_cut_while_an_opened_page_watched_loses_no_result(
    page: Page, far: Site, wires: Wires
) -> None:
    open_page(page, far)
    choose_models(page)
    start(page, "watched")
    open_page(page, far)
    wires.cut()
    page.wait_for_timeout(1000)
    wires.cut()
    shows(page, "watched")


def test_a_job_that_the_server_no_longer_knows_is_said_to_be_lost(page: Page, far: Site, wires: Wires) -> None:
    """As after the server was started again: the page must not wait for ever."""
    open_page(page, far)
    choose_models(page)
    start(page, "unknown")
    for job in far.runner.jobs():
        job.cancel()
    far.runner._jobs.clear()
    expect(result(page)).to_contain_text("Nothing is known of this job.", timeout=SOON)
    expect(page.locator("#hypermerge_extract_panel.hypermerge-running")).to_have_count(0)
    start(page, "known")
    shows(page, "known")


def test_a_click_that_does_not_reach_the_server_is_answered_when_it_is_back(
    page: Page, far: Site, wires: Wires
) -> None:
    open_page(page, far)
    choose_models(page)
    type_into(page, "out", "unsent")
    page.wait_for_timeout(500)
    with wires.broken():
        field(page, "run").click()
        page.wait_for_timeout(2000)
    expect(result(page)).to_contain_text("Nothing is known of this job.", timeout=2 * SOON)
    start(page, "sent")
    shows(page, "sent")
