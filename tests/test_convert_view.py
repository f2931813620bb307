"""The result of a conversion in words and on the page."""

import pytest
import torch
from convert_files import lora, save, some
from models import base_weights, last_json, run_cli, save_checkpoint

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import execute, forecast
from lib_hypermerge.jobs.verbs import find_verb
from lib_hypermerge.render import as_text
from lib_hypermerge.ui.results import plan_html, report_html


def finished(**values):
    verb = find_verb("convert")
    spec = verb.spec.from_json(
        {name: str(v) if name in ("lora", "checkpoint", "out") else v for name, v in values.items()}
    )
    told = plan_html(forecast(verb, spec, PathHost()))
    return execute(verb, spec, PathHost(), Context()), told


@pytest.fixture
def source(tmp_path):
    norm = {"lora_unet_mid_block_resnets_0_norm1.w_norm": torch.ones(40)}
    norm["lora_unet_mid_block_resnets_0_norm1.b_norm"] = torch.ones(40)
    return save(tmp_path / "a<b>.safetensors", lora("sd15", only=some, rank=lambda i: 3, alpha=lambda i: 2.0) | norm)


def test_a_file_of_kohyas(tmp_path, source):
    report, told = finished(lora=source, out=tmp_path / "o", family="lora", rank=2)
    text, page = as_text(report), report_html(report)
    assert "Stable Diffusion 1" in told
    for shown in (text, page):
        assert "<lora:o:1>" in shown.replace("&lt;", "<").replace("&gt;", ">")
        assert "from its factors" in shown and "kohya → kohya" in shown
    assert f"{100 * report.relative_error:.1f} %" in text and "It misses" in page


@pytest.mark.parametrize(("to", "name"), [("diffusers", "o.safetensors"), ("peft", "o")])
def test_other_dialects(tmp_path, source, to, name):
    report, _ = finished(lora=source, out=tmp_path / "o", to=to)
    text, page = as_text(report), report_html(report)
    assert name in page and "1 norms" in text and "1 norms" in page
    assert "&lt;lora" not in page  # no prompt reads it
    assert ("Folder" in page) == (to == "peft")
    assert ("float32" in text) == (to == "diffusers")


def test_a_checkpoint(tmp_path):
    base = save_checkpoint(tmp_path / "base.safetensors", base_weights("sd15") | {"model_ema.decay": torch.ones(1)})
    report, told = finished(checkpoint=base, out=tmp_path / "o", dtype="fp16", prune=True)
    text, page = as_text(report), report_html(report)
    for shown in (text, page):
        assert "1 EMA copies" in shown and "MiB before" in shown
    assert "about" in told


def test_a_forecast_in_words(tmp_path, source):
    result = run_cli(["convert", "--lora", source, "--out", tmp_path / "o", "--dry-run"])
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    table = last_json(run_cli(["convert", "--lora", source, "--out", tmp_path / "o", "--dry-run", "--json"]))
    for name in ("expected bytes", "most bytes", "expected memory"):
        assert lines[name] == f"{table[name.replace(' ', '_')] / 2**20:,.1f} MiB"
    assert lines["families"] == f"{table['families']['lora']} lora, 1 norm"
    assert lines["modules"] == str(table["modules"]) and lines["warnings"] == "none"
    result = run_cli(
        ["convert", "--lora", source, "--out", tmp_path / "o", "--dry-run", "--family", "lora", "--energy", 0.9]
    )
    assert "expected bytes: not known before\n" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_names_from_files_cannot_write_html(tmp_path):
    odd = {"<img src=x>.lora_up.weight": torch.ones(2, 2), "<img src=x>.lora_down.weight": torch.ones(2, 2)}
    source = save(tmp_path / "a.safetensors", lora("sd15", only=some) | odd)
    report, told = finished(lora=source, out=tmp_path / "o", to="diffusers")
    assert any("<img" in warning for warning in report.warnings)
    assert "<img src=x>" not in report_html(report) + told
