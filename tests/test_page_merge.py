"""The merge panel in a real browser: rows of LoRAs, the graph of block weights, the result."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from models import base_weights, extract, rank_change, save_pair, tuned_weights
from pages import SOON, Site, choose, field, host_in, open_page, refresh_and_choose, result, served, text_box, type_into
from playwright.sync_api import Page, expect
from safetensors import safe_open

from lib_hypermerge.errors import SpecError
from lib_hypermerge.jobs import block_weights
from lib_hypermerge.jobs.runner import Runner
from lib_hypermerge.ui.lora_rows import ROWS

MERGE = "merge"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    host = host_in(tmp_path_factory.mktemp("merge"))
    checkpoints, loras = host.checkpoint_dir, host.lora_dir
    base = base_weights()
    pair = save_pair(checkpoints, base, tuned_weights(base, rank_change(2)))
    for name in ("one", "two"):
        extract(*pair, loras / name, "--rank", 2)
    with served(Runner(host)) as running:
        yield running


def open_merge(page: Page, site: Site) -> None:
    open_page(page, site, MERGE)
    choose(page, "checkpoint", "base.safetensors", MERGE)
    choose(page, "loras_0_lora", "one.safetensors", MERGE)


def part(page: Page, row: int, name: str):
    return field(page, f"loras_{row}_{name}", MERGE)


def graph(page: Page, row: int = 0):
    return page.locator(f"#hypermerge_merge_loras_{row}_graph").first


def open_graph(page: Page, row: int = 0) -> None:
    graph(page, row).locator("summary").click()
    expect(graph(page, row).locator("svg")).to_be_visible()


def drag(page: Page, start: tuple[int, float], stop: tuple[int, float]) -> None:
    """From the height (0…1) in a bar to one in another."""
    rooms = graph(page).locator(".hypermerge-blocks-room")

    def place(index: int, height: float) -> tuple[float, float]:
        box = rooms.nth(index).bounding_box()
        assert box is not None
        return box["x"] + box["width"] / 2, box["y"] + (1 - height) * box["height"]

    page.mouse.move(*place(*start))
    page.mouse.down()
    page.mouse.move(*place(*stop), steps=20)
    page.mouse.up()


def values(page: Page) -> list[float]:
    bars = graph(page).locator("[role=slider]")
    return bars.evaluate_all("bars => bars.map(bar => Number(bar.getAttribute('aria-valuenow')))")


def test_merge_two_loras_from_click_to_file(page: Page, site: Site) -> None:
    open_merge(page, site)
    expect(field(page, "plan", MERGE)).to_contain_text("354 layers", timeout=SOON)
    field(page, "loras_add", MERGE).click()
    choose(page, "loras_1_lora", "two.safetensors", MERGE)
    type_into(page, "loras_1_weight", "-0.5", MERGE)
    type_into(page, "loras_1_te_weight", "0", MERGE)
    type_into(page, "loras_1_blocks", "IN=1, default=0", MERGE)
    expect(field(page, "plan", MERGE)).to_contain_text("layers left out", timeout=SOON)
    expect(text_box(page, "out", MERGE)).to_have_value("base-one-two", timeout=SOON)
    field(page, "run", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("base-one-two.safetensors", timeout=SOON)
    expect(result(page, MERGE)).to_contain_text("LoRA two.safetensors")
    expect(page.locator("#hypermerge_merge_load")).to_be_hidden()  # there is no WebUI to load it
    expect(field(page, "try", MERGE)).to_have_count(0)
    expect(text_box(page, "out", MERGE)).to_have_value("base-one-two-2", timeout=SOON)
    with safe_open(site.checkpoints / "base-one-two.safetensors", "pt") as file:
        recipe = json.loads(file.metadata()["hypermerge"])
    assert [lora["weight"] for lora in recipe["parameters"]["loras"]] == [1.0, -0.5]
    assert recipe["parameters"]["loras"][1]["te_weight"] == 0
    assert recipe["parameters"]["loras"][1]["blocks"] == "IN=1, default=0"
    refresh_and_choose(page, "checkpoint", "base-one-two.safetensors", MERGE)


def test_rows_come_and_go(page: Page, site: Site) -> None:
    open_merge(page, site)
    add = field(page, "loras_add", MERGE)
    for row in range(1, ROWS):
        expect(part(page, row, "row")).to_be_hidden()
        add.click()
        for name in ("lora", "weight", "te_weight", "blocks", "clear", "graph"):
            expect(part(page, row, name)).to_be_visible()
    expect(add).to_be_hidden()
    type_into(page, "loras_2_weight", "3", MERGE)
    type_into(page, "loras_2_blocks", "OUT=0", MERGE)
    choose(page, "loras_2_lora", "one.safetensors", MERGE)
    expect(text_box(page, "out", MERGE)).to_have_value("base-one-one", timeout=SOON)
    part(page, 2, "clear").click()
    expect(part(page, 2, "row")).to_be_hidden()
    expect(text_box(page, "out", MERGE)).to_have_value("base-one", timeout=SOON)
    add.click()
    expect(part(page, 2, "row")).to_be_visible()
    expect(text_box(page, "loras_2_weight", MERGE)).to_have_value("1")
    for name in ("lora", "te_weight", "blocks"):
        expect(text_box(page, f"loras_2_{name}", MERGE)).to_have_value("")
    part(page, 0, "clear").click()
    expect(text_box(page, "loras_0_lora", MERGE)).to_have_value("")
    expect(part(page, 0, "row")).to_be_visible()


def test_wrong_weights_are_answered_in_the_page(page: Page, site: Site) -> None:
    open_merge(page, site)
    type_into(page, "loras_0_te_weight", "strong", MERGE)
    expect(field(page, "plan", MERGE)).to_contain_text("is no number", timeout=SOON)
    type_into(page, "loras_0_te_weight", "", MERGE)
    type_into(page, "loras_0_blocks", "1,2,3", MERGE)
    expect(field(page, "plan", MERGE)).to_contain_text("3 block weights were given", timeout=SOON)
    field(page, "run", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("3 block weights were given", timeout=SOON)
    part(page, 0, "clear").click()
    expect(field(page, "plan", MERGE)).to_have_text("", timeout=SOON)
    field(page, "run", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("'loras' is missing", timeout=SOON)


def test_the_graph_writes_what_is_dragged(page: Page, site: Site) -> None:
    open_merge(page, site)
    expect(field(page, "plan", MERGE)).to_contain_text("354 layers", timeout=SOON)
    open_graph(page)
    assert values(page) == [1.0] * 26
    drag(page, (1, 0.5), (1, 0.5))
    expect(text_box(page, "loras_0_blocks", MERGE)).to_have_value(",".join(["1", "0.5", *["1"] * 24]))
    drag(page, (23, 0.02), (25, 0.02))
    expected = ",".join(["1", "0.5", *["1"] * 21, "0", "0", "0"])
    expect(text_box(page, "loras_0_blocks", MERGE)).to_have_value(expected)
    expect(field(page, "plan", MERGE)).to_contain_text("layers left out", timeout=SOON)  # gradio has seen it
    bar = graph(page).locator("[data-block=IN00]")
    bar.focus()
    page.keyboard.press("ArrowUp")
    expect(graph(page).locator("[data-block=IN00]")).to_have_attribute("aria-valuenow", "0.55")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(graph(page).locator("[data-block=IN00]")).to_have_attribute("aria-valuenow", "0.45")
    type_into(page, "out", "dragged", MERGE)
    field(page, "run", MERGE).click()
    expect(result(page, MERGE)).to_contain_text("dragged.safetensors", timeout=SOON)
    with safe_open(site.checkpoints / "dragged.safetensors", "pt") as file:
        blocks = json.loads(file.metadata()["hypermerge"])["parameters"]["loras"][0]["blocks"]
    assert [float(value) for value in blocks.split(",")] == [1, 0.45, *[1] * 21, 0, 0, 0]


def test_the_graph_follows_text_presets_and_formats(page: Page, site: Site) -> None:
    open_merge(page, site)
    open_graph(page)
    text = text_box(page, "loras_0_blocks", MERGE)
    text.fill("IN00-IN02=0.25, MID=0, BASE=0.5, default=0.75")
    assert values(page) == [0.5, *[0.25] * 3, *[0.75] * 9, 0, *[0.75] * 12]
    graph(page).locator(".hypermerge-blocks-preset").select_option("MIDD")
    expect(text).to_have_value("MIDD")
    assert values(page) == python_values("MIDD", 26)
    graph(page).locator(".hypermerge-blocks-format").select_option("SDXL, 20")
    expect(text).to_have_value("MIDD")
    assert values(page) == python_values("MIDD", 20)
    text.fill(",".join(["0.5"] * 17))
    assert values(page) == [0.5] * 17
    graph(page).locator(".hypermerge-blocks-format").select_option("SD1/SD2, 26 values")
    names = block_weights.FORMATS[17][1]
    expected = [0.5 if block in names else 1 for block in block_weights.FORMATS[26][1]]
    assert [float(value) for value in text.input_value().split(",")] == expected == values(page)
    text.fill("nonsense")
    expect(graph(page).locator(".hypermerge-blocks-note")).to_contain_text("no list")
    text.fill("")
    expect(graph(page).locator(".hypermerge-blocks-note")).to_have_text("")
    assert values(page) == [1] * 26


def python_values(text: str, count: int) -> list[float] | None:
    """The format's values as the merge itself reads the text; None if it refuses."""
    architectures, blocks = block_weights.FORMATS[count]
    try:
        weights = block_weights.parse(text, architectures[0])
    except SpecError:
        return None
    return [weights.base if block == block_weights.BASE else weights.of("unet", block) for block in blocks]


TEXTS = [
    "", " ", "all", "NONE", "ALL0.5", "midd", "OUTALL", "INS", "ins ", "IN=0", "OUT=0.5,default=0", "IN04:0.25",
    "M00=0", "MID=0, TE=0.5", "IN00-IN04 = .5 , OUT=1e-1", "OUT02-IN00=1", "IN03-MID=0.5", "IN99=1", "IN=", "=1", "x",
    "1,2,3", "IN=one", "default-IN00=1", "BASE=0,default=0,MID=1", "clip=0", "IN00=1;OUT00=0", "-1", "OUT=0x10",
    "TIME=0", "LABEL=0.5", *(",".join([value] * count) for value, count in (("-0.5", 26), ("0.1", 20), (" 1", 12))),
]  # fmt: skip


def test_page_and_merge_read_block_weights_alike(page: Page, site: Site) -> None:
    open_page(page, site, MERGE)
    for count in (26, 17, 20, 12):
        for text in TEXTS:
            read = page.evaluate("([text, count]) => hypermergeBlocks.read(text, count)", [text, count])
            expected = python_values(text, count)
            if read is not None and len(read["values"]) != count:
                continue  # a list for another model, for which the graph changes its format
            assert (read and read["values"]) == expected, (text, count)
