"""Another family than LoRA, chosen on the page: what each would miss is in the result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import ATTENTION, SD1_TEXT, base_weights, save_pair, tuned_weights
from pages import SOON, Site, choose, choose_models, field, host_in, open_page, result, served, text_box, type_into
from playwright.sync_api import Page, expect
from safetensors.torch import load_file

from lib_hypermerge.jobs.runner import Runner


def rescaled(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
    """Two layers whose input channels became longer or shorter."""
    if key not in (ATTENTION, SD1_TEXT):
        return None
    return 0.1 * weight * torch.randn(1, weight.shape[1], generator=generator)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("site"))
    base = base_weights("sd15", 16)
    save_pair(host.checkpoint_dir, base, tuned_weights(base, rescaled))
    with served(Runner(host)) as running:
        yield running


def test_the_name_follows_the_family(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    choose(page, "family", "dora")
    expect(text_box(page, "out")).to_have_value("tuned-dora", timeout=SOON)


def test_the_best_family_with_a_table_of_all(page: Page, site: Site) -> None:
    open_page(page, site)
    choose_models(page)
    choose(page, "family", "best")
    type_into(page, "rank", "2")
    expect(field(page, "plan")).to_contain_text("354 layers", timeout=SOON)
    field(page, "run").click()
    expect(result(page)).to_contain_text("tuned-lora.safetensors", timeout=SOON)
    expect(result(page)).to_contain_text("Written as 2 DoRA layers. Compared on 2 of 354 layers")
    for family in ("LoRA", "DoRA", "LoHa", "LoKr"):
        expect(result(page).locator("tr", has=page.get_by_text(family, exact=True))).to_contain_text("error")
    stored = load_file(site.loras / "tuned-lora.safetensors")
    assert sum(key.endswith(".dora_scale") for key in stored) == 2
