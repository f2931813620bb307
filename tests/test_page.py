"""The standalone page in a real browser: everything a person does on it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from models import base_weights, rank_change, save_pair, tuned_weights
from pages import (
    SOON,
    Site,
    choose,
    choose_models,
    field,
    host_in,
    open_page,
    panel_of,
    queued,
    refresh_and_choose,
    result,
    served,
    slow_down,
    text_box,
    type_into,
)
from playwright.sync_api import Page, expect
from safetensors import safe_open

from lib_hypermerge.jobs.extract_spec import ExtractSpec
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.jobs.verbs import VERBS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("site"))
    base = base_weights()
    save_pair(host.checkpoint_dir, base, tuned_weights(base, rank_change(4)))
    with served(Runner(host)) as running:
        yield running


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that take their time, so that there is something to interrupt."""
    slow_down(monkeypatch, 0.1)


def test_extract_from_click_to_file_and_snippet(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    expect(field(page, "plan")).to_contain_text("354 layers", timeout=SOON)
    type_into(page, "out", "clicked")
    type_into(page, "rank", "4")
    expect(field(page, "plan")).to_contain_text("0.4 MiB", timeout=SOON)
    field(page, "run").click()
    expect(result(page)).to_contain_text("clicked.safetensors", timeout=SOON)
    expect(result(page).locator("img")).to_be_visible()
    assert page.evaluate("document.querySelector('.hypermerge-picture').naturalWidth") > 500
    page.locator("#hypermerge_extract_copy").click()
    expect(page.locator("#hypermerge_extract_copy")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "<lora:clicked:1>"
    expect(page.locator("#hypermerge_extract_copy")).to_have_text("Copy")
    expect(page.locator("#hypermerge_extract_send")).to_be_hidden()  # nowhere to send it to
    with safe_open(site.loras / "clicked.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "clicked"
        assert len(file.keys()) == 3 * 354
        assert json.loads(file.metadata()["hypermerge"])["parameters"]["rank"] == 4


def test_every_control_has_its_id(page: Page, site: Site) -> None:
    open_page(page, site)
    page.get_by_text("Advanced").first.click()
    schema = page.evaluate("fetch('hypermerge/v1/schema').then(answer => answer.json())")
    for name in [*schema["verbs"]["extract"]["parameters"]["properties"], "run", "interrupt", "refresh"]:
        expect(field(page, name)).to_be_visible()


def test_a_wrong_request_is_answered_in_the_page(page: Page, site: Site) -> None:
    before = sorted(p.name for p in site.loras.iterdir())
    open_page(page, site)
    choose(page, "base", "base.safetensors")
    choose(page, "tuned", "base.safetensors")
    expect(field(page, "plan")).to_contain_text("same file", timeout=SOON)
    field(page, "run").click()
    expect(result(page)).to_contain_text("Base and fine-tune are the same file.", timeout=SOON)
    choose(page, "tuned", "tuned.safetensors")
    type_into(page, "out", "../escape")
    field(page, "run").click()
    expect(result(page)).to_contain_text("cannot be a file name", timeout=SOON)
    type_into(page, "out", "fine")
    type_into(page, "conv_rank", "many")
    field(page, "run").click()
    expect(result(page)).to_contain_text("is no whole number", timeout=SOON)
    assert sorted(p.name for p in site.loras.iterdir()) == before


def test_an_existing_file_is_kept_unless_asked(page: Page, site: Site) -> None:
    target = site.loras / "mine.safetensors"
    target.write_bytes(b"precious")
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "mine")
    field(page, "run").click()
    expect(result(page)).to_contain_text("exists already", timeout=SOON)
    assert target.read_bytes() == b"precious"
    field(page, "overwrite").locator("input").check()
    field(page, "run").click()
    expect(result(page)).to_contain_text("written in", timeout=SOON)
    assert target.stat().st_size > 100_000


def test_interrupt_stops_and_leaves_no_file(page: Page, site: Site, slow: None) -> None:
    before = sorted(p.name for p in site.loras.iterdir())
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "interrupted")
    field(page, "run").click()
    bar = page.locator("#hypermerge_extract_progress_box .progressDiv")
    expect(bar).to_contain_text("%", timeout=SOON)
    expect(bar).to_contain_text("input_blocks", timeout=SOON)
    asked = time.monotonic()
    field(page, "interrupt").click()
    expect(result(page)).to_contain_text("Cancelled", timeout=SOON)
    assert time.monotonic() - asked < 354 * 0.1 / 2 / 2  # far sooner than the job would have ended
    expect(bar).to_have_count(0)
    assert sorted(p.name for p in site.loras.iterdir()) == before


def test_a_closed_page_loses_nothing(page: Page, site: Site, slow: None) -> None:
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "unwatched")
    type_into(page, "rank", "2")
    field(page, "run").click()
    expect(page.locator("#hypermerge_extract_progress_box .progressDiv")).to_contain_text("%", timeout=SOON)
    page.goto("about:blank")
    deadline = time.monotonic() + 60
    while not (site.loras / "unwatched.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    open_page(page, site)
    expect(result(page)).to_contain_text("unwatched.safetensors", timeout=SOON)


def test_copy_works_where_a_browser_has_no_clipboard_for_scripts(page: Page, site: Site) -> None:
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "plain-http")
    type_into(page, "rank", "1")
    field(page, "run").click()
    page.locator("#hypermerge_extract_copy").click(timeout=SOON)
    expect(page.locator("#hypermerge_extract_copy")).to_have_text("Copied")
    box = text_box(page, "out")
    box.fill("")
    box.press("Control+v")
    expect(box).to_have_value("<lora:plain-http:1>")


