"""Fixtures for tests that drive a page in a real browser, and pairs of narrow checkpoints."""

import functools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from models import base_weights, rank_change, save_pair, tuned_weights
from playwright.sync_api import Browser, Page, sync_playwright

from dev import chromium

# Before anything imports gradio or a hub client: tests use no network.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

BROWSER_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
    # gradio's page asks for fonts and a script from elsewhere; refuse at once.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
]

# What the page throws for a file of another site that did not load.
NETWORK_ERROR = re.compile(r"Failed to fetch|NetworkError|Unable to preload|Load failed|dynamically imported module")


@pytest.fixture(scope="session")
def chromium_path() -> str:
    """The browser to test in; without one the test fails, it is never skipped."""
    return chromium.find(os.environ, shutil.which, chromium.works, installers=[])


@pytest.fixture(scope="session")
def browser(chromium_path: str) -> Iterator[Browser]:
    """A headless Chromium shared by the whole run."""
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium_path, args=BROWSER_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page that may use the clipboard; an uncaught error in it fails the test."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert [error for error in errors if not NETWORK_ERROR.search(error)] == []


@pytest.fixture(scope="session")
def known_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """family → paths of a narrow float32 base and of a fine-tune whose every matrix changed by rank 4."""

    @functools.cache
    def pair(family: str) -> tuple[Path, Path]:
        base = base_weights(family)
        return save_pair(tmp_path_factory.mktemp(family), base, tuned_weights(base, rank_change(4)))

    return pair
