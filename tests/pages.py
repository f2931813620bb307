"""A running standalone page over two folders, and what a person does on it."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
import uvicorn
from playwright.sync_api import Locator, Page, expect

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.extract_layers import LayerWork
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.jobs.verbs import VERBS
from lib_hypermerge.ui.page import app_of
from lib_hypermerge.ui.panel import Panel
from lib_hypermerge.ui.tab import build_tab

SOON = 30_000  # ms; a slow machine is no failure


@dataclass
class Site:
    """A running page over two folders."""

    url: str
    runner: Runner

    @property
    def host(self) -> FolderHost:
        return self.runner.host

    @property
    def checkpoints(self) -> Path:
        return self.host.checkpoint_dir

    @property
    def loras(self) -> Path:
        return self.host.lora_dir


def panel_of(runner: Runner, verb: str = "extract") -> Panel:
    with gr.Blocks():
        return Panel(VERBS[verb], runner)


def queued(runner: Runner) -> list[dict]:
    """The events of the whole tab that gradio would put into its queue."""
    dependencies = build_tab(runner).config["dependencies"]
    return [d for d in dependencies if d["backend_fn"] and d["queue"] is not False]


def host_in(folder: Path) -> FolderHost:
    """Over two new folders for checkpoints and LoRAs."""
    checkpoints, loras = folder / "checkpoints", folder / "loras"
    checkpoints.mkdir()
    loras.mkdir()
    return FolderHost(checkpoints, loras)


def slow_down(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every layer of an extraction takes so much longer, so that something can happen meanwhile."""
    extract = LayerWork.extract

    def slowly(self, pair, rank=None):
        time.sleep(seconds)
        return extract(self, pair, rank)

    monkeypatch.setattr(LayerWork, "extract", slowly)


@contextmanager
def served(runner: Runner) -> Iterator[Site]:
    """The page of a runner, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app_of(runner), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield Site(f"http://127.0.0.1:{port}", runner)
    server.should_exit = True
    thread.join(10)


def field(page: Page, name: str, verb: str = "extract") -> Locator:
    return page.locator(f"#hypermerge_{verb}_{name}").first


def text_box(page: Page, name: str, verb: str = "extract") -> Locator:
    return field(page, name, verb).locator("input, textarea").first


def result(page: Page, verb: str = "extract") -> Locator:
    return field(page, "result", verb)


def type_into(page: Page, name: str, text: str, verb: str = "extract") -> None:
    box = text_box(page, name, verb)
    box.fill(text)
    box.blur()


def choose(page: Page, name: str, option: str, verb: str = "extract") -> None:
    """Pick an option of a dropdown by its whole text."""
    field(page, name, verb).locator("input").first.click()
    page.locator("ul.options li").filter(has_text=re.compile(rf"^\W*{re.escape(option)}\s*$")).first.click()
    expect(field(page, name, verb).locator("input").first).to_have_value(option)


def refresh_and_choose(page: Page, name: str, option: str, verb: str = "extract") -> None:
    """The same for one that is only in the list once that is drawn anew."""
    field(page, "refresh", verb).click()
    deadline = time.monotonic() + SOON / 1000
    while time.monotonic() < deadline:
        field(page, name, verb).locator("input").first.click()
        if any(option in text for text in page.locator("ul.options li").all_inner_texts()):
            break
        field(page, name, verb).locator("input").first.blur()
        page.wait_for_timeout(300)
    choose(page, name, option, verb)


def open_page(page: Page, site: Site, verb: str = "extract") -> None:
    page.goto(site.url)
    expect(field(page, "panel", next(iter(VERBS)))).to_be_visible(timeout=SOON)
    # gradio 3 gives tabs no role; Run has the same text, but stands below
    page.locator("#hypermerge_tabs button").get_by_text(VERBS[verb].title, exact=True).first.click()
    expect(field(page, "run", verb)).to_be_visible(timeout=SOON)
    expect(page.locator(f"#hypermerge_{verb}_panel.hypermerge-loaded")).to_have_count(1, timeout=SOON)
    page.wait_for_timeout(200)  # until the page has drawn the lists anew: an open one would shift under the click


def choose_models(page: Page) -> None:
    choose(page, "base", "base.safetensors")
    choose(page, "tuned", "tuned.safetensors")
    expect(text_box(page, "out")).to_have_value("tuned-lora", timeout=SOON)