def test_a_page_opened_again_watches_the_job_and_can_interrupt_it(page: Page, site: Site, slow: None) -> None:
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "watched-again")
    field(page, "run").click()
    bar = page.locator("#hypermerge_extract_progress_box .progressDiv")
    expect(bar).to_contain_text("input_blocks", timeout=SOON)
    open_page(page, site)
    expect(bar).to_contain_text("%", timeout=SOON)
    expect(page.locator("#hypermerge_extract_panel.hypermerge-running")).to_have_count(1)
    field(page, "interrupt").click()
    expect(result(page)).to_contain_text("Cancelled", timeout=SOON)
    expect(bar).to_have_count(0)
    expect(page.locator(".hypermerge-running")).to_have_count(0)
    assert not (site.loras / "watched-again.safetensors").exists()


def test_a_page_opened_again_shows_the_result_without_reloading(page: Page, site: Site, slow: None) -> None:
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "awaited")
    type_into(page, "rank", "1")
    field(page, "run").click()
    bar = page.locator("#hypermerge_extract_progress_box .progressDiv")
    expect(bar).to_contain_text("%", timeout=SOON)
    open_page(page, site)
    expect(bar).to_contain_text("%", timeout=SOON)
    expect(result(page)).to_contain_text("awaited.safetensors", timeout=2 * SOON)
    expect(result(page)).to_be_visible(timeout=SOON)
    expect(bar).to_have_count(0)


def test_a_job_that_waits_for_its_turn_can_be_interrupted(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "kept-waiting")
    with site.host._turn:
        field(page, "run").click()
        bar = page.locator("#hypermerge_extract_progress_box .progressDiv")
        expect(bar).to_contain_text("waiting for another job", timeout=SOON)
        field(page, "interrupt").click()
        expect(result(page)).to_contain_text("Cancelled", timeout=SOON)
    assert not (site.loras / "kept-waiting.safetensors").exists()


def test_interrupt_is_for_the_job_of_this_page_only(page: Page, site: Site) -> None:
    panel = panel_of(site.runner)
    with site.host._turn:
        job = site.runner.submit("extract", {"base": "base.safetensors", "tuned": "tuned.safetensors", "out": "theirs"})
        panel.following.interrupt("")
        panel.following.interrupt("task(mine)")
        assert job.status == "queued"
        panel.following.interrupt(job.id)
        assert job.status == "cancelled"


def test_the_suggested_name_follows_the_choice_and_is_always_fresh(page: Page, site: Site) -> None:
    other = site.checkpoints / "another.safetensors"
    other.write_bytes((site.checkpoints / "tuned.safetensors").read_bytes())
    taken = [site.loras / f"another-lora{end}.safetensors" for end in ("", "-2")]
    made = site.loras / "tuned-lora.safetensors"
    try:
        for file in taken:
            file.touch()
        open_page(page, site)
        choose_models(page)
        name = text_box(page, "out")
        choose(page, "tuned", "another.safetensors")
        expect(name).to_have_value("another-lora-3", timeout=SOON)
        choose(page, "tuned", "tuned.safetensors")
        expect(name).to_have_value("tuned-lora", timeout=SOON)
        type_into(page, "rank", "1")
        field(page, "run").click()
        expect(result(page)).to_contain_text("tuned-lora.safetensors", timeout=SOON)
        expect(name).to_have_value("tuned-lora-2", timeout=SOON)
        type_into(page, "out", "my-own")
        choose(page, "tuned", "another.safetensors")
        page.wait_for_timeout(1000)
        expect(name).to_have_value("my-own")
    finally:
        for file in (other, made, *taken):
            file.unlink(missing_ok=True)


def test_a_result_that_cannot_be_shown_is_answered_with_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: object) -> str:
        raise RuntimeError("no picture")

    panel = panel_of(site.runner)
    monkeypatch.setattr("lib_hypermerge.ui.following.job_html", broken)
    values = {**ExtractSpec.defaults(), "base": "base.safetensors", "tuned": "tuned.safetensors", "out": "unseen"}
    raw = [list(value) if isinstance(value, tuple) else value for value in values.values()]
    job = panel._submit(panel.verb, "task(unseen)", *raw)
    assert job.wait(60)
    shown, news = panel.following._tell(job.id)
    assert "RuntimeError: no picture" in shown and json.loads(news)["over"]
    assert "RuntimeError: no picture" in panel._loaded(None, None)[-2]


def test_nothing_stands_in_the_queue(site: Site) -> None:
    """gradio 3 has one small queue for all events, and either version drops what waits there if a connection breaks."""
    assert queued(site.runner) == []


def test_a_webui_stores_each_label_s_default_once(site: Site) -> None:
    """It would give the value of one verb's control to another's of the same label."""
    panels = [panel_of(site.runner, verb) for verb in VERBS]
    components = [component for panel in panels for component in panel.components]
    stored = [c.label for c in components if not getattr(c, "do_not_save_to_config", False)]
    assert len(stored) == len(set(stored)) > 20


def test_a_name_that_was_cleared_stays_empty(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    expect(field(page, "plan")).to_contain_text("354 layers", timeout=SOON)
    type_into(page, "out", "")
    page.wait_for_timeout(1500)
    expect(text_box(page, "out")).to_have_value("")


def test_refresh_finds_a_new_checkpoint(page: Page, site: Site) -> None:
    open_page(page, site)
    new = site.checkpoints / "arrived.safetensors"
    new.write_bytes((site.checkpoints / "tuned.safetensors").read_bytes())
    try:
        refresh_and_choose(page, "tuned", new.name)
    finally:
        new.unlink()
