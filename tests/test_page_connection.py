"""A page in a real browser whose connection to the server breaks: its jobs go on, and their results are shown."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cut_wires import Wires
from models import base_weights, rank_change, save_pair, tuned_weights
from pages import SOON, Site, choose_models, field, host_in, open_page, panel_of, result, served, slow_down, type_into
from playwright.sync_api import Page, expect

from lib_hypermerge.errors import SpecError
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.extract_layers import LayerWork
from lib_hypermerge.jobs.runner import Job, Runner


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("site"))
    base = base_weights()
    save_pair(host.checkpoint_dir, base, tuned_weights(base, rank_change(4)))
    with served(Runner(host)) as running:
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
def nothing_goes_on(site: Site) -> Iterator[None]:
    """A page that opens would watch what another test has left."""
    yield
    for job in site.runner.jobs():
        job.cancel()
        assert job.wait(60)


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that take their time, so that a connection can break meanwhile."""
    slow_down(monkeypatch, 0.02)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Layers that wait until the test lets them go on."""
    extract, gate = LayerWork.extract, threading.Event()

    def waiting(self, pair, rank=None):
        assert gate.wait(300)
        return extract(self, pair, rank)

    monkeypatch.setattr(LayerWork, "extract", waiting)
    yield gate
    gate.set()


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


def wait_for(page: Page, event: threading.Event) -> None:
    deadline = time.monotonic() + SOON / 1000
    while not event.is_set():
        assert time.monotonic() < deadline
        page.wait_for_timeout(50)


def count(site: Site, name: str) -> int:
    """How many jobs there were for a file of that name."""
    return sum(getattr(job.spec, "out", None) == name for job in site.runner.jobs())


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


def test_a_job_that_the_server_no_longer_knows_is_said_to_be_lost(
    page: Page, far: Site, wires: Wires, held: threading.Event
) -> None:
    """As after the server was started again: the page must not wait for ever."""
    open_page(page, far)
    choose_models(page)
    start(page, "unknown")
    jobs = far.runner.jobs()
    far.runner._jobs.clear()
    expect(result(page)).to_contain_text("Nothing is known of this job.", timeout=SOON)
    held.set()
    for job in jobs:
        job.cancel()
        assert job.wait(60)
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


def test_a_connection_that_was_cut_while_a_job_was_planned_loses_no_result(
    page: Page, far: Site, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, arrived, gate = Runner.submit, threading.Event(), threading.Event()

    def slowly(self, *values):
        arrived.set()
        assert gate.wait(60)
        return submit(self, *values)

    monkeypatch.setattr(Runner, "submit", slowly)
    open_page(page, far)
    choose_models(page)
    type_into(page, "out", "planned")
    type_into(page, "rank", "1")
    field(page, "run").click()
    wait_for(page, arrived)
    wires.cut()
    page.wait_for_timeout(3000)
    assert count(far, "planned") == 0
    gate.set()
    shows(page, "planned")
    assert count(far, "planned") == 1


def test_a_refusal_whose_answer_was_lost_is_told_all_the_same(
    page: Page, far: Site, wires: Wires, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, gate = threading.Event(), threading.Event()

    def refused(self, *values):
        arrived.set()
        assert gate.wait(60)
        raise SpecError("This cannot be.")

    monkeypatch.setattr(Runner, "submit", refused)
    open_page(page, far)
    choose_models(page)
    field(page, "run").click()
    wait_for(page, arrived)
    with wires.broken():
        gate.set()
        page.wait_for_timeout(1000)
    expect(result(page)).to_contain_text("This cannot be.", timeout=SOON)
    expect(page.locator(".hypermerge-running")).to_have_count(0)


UNCOVERED = """() => {
    const note = document.querySelector("#hypermerge_extract_progress_box .hypermerge-silence");
    note.scrollIntoView({block: "center"});
    const {left, top, width, height} = note.getBoundingClientRect();
    return document.elementFromPoint(left + width / 2, top + height / 2) === note;
}"""


def test_while_there_is_no_answer_the_page_says_so(page: Page, far: Site, wires: Wires, held: threading.Event) -> None:
    open_page(page, far)
    choose_models(page)
    start(page, "silent")
    note = page.locator("#hypermerge_extract_progress_box .hypermerge-silence")
    with wires.broken():
        expect(note).to_contain_text("No answer from the server.", timeout=SOON)
        assert page.evaluate(UNCOVERED)
    expect(note).to_have_count(0, timeout=SOON)
    held.set()
    shows(page, "silent")


def test_another_server_in_the_place_of_the_first_is_asked_nothing(
    page: Page, far: Site, wires: Wires, held: threading.Event, tmp_path: Path
) -> None:
    """As when it was started again: the numbers by which gradio calls events may mean others there."""
    other = Runner(FolderHost(tmp_path, tmp_path))
    told: list[str] = []
    with served(other) as second:
        open_page(page, far)
        choose_models(page)
        start(page, "restarted")
        second.runner.jobs = lambda: told.append("asked") or []  # type: ignore[method-assign]
        with wires.broken():
            wires.target = urlsplit(second.url).port or 0
            page.wait_for_timeout(2000)  # else a question that was just asked is sent again, and reaches the other
        note = page.locator("#hypermerge_extract_progress_box .hypermerge-silence")
        expect(note).to_contain_text("The server was started again: reload the page", timeout=2 * SOON)
        expect(page.locator(".hypermerge-running")).to_have_count(0)
        assert field(page, "run").get_attribute("inert") is not None
        page.wait_for_timeout(3000)
        assert told == []


def test_keys_do_not_start_a_job_twice(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    type_into(page, "out", "once")
    type_into(page, "rank", "1")
    run = field(page, "run")
    run.focus()
    for key in ("Enter", "Space", "Enter"):
        page.keyboard.press(key)
    page.wait_for_timeout(1000)
    page.keyboard.press("Space")
    shows(page, "once")
    assert count(site, "once") == 1


WEBUI_BAR = """window.requestProgress = (task, anchor, gallery, atEnd) => {
    // as the WebUI's own: it gives up at the first answer that does not come, and may end before the job has
    const bar = document.createElement("div");
    bar.className = "progressDiv";
    anchor.parentNode.insertBefore(bar, anchor);
    window.bars = (window.bars || 0) + 1;
    const end = () => { bar.remove(); atEnd(); };
    const address = `hypermerge/v1/jobs/${encodeURIComponent(task)}`;
    const ask = () => fetch(address).then((answer) => answer.json()).then((job) => {
        bar.textContent = `${Math.round((job.progress || 0) * 100)}%`;
        if (job.progress > 0.9) end(); else setTimeout(ask, 500);
    }).catch(end);
    ask();
};"""


def test_the_webuis_own_bar_comes_again_after_a_cut(page: Page, far: Site, wires: Wires, held: threading.Event) -> None:
    page.add_init_script(WEBUI_BAR)
    open_page(page, far)
    choose_models(page)
    start(page, "bar")
    bar = page.locator("#hypermerge_extract_progress_box .progressDiv")
    with wires.broken():
        expect(bar).to_have_count(0, timeout=SOON)
    expect(bar).to_contain_text("%", timeout=SOON)
    held.set()
    shows(page, "bar")
    assert 2 <= page.evaluate("window.bars") <= 4


def test_a_job_that_is_started_or_asked_for_twice_is_one(site: Site) -> None:
    """Browsers send a request again whose connection broke before an answer came."""
    following = panel_of(site.runner).following
    asked: list[str] = []

    def submit(task: str) -> Job:
        asked.append(task)
        values = {"base": "base.safetensors", "tuned": "tuned.safetensors", "out": "twice", "rank": 1}
        return site.runner.submit("extract", values, task)

    def refuse(task: str) -> Job:
        asked.append(task)
        raise SpecError("No.")

    news = [json.loads(following._start(submit, "task(1)")[1]) for _ in range(2)]
    assert asked == ["task(1)"] and [told["task"] for told in news] == ["task(1)"] * 2
    assert news[0]["number"] != news[1]["number"]
    assert site.runner.get("task(1)").wait(60)
    shown, told = following._start(refuse, "task(1)")
    assert "twice.safetensors" in shown and json.loads(told)["over"]
    for _ in range(2):
        shown, told = following._start(refuse, "task(2)")
        assert "No." in shown and json.loads(told)["over"]
    assert asked == ["task(1)", "task(2)"]


def test_a_job_can_be_interrupted_while_it_is_planned(site: Site) -> None:
    following = panel_of(site.runner).following

    def submit(task: str) -> Job:
        following.interrupt("task(other)")
        following.interrupt(task)
        values = {"base": "base.safetensors", "tuned": "tuned.safetensors", "out": "stopped"}
        return site.runner.submit("extract", values, task)

    following._start(submit, "task(planned)")
    job = site.runner.get("task(planned)")
    assert job.wait(60) and job.status == "cancelled"
    assert not (site.loras / "stopped.safetensors").exists()
