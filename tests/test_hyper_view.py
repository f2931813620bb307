"""What is shown of a hyper-merge and of a fit: complete, escaped, and honest about a preview."""

from __future__ import annotations

import re

import pytest
from hyper_reports import BLOCKS, hyper_report

from lib_hypermerge.errors import SpecError
from lib_hypermerge.jobs.report import Report
from lib_hypermerge.jobs.runner import DONE, Job
from lib_hypermerge.jobs.verbs import VERBS
from lib_hypermerge.render import as_text
from lib_hypermerge.ui.results import job_html, plan_html, report_html
from lib_hypermerge.ui.styles import styles_of

EVIL = "<script>alert('$x$ & \"y\"')</script>"


def evil_report(**more) -> Report:
    """Every name in it is code and mathematics."""
    report = hyper_report(name=EVIL)
    d, models = report.details, list(report.details["models"])
    for table in ("models", "multipliers", "prompts", "by_model"):
        d[table] = {EVIL + model: value for model, value in d[table].items()}
    d["similarity"]["labels"] = [EVIL + label for label in models]
    d |= {"architecture": EVIL, "better": EVIL, "solver": EVIL, **more}
    report.warnings = [EVIL]
    return report


def fit_report() -> Report:
    names = ["family-1", "family-2"]
    details = {
        "architecture": "SD1.5", "hyper": EVIL, "model": EVIL, "multipliers": {name: 0.5 for name in names},
        "te_multipliers": {name: 0.25 for name in names}, "rank": 2, "rest_share": 0.1, "residual_share": 0.04,
        "loras": [{"name": name, "modules": 354, "families": {"LoRA": 354}, "unmatched": 0} for name in names],
        "components": {part: {"relative_error": 0.2, "share_of_change": 0.5, "blocks": dict.fromkeys(blocks, 0.2)}
                       for part, blocks in BLOCKS.items()},
        "as_in_recipe": False, "prompt": "<lora:family-1:0.25:0.5><lora:family-2:0.25:0.5>", "device": "cpu",
        "threads": 1,
    }  # fmt: skip
    return Report("fit", [], 0.2, 354, warnings=[EVIL], details=details)


@pytest.mark.parametrize(
    "report", [evil_report(), evil_report(preview=True), fit_report()], ids=["run", "preview", "fit"]
)
def test_names_are_escaped_and_every_picture_is_drawn(report: Report) -> None:
    shown = report_html(report)
    assert "<script" not in shown
    assert "could not be drawn" not in shown
    assert shown.count("<img") == (4 if report.verb == "hyper" else 1)
    onclick = re.findall(r'onclick="([^"]*)"', shown)
    assert all("<" not in call for call in onclick)
    ids = re.findall(r' id="([^"]*)"', shown)
    assert len(ids) == len(set(ids))


def test_each_model_has_its_error_prompt_and_buttons() -> None:
    report = hyper_report()
    shown, told = report_html(report), as_text(report)
    for number, (model, prompt) in enumerate(report.details["prompts"].items()):
        assert model in shown
        assert model in told
        assert prompt in told
        assert f'id="hypermerge_hyper_copy_{number}"' in shown
        assert f'id="hypermerge_hyper_send_{number}"' in shown
    for text in ("20.0 %", "35.0 %", "11.5 %"):
        assert text in shown
        assert text in told
    assert "40.0 % … 11.5 % missed after 20 iterations" in told
    assert "a container 12.0 %, shared LoRAs (joint) 17.0 %" in told


@pytest.mark.parametrize("more", [{"from_base": True}, {"alternatives": []}])
def test_where_loras_of_their_own_are_counted_from_is_said(more: dict) -> None:
    assert "choose it as the base to compare" in as_text(hyper_report())
    assert "choose it as the base to compare" in report_html(hyper_report())
    assert "choose it as the base to compare" not in as_text(hyper_report(**more))


