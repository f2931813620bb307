"""How a transfer is shown: the page's view, its pictures, and the words of the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from lib_hypermerge.jobs.report import Output, Report
from lib_hypermerge.render_transfer import describe, honest, text
from lib_hypermerge.ui import transfer_plots, transfer_view
from lib_hypermerge.ui.results import report_html


def shares(**more: Any) -> dict[str, Any]:
    return {"retained": 0.975, "arrived": 0.6, "apart": 0.16, **more}


def report(loras: int = 1, **more: Any) -> Report:
    """Of a transfer to a pruned model; more replaces details."""
    layers = [
        {"layer": f"{component}.{block}.{i}", "component": component, "block": block,
         "source": f"{component}.{block}.{i}", "paired_by": "place", "similarity": value, "equal": False,
         "action": action}
        for component, block in (("unet", "IN01"), ("unet", "MID"), ("te", "L00"))
        for i, (value, action) in enumerate([(0.98, "projected"), (0.4, "below the least similarity"), (None, "mapped"),
                                             (1.0, "copied")])
    ]  # fmt: skip
    blocks = {"unet": ["IN01", "MID"], "te": ["L00"]}
    components = {
        name: {"layers": 4 * len(own), "compared": 3 * len(own), "similarity": 0.79, "least": 0.4,
               "blocks": {block: {"layers": 4, "compared": 3, "similarity": 0.79, "least": 0.4} for block in own}}
        for name, own in blocks.items()
    }  # fmt: skip
    parts = [
        {"name": f"style<{i}>.safetensors", "output": f"new-{i}.safetensors", "modules": 9,
         "actions": {"projected": 6, "copied": 3}, "skipped_because": {"no layer in the target": 7},
         "relative_error": 0.0003, **shares(),
         "components": {name: shares(blocks={block: shares() for block in own}) for name, own in blocks.items()}}
        for i in range(loras)
    ]  # fmt: skip
    details = {
        "architecture": "Stable Diffusion XL", "source": "a & b.safetensors", "target": "c.safetensors",
        "method": "prolora", "basis_energy": 0.9, "threshold": 0.7, "forced": False, "preview": False,
        "similarity": 0.79, "layers_compared": 9, "layers_equal": 1, "actions": {"projected": 6, "copied": 3},
        "skipped_because": {"no layer in the target": 7}, "paired": {"place": 10, "similarity": 2},
        "choices": [{"list": "unet.input.2", "how": "similarity", "source_blocks": 3,
                     "pairs": [{"target": 0, "source": 1, "similarity": 0.9},
                               {"target": 1, "source": None, "similarity": None}]}],
        "components": components, "loras": parts, "failed": [], "layers": layers, "device": "cpu", **more,
    }  # fmt: skip
    outputs = (
        [] if details["preview"] else [Output(f"/loras/new-{i}.safetensors", 2**20, "0" * 64) for i in range(loras)]
    )
    if len(outputs) == 1:
        details["prompt"] = "<lora:new-0:1>"
    return Report("transfer", outputs, 0.0003, 9, 7, 7, ["one note"], 3.0, details)


def test_the_view_shows_files_similarity_actions_and_prompt():
    shown = report_html(report(), "job")
    for part in ("new-0.safetensors</b> (1.0 MiB)", "similarity Φ of 0.79", "&lt;lora:new-0:1&gt;", "one note",
                 "6 projected, 3 copied", "7 no layer in the target", "97.5 %", "60.0 %", "16.0 %", "<td>0.03 %</td>",
                 "0←1, 1←none; of 3",
                 "a &amp; b.safetensors", "style&lt;0&gt;.safetensors", "SHA-256 of new-0.safetensors"):  # fmt: skip
        assert part in shown, part
    assert shown.count('<img class="hypermerge-picture"') == 1
    assert "could not be drawn" not in shown and "style<0>" not in shown


@pytest.mark.parametrize("loras", [2, 9])
def test_several_loras_have_a_row_each_and_no_prompt(loras):
    shown = transfer_view.view(report(loras))
    assert shown.count("6 projected, 3 copied") == loras and "&lt;lora:" not in shown
    assert "could not be drawn" not in shown


def test_a_lora_that_failed_has_a_row_too():
    error = {"code": "numerical", "what": "a<b holds NaN.", "why": "It is damaged.", "hint": "Get a sound copy."}
    mixed = report(2, failed=[{"name": "bad.safetensors", "error": error}])
    assert '<tr class="hypermerge-failed"><td>bad.safetensors</td>' in transfer_view.view(mixed)
    assert "a&lt;b holds NaN. It is damaged. Get a sound copy." in transfer_view.view(mixed)
    assert text(mixed)[-1] == "bad.safetensors: a<b holds NaN. Get a sound copy."


def test_a_preview_says_that_nothing_was_written():
    preview = report(preview=True)
    assert "Preview: nothing was written." in transfer_view.view(preview)
    assert "written in" not in transfer_view.view(preview)
    assert text(preview)[0] == "preview: nothing was written"


def test_the_sentence_on_what_can_be_hoped_for():
    assert "Transfer works between related models" in honest(report())
    assert "copying would do the same" not in honest(report())
    near = report()
    near.details["loras"][0]["apart"] = 0.01
    assert "copying would do the same" in honest(near)
    assert "0.00" in honest(report(similarity=-0.001)) and "-0.00" not in honest(report(similarity=-0.001))
    assert "nothing tells whether these are" in honest(report(similarity=None))


def test_words_of_the_terminal():
    lines = text(report())
    assert any(line.startswith("similarity in unet: 0.79 in 6 of 8 layers, least 0.40") for line in lines)
    assert "blocks of unet.input.2: 0←1, 1←none; of 3, by similarity" in lines
    assert any("energy retained in what was carried over 97.5 %, of all 60.0 %" in line for line in lines)
    assert any(line.endswith("rank and rounding cost 0.03 % of the change that was carried over (norm)")
               for line in lines)  # fmt: skip
    assert "paired by: place (10), similarity (2)" in lines
    unknown = report()
    for part in unknown.details["components"].values():
        part["similarity"] = part["least"] = None
    assert ("similarity in te", "unknown: sizes differ") in describe(unknown)


def test_a_picture_of_layers_of_which_none_can_be_compared():
    nothing = report()
    for layer in nothing.details["layers"]:
        layer["similarity"] = None
    assert transfer_plots.similarity_picture(nothing.details).startswith("<img")
