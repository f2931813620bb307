"""Hyper-Merge, Fit and Restore in a real browser: from the choice of models to prompts, styles and files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from models import base_weights, rank_change, save_checkpoint, tuned_weights
from pages import SOON, Site, choose, field, open_page, panel_of, queued, result, served, text_box, type_into
from playwright.sync_api import Locator, Page, expect
from safetensors import safe_open

from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.runner import DONE, Runner
from lib_hypermerge.jobs.verbs import VERBS
from lib_hypermerge.ui.widgets import NONE

HYPER, FIT, RESTORE = "hyper", "fit", "restore"
MODELS = ["one.safetensors", "two.safetensors", "three.safetensors"]
FAST = {"starts": 1, "iterations": 3}


class StyleHost(FolderHost):
    """Two folders, and a place for styles."""

    styles: dict[str, str] | None = None

    def add_styles(self, prompts: Mapping[str, str]) -> list[str]:
        self.styles = dict(prompts)
        return list(prompts)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("hyper")
    (folder / "loras").mkdir()
    base = base_weights()
    for seed, name in enumerate([*MODELS, "other.safetensors"]):
        save_checkpoint(folder / name, tuned_weights(base, rank_change(2), seed))
    runner = Runner(StyleHost(folder, folder / "loras"))
    job = runner.submit(HYPER, {"models": MODELS, "ranks": "2,1", "name": "family", **FAST})
    job.wait()
    assert job.status == DONE, job.error
    with served(runner) as running:
        yield running


def add(page: Page, name: str, option: str, verb: str = HYPER) -> None:
    """Choose one more of a list."""
    box = field(page, name, verb).locator("input").first
    box.fill(option)
    page.locator("ul.options li").filter(has_text=re.compile(rf"^\W*{re.escape(option)}\s*$")).first.click()
    expect(field(page, name, verb)).to_contain_text(option)


def ran(page: Page, verb: str) -> Locator:
    """The result, once the page has nothing more to draw."""
    expect(field(page, "panel", verb)).not_to_have_class(re.compile("hypermerge-running"), timeout=SOON)
    return result(page, verb)


def files(site: Site) -> list[Path]:
    return sorted(path for path in site.checkpoints.rglob("*") if path.is_file())


def test_choose_see_the_size_preview_run_copy_and_keep_styles(page: Page, site: Site) -> None:
    before = files(site)
    open_page(page, site, HYPER)
    add(page, "models", MODELS[2])
    expect(field(page, "plan", HYPER)).to_have_text("")  # one alone is no question yet
    add(page, "models", MODELS[0])
    add(page, "models", MODELS[1])
    expect(text_box(page, "name", HYPER)).to_have_value("three-hyper", timeout=SOON)
    plan = field(page, "plan", HYPER)
    type_into(page, "ranks", "4,", HYPER)
    expect(plan).to_contain_text(re.compile(r"\(rank 4: \d\.\d MiB\)"), timeout=SOON)
    type_into(page, "ranks", "4,2", HYPER)
    expect(plan).to_contain_text(re.compile(r"\(rank 4: \d\.\d MiB, rank 2: \d\.\d MiB\)"), timeout=SOON)
    expect(field(page, "panel", HYPER).locator("#hypermerge_hyper_preview")).to_have_count(1)  # no box to tick
    page.locator("#hypermerge_hyper_advanced button, #hypermerge_hyper_advanced .label-wrap").first.click()
    for name, value in FAST.items():
        type_into(page, name, str(value), HYPER)
    field(page, "preview", HYPER).click()
    expect(result(page, HYPER)).to_contain_text("nothing was written", timeout=SOON)
    expect(ran(page, HYPER)).to_contain_text("three-hyper-2.safetensors")
    assert files(site) == before
    field(page, "run", HYPER).click()
    expect(result(page, HYPER)).to_contain_text("written in", timeout=SOON)
    shown = ran(page, HYPER)
    expect(shown.locator("table.hypermerge-prompts tr")).to_have_count(4)
    expect(shown.locator("img")).to_have_count(4)
    expect(text_box(page, "name", HYPER)).to_have_value("three-hyper2", timeout=SOON)
    shown.locator("#hypermerge_hyper_copy_1").dispatch_event("click")
    expect(shown.locator("#hypermerge_hyper_copy_1")).to_have_text("Copied")
    prompt = page.evaluate("navigator.clipboard.readText()")
    assert prompt == shown.locator("#hypermerge_hyper_prompt_1").inner_text()
    assert prompt.startswith("<lora:three-hyper-1:")
    expect(page.locator("#hypermerge_hyper_send_1")).to_be_hidden()  # nowhere to send it to
    shown.locator("#hypermerge_hyper_styles").dispatch_event("click")
    expect(field(page, "styles_note", HYPER)).to_contain_text("three-hyper: one", timeout=SOON)
    assert site.host.styles is not None
    assert list(site.host.styles) == [f"three-hyper: {name}" for name in ("three", "one", "two")]
    assert site.host.styles["three-hyper: one"] == f"{{prompt}} {prompt}"
    for path in set(files(site)) - set(before):
        path.unlink()


def test_wrong_requests_are_answered_in_the_page(page: Page, site: Site) -> None:
    open_page(page, site, HYPER)
    add(page, "models", MODELS[0])
    type_into(page, "name", "family", HYPER)
    field(page, "run", HYPER).click()
    expect(result(page, HYPER)).to_contain_text("needs two or more models", timeout=SOON)
    add(page, "models", MODELS[1])
    type_into(page, "ranks", "many", HYPER)
    expect(field(page, "plan", HYPER)).to_contain_text("'many' is no list of ranks", timeout=SOON)
    field(page, "preview", HYPER).click()
    expect(result(page, HYPER)).to_contain_text("'many' is no list of ranks", timeout=SOON)
    type_into(page, "ranks", "2", HYPER)
    field(page, "run", HYPER).click()
    expect(result(page, HYPER)).to_contain_text("exists already", timeout=SOON)


def test_what_is_optional_can_be_taken_back(page: Page, site: Site) -> None:
    open_page(page, site, HYPER)
    add(page, "models", MODELS[0])
    add(page, "models", MODELS[1])
    choose(page, "base", "one.safetensors", HYPER)
    plan = field(page, "plan", HYPER)
    expect(plan).to_contain_text("one is the base itself", timeout=SOON)
    choose(page, "base", NONE, HYPER)
    expect(plan).not_to_contain_text("the base itself", timeout=SOON)
    expect(plan).to_contain_text("354 layers", timeout=SOON)


def test_fit_a_model_that_was_not_merged(page: Page, site: Site) -> None:
    open_page(page, site, FIT)
    choose(page, "hyper", "family.safetensors", FIT)
    choose(page, "model", "other.safetensors", FIT)
    expect(field(page, "plan", FIT)).to_contain_text("354 layers", timeout=SOON)
    field(page, "run", FIT).click()
    expect(result(page, FIT)).to_contain_text("<lora:family-1:", timeout=SOON)
    expect(ran(page, FIT).locator("img")).to_have_count(1)


def test_restore_one_of_the_models_that_are_offered(page: Page, site: Site) -> None:
    open_page(page, site, RESTORE)
    choose(page, "hyper", "family.safetensors", RESTORE)
    offers = field(page, "plan", RESTORE).locator(".hypermerge-offers button")
    expect(offers).to_have_text(["one", "two", "three"], timeout=SOON)
    expect(field(page, "plan", RESTORE).locator(".hypermerge-error")).to_have_count(0)  # there is time to choose
    offers.nth(1).dispatch_event("click")
    expect(text_box(page, "model", RESTORE)).to_have_value("two")
    expect(text_box(page, "out", RESTORE)).to_have_value("two-restored", timeout=SOON)
    field(page, "run", RESTORE).click()
    expect(result(page, RESTORE)).to_contain_text("two-restored.safetensors", timeout=SOON)
    with (
        safe_open(site.checkpoints / "two-restored.safetensors", "pt") as made,
        safe_open(site.checkpoints / MODELS[1], "pt") as original,
    ):
        assert set(made.keys()) == set(original.keys())


def test_a_host_without_styles_offers_none(site: Site) -> None:
    assert panel_of(site.runner, HYPER).styles is not None
    assert queued(site.runner) == []
    assert panel_of(Runner(FolderHost(site.checkpoints, site.loras)), HYPER).styles is None
    assert all(panel_of(site.runner, verb).styles is None for verb in VERBS if verb != HYPER)


def test_the_jobs_with_a_preview_have_a_button_for_it(site: Site) -> None:
    assert {verb for verb in VERBS if panel_of(site.runner, verb).preview is not None} == {
        HYPER, "resize", "combine", "transfer"
    }  # fmt: skip