def test_a_preview_says_that_nothing_was_written_and_what_would_be() -> None:
    container = {"name": "family.hypermerge", "bytes": 5 * 2**20, "residual_share": 0.05, "models": {"model-a": 0.2}}
    rests = {"model-a": {"name": "family-model-a-rest", "bytes": 2**20, "restores": 0.9}}
    report = hyper_report(preview=True, recipe=None, container=container, remainders=rests)
    shown = report_html(report)
    assert "nothing was written" in shown
    assert "nothing was written" in as_text(report)
    for text in ("family-3.safetensors</b> (16.0 MiB)", "family.hypermerge</b> (5.0 MiB)", "family-model-a-rest"):
        assert text in shown
    assert "hypermerge.copy" not in shown  # there is no such LoRA to use
    assert "hypermerge.styles" not in shown
    with pytest.raises(SpecError, match="no prompts"):
        styles_of(report)


def test_a_container_alone_has_no_prompts() -> None:
    errors = {"model-a": 0.777, "model-b": 0.1}
    container = {"name": "family.hypermerge", "bytes": 5 * 2**20, "residual_share": 0.054, "models": errors}
    report = hyper_report(2, loras=[], prompts={}, multipliers={}, curve=[], container=container)
    assert "Restore makes its LoRA from the container" in report_html(report)
    assert "a container (5.0 MiB); 5.4 % of" in as_text(report)
    assert "77.7 %" in report_html(report)
    with pytest.raises(SpecError, match="no prompts"):
        styles_of(report)


@pytest.mark.parametrize(
    ("hyper", "words"), [("family.safetensors", "the hyper-model alone"), (None, "the base alone")]
)
def test_a_model_without_a_prompt_is_what_the_loras_are_for(hyper, words) -> None:
    report = hyper_report(2)
    report.details["prompts"]["model-b"], report.details["hyper"] = "", hyper
    (line,) = (line for line in as_text(report).splitlines() if line.strip().startswith("model-b"))
    assert line.endswith(words)
    assert f"<td>{words}</td>" in report_html(report)


def test_multipliers_of_text_encoders_are_drawn_too() -> None:
    report = hyper_report(models=12)
    plain = report_html(report)
    report.details["te_multipliers"] = report.details["multipliers"]
    assert report_html(report) != plain
    assert "text encoders have their own" in as_text(report)


def test_styles_are_named_after_family_and_model() -> None:
    report = hyper_report(2)
    prompts = report.details["prompts"]
    assert styles_of(report) == {f"family: {model}": f"{{prompt}} {prompt}" for model, prompt in prompts.items()}
    report.details["hyper"] = None
    assert list(styles_of(report)) == ["family: model-a", "family: model-b"]
    with pytest.raises(SpecError):
        styles_of(None)


def test_the_result_knows_its_job() -> None:
    verb = VERBS["hyper"]
    job = Job('task("1")', verb, verb.spec.from_json({"models": ["a", "b"], "name": "c"}), DONE, report=hyper_report())
    assert 'data-job="task(&quot;1&quot;)"' in job_html(job)


def test_the_forecast_tells_each_size() -> None:
    plan = {
        "architecture": "SD1.5", "modules": 354, "hyper_bytes": 2**31, "expected_bytes": 2**31 + 3 * 2**20,
        "loras": [{"name": "f-1", "rank": 8, "bytes": 2**21}, {"name": "f-2", "rank": 4, "bytes": 2**20}],
        "expected_memory": 2**29, "bytes_to_read": 2**33, "expected_seconds": 60, "warnings": ["<odd>"],
    }  # fmt: skip
    shown = plan_html(plan)
    assert "hyper-model 2,048.0 MiB + LoRAs <b>3.0 MiB</b> (rank 8: 2.0 MiB, rank 4: 1.0 MiB)" in shown
    assert "needs 512.0 MiB of memory, reads 8,192.0 MiB" in shown
    assert "&lt;odd&gt;" in shown
    assert "LoRAs" not in plan_html({"architecture": "SD1.5", "loras": ["f-1"], "warnings": []})  # of a fit


def test_a_picture_of_many_models_is_drawn_as_well() -> None:
    assert "could not be drawn" not in report_html(hyper_report(16, (64,) * 9))
