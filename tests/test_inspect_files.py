"""Inspect of checkpoints, of files that are wrong, hashes, duplicates, and its answer in words and on the page."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from adapter_samples import SAMPLES, Dice
from models import base_weights, cast, extract, is_vae, last_json, run_cli, save_checkpoint
from safetensors.torch import load_file, save_file
from test_inspect import inspect, only

from lib_hypermerge.errors import Cancelled, FormatError, LayoutError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs import inspect_values
from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.runner import execute, forecast
from lib_hypermerge.jobs.verbs import find_verb
from lib_hypermerge.render import as_text
from lib_hypermerge.ui.results import plan_html, report_html

PREFIXES = {
    "sd15": {"unet": "model.diffusion_model.", "te": "cond_stage_model."},
    "sd15_inpainting": {"unet": "model.diffusion_model.", "te": "cond_stage_model."},
    "sd21": {"unet": "model.diffusion_model.", "te": "cond_stage_model."},
    "sdxl": {"unet": "model.diffusion_model.", "te1": "conditioner.embedders.0.", "te2": "conditioner.embedders.1."},
}


@pytest.mark.parametrize("family", PREFIXES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_components_are_counted_with_their_formats_and_bytes(tmp_path, family, suffix):
    weights = cast(base_weights(family), torch.float16)
    unet = [key for key in weights if key.startswith("model.diffusion_model.")]
    weights[unet[0]] = weights[unet[0]].float()
    file = only(save_checkpoint(tmp_path / f"model{suffix}", weights))
    assert file["kind"] == "checkpoint"
    assert file["architecture"] == {"sd15": "sd1", "sd15_inpainting": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[family]
    assert file["variant"] == ("inpainting" if "inpainting" in family else "")
    for component, prefix in PREFIXES[family].items():
        own = [w for key, w in weights.items() if key.startswith(prefix) and w.is_floating_point()]
        part = file["components"][component]
        assert part["present"]
        assert part["tensors"] == len(own)
        assert part["parameters"] == sum(w.numel() for w in own)
        assert part["bytes"] == sum(w.nbytes for w in own)
    assert file["components"]["unet"]["dtypes"] == {"F16": len(unet) - 1, "F32": 1}
    vae = [w for key, w in weights.items() if is_vae(key)]
    assert file["components"]["vae"]["bytes"] == sum(w.nbytes for w in vae)


def test_what_else_lies_in_a_checkpoint_is_named(tmp_path):
    weights = {key: w for key, w in base_weights("sd21").items() if not key.startswith(("cond_stage", "first_stage"))}
    weights |= {f"model_ema.{i}": torch.ones(2) for i in range(3)}
    weights |= {"betas": torch.ones(4), "alphas_cumprod": torch.ones(4), "v_pred": torch.zeros(())}
    weights["odd"] = torch.ones(1)
    file = only(save_checkpoint(tmp_path / "model.safetensors", weights))
    assert not file["components"]["te"]["present"]
    assert not file["components"]["vae"]["present"]
    assert (file["prediction"], file["markers"]) == ("v-prediction", ["v_pred"])
    assert {kind: part["tensors"] for kind, part in file["others"].items()} == {
        "EMA copies": 3, "schedule buffers": 2, "markers": 1, "other tensors": 1,
    }  # fmt: skip
    assert file["others"]["other tensors"]["names"] == ["odd"]


def test_a_checkpoint_s_numbers_are_read_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_values, "_PIECE", 1 << 10)
    weights = base_weights("sd15")
    key = next(key for key in weights if key.endswith("attn1.to_q.weight"))
    weights[key][0, :2] = float("nan")
    path = save_checkpoint(tmp_path / "model.safetensors", weights)
    assert "values" not in only(path)
    values = only(path, "--norms")["values"]
    assert values["nonfinite"] == {"count": 1, "names": [key], "values": 2}
    for component, prefix in {**PREFIXES["sd15"], "vae": "first_stage_model."}.items():
        squares = [w.double().nan_to_num(0).square().sum() for k, w in weights.items()
                   if k.startswith(prefix) and w.is_floating_point()]  # fmt: skip
        assert values["components"][component]["norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)
    words = run_cli(["inspect", path, "--norms", "--quiet"])
    assert f"NaN or Inf: {key}" in words.stdout


@pytest.mark.parametrize(
    ("family", "change", "suffix", "a1111", "forge"),
    [
        ("sd15", {}, ".safetensors", ("loads", ""), ("loads", "")),
        ("sd15", {}, ".pt", ("not listed", ".ckpt"), ("not listed", ".ckpt")),
        ("sdxl", {"v_pred": torch.zeros(()), "ztsnr": torch.zeros(())}, ".safetensors",
         ("loads", "no notice of v_pred and ztsnr"), ("loads", "")),
        ("sd21", {"first_stage_model.encoder.conv_in.weight": None, "first_stage_model.encoder.conv_in.bias": None},
         ".ckpt", ("loads", "choose a file for: VAE"), ("loads", "choose a file for: VAE")),
        ("flux_dev", {}, ".safetensors", ("refused", "does not know Flux"), ("loads", "text encoder")),
        ("sd3_medium", {}, ".safetensors", ("loads", "fetches by itself: text encoder 1"), ("loads", "choose a file")),
        ("sd35_large", {}, ".safetensors", ("refused", "Stable Diffusion 3.5 large"), ("loads", "")),
    ],
)  # fmt: skip
def test_whether_hosts_load_a_checkpoint(tmp_path, family, change, suffix, a1111, forge):
    weights = {key: w for key, w in (base_weights(family) | change).items() if w is not None}
    hosts = only(save_checkpoint(tmp_path / f"model{suffix}", weights))["hosts"]
    for host, (verdict, says) in (("a1111", a1111), ("forge", forge)):
        assert hosts[host]["verdict"] == verdict
        assert says in " ".join([hosts[host]["why"], *hosts[host]["notes"]])


def test_a_network_under_a_bare_name_is_none_for_a1111(tmp_path):
    weights = {key.removeprefix("model."): w for key, w in base_weights("sd15").items()}
    hosts = only(save_checkpoint(tmp_path / "model.safetensors", weights))["hosts"]
    assert "model.diffusion_model." in hosts["a1111"]["why"]
    assert hosts["forge"]["verdict"] == "loads"


# --- files that are wrong -----------------------------------------------------------------------------------


@pytest.fixture
def bad(tmp_path):
    """what -> a file that inspect cannot make sense of"""
    (tmp_path / "text.safetensors").write_text("no model")
    save_file({}, tmp_path / "thing.safetensors")
    save_file({"emb_params": torch.ones(2, 24)}, tmp_path / "embedding.safetensors")
    (tmp_path / "folder").mkdir()
    names = {"text": "text.safetensors", "thing": "thing.safetensors", "embedding": "embedding.safetensors",
             "folder": "folder", "nothing": "nothing.safetensors"}  # fmt: skip
    return {what: tmp_path / name for what, name in names.items()}


@pytest.mark.parametrize(
    ("what", "code", "says"),
    [
        ("text", "bad_file", "header"), ("thing", "wrong_model", "neither a checkpoint nor a LoRA"),
        ("folder", "wrong_model", "folder"), ("nothing", "bad_request", "There is no file"),
    ],
)  # fmt: skip
def test_a_file_that_is_neither_is_a_typed_error_that_names_it(bad, what, code, says):
    result = run_cli(["inspect", bad[what], "--json", "--quiet"])
    assert result.returncode == 2
    error = last_json(result)["error"]
    assert error["code"] == code
    assert bad[what].name in error["what"]
    assert says in " ".join(error.values())


def test_beside_others_it_is_told_in_its_place_and_they_are_answered(bad, tmp_path):
    good = save_checkpoint(tmp_path / "good.safetensors", base_weights("sd15"))
    result = run_cli(["inspect", bad["text"], good, bad["nothing"], "--json", "--quiet"])
    assert result.returncode == 2
    report = last_json(result)
    assert [file["kind"] for file in report["files"]] == ["unreadable", "checkpoint", "unreadable"]
    assert report["files"][0]["error"]["code"] == "bad_file"
    assert report["failed"] == 2
    words = run_cli(["inspect", bad["text"], good, "--quiet"])
    assert words.returncode == 2
    assert "text.safetensors" in words.stdout and "Stable Diffusion 1 checkpoint" in words.stdout


def test_nothing_readable_at_all_is_the_first_error(bad):
    result = run_cli(["inspect", bad["nothing"], bad["text"], "--json", "--quiet"])
    assert (result.returncode, last_json(result)["error"]["code"]) == (2, "bad_request")
    with pytest.raises(FormatError):
        execute_in(None, bad["text"])
    with pytest.raises(LayoutError):
        execute_in(None, bad["thing"])


def test_a_missing_or_wrong_base_is_refused(bad, tmp_path):
    good = save_checkpoint(tmp_path / "good.safetensors", base_weights("sd15"))
    for what in ("nothing", "text", "embedding"):
        result = run_cli(["inspect", good, "--base", bad[what], "--json", "--quiet"])
        assert result.returncode == 2
        assert bad[what].name in last_json(result)["error"]["what"]


# --- hashes and duplicates ----------------------------------------------------------------------------------


def save_lora(path, seed: int = 0, metadata: dict | None = None):
    tensors = {}
    for i, name in enumerate(("lora_unet_conv_in", "lora_unet_time_embedding_linear_1", "lora_unet_conv_out")):
        parts, _ = SAMPLES["lora"]((8, 4), Dice(seed + i))
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path, metadata)
    return path


def data_of(path) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_hashes_are_those_that_sites_know_a_file_by(tmp_path):
    path = save_lora(tmp_path / "a.safetensors")
    stored = hashlib.sha256(data_of(path)).hexdigest()
    right = save_lora(tmp_path / "right.safetensors", metadata={"sshs_model_hash": stored})
    wrong = save_lora(tmp_path / "wrong.safetensors", metadata={"sshs_model_hash": "0" * 64})
    report = inspect(path, right, wrong, "--hashes", "--similarity", "none")
    for file, original in zip(report["files"], (path, right, wrong), strict=True):
        whole = hashlib.sha256(original.read_bytes()).hexdigest()
        assert (file["hashes"]["sha256"], file["hashes"]["autov2"]) == (whole, whole[:10])
        assert (file["hashes"]["data_sha256"], file["hashes"]["autov3"]) == (stored, stored[:12])
    assert [file["hashes"]["stored_is_right"] for file in report["files"]] == [None, True, False]
    assert ["wrong.safetensors" in warning for warning in report["warnings"]] == [True]


def test_the_hash_that_extract_stores_is_right(known_pair, tmp_path):
    extract(*known_pair("sd15"), tmp_path / "style")
    hashes = only(tmp_path / "style.safetensors", "--hashes")["hashes"]
    assert hashes["stored_is_right"]
    assert hashes["legacy"] == only(tmp_path / "style.safetensors")["metadata"]["sshs_legacy_hash"]


def test_a_pickle_has_no_hash_of_its_data(tmp_path):
    hashes = only(save_checkpoint(tmp_path / "a.ckpt", base_weights("sd15")), "--hashes")["hashes"]
    assert hashes["sha256"] == hashlib.sha256((tmp_path / "a.ckpt").read_bytes()).hexdigest()
    assert hashes["data_sha256"] is hashes["autov3"] is None


def execute_in(folder, *files, **more):
    """Run in the standalone page's folders, or by paths."""
    from lib_hypermerge.hosts.standalone import PathHost

    host = FolderHost(folder / "checkpoints", folder / "loras") if folder else PathHost()
    verb = find_verb("inspect")
    spec = verb.spec.from_json({"files": [str(file) for file in files], **more})
    return execute(verb, spec, host, Context())


@pytest.fixture
def library(tmp_path):
    """Folders of checkpoints and LoRAs: two equal LoRAs, one but for its metadata, one as large."""
    (tmp_path / "checkpoints").mkdir()
    loras = tmp_path / "loras"
    loras.mkdir()
    a = save_lora(loras / "a.safetensors")
    shutil.copy(a, loras / "copy.safetensors")
    save_file(load_file(a), loras / "renamed.safetensors", {"ss_output_name": "other"})
    save_lora(loras / "as-large.safetensors", seed=9)
    return tmp_path


def test_duplicates_are_found_in_the_whole_list(library):
    report = execute_in(library, "a.safetensors", duplicates=True)
    found = {pair["equals"]: pair["same"] for pair in report.details["duplicates"]}
    assert found == {"copy.safetensors": "file", "renamed.safetensors": "data"}
    assert report.details["looked_at"] == 4
    nothing = execute_in(library, "as-large.safetensors", duplicates=True)
    assert nothing.details["duplicates"] == []
    assert "no duplicates among 4 files" in as_text(nothing)


def test_only_files_of_one_size_are_read_for_them(library, monkeypatch):
    from lib_hypermerge.jobs import inspect_duplicates

    read = []
    real = inspect_duplicates.hash_file
    monkeypatch.setattr(inspect_duplicates, "hash_file", lambda path, *more: read.append(path) or real(path, *more))
    save_lora(library / "loras" / "larger.safetensors")
    tensors = load_file(library / "loras" / "larger.safetensors") | {"lora_unet_conv_in.diff_b": torch.ones(8)}
    save_file(tensors, library / "loras" / "larger.safetensors")
    execute_in(library, "larger.safetensors", duplicates=True)
    assert read == []
    execute_in(library, "a.safetensors", duplicates=True)
    assert len(read) == len(set(read)) == 4


def test_equal_stored_hashes_and_aliases_are_told_for_free(tmp_path):
    metadata = {"sshs_model_hash": "ab", "ss_output_name": "Style"}
    files = [save_lora(tmp_path / f"{n}.safetensors", n, metadata) for n in (1, 2)]
    report = inspect(*files, "--similarity", "none")
    assert report["told_equal"] == [{"file": str(files[0]), "equals": str(files[1])}]
    assert "both call themselves 'style'" in report["warnings"][0]


def test_a_name_that_is_checkpoint_and_lora_shows_both(library):
    save_checkpoint(library / "checkpoints" / "a.safetensors", base_weights("sd15"))
    report = execute_in(library, "a.safetensors")
    assert [file["kind"] for file in report.details["files"]] == ["checkpoint", "adapter"]
    with pytest.raises(SpecError, match="There is no model 'b'"):
        execute_in(library, "b")


# --- front ends ---------------------------------------------------------------------------------------------


def test_in_words_and_on_the_page(library):
    save_checkpoint(library / "checkpoints" / "model.safetensors", base_weights("sd15"))
    files = ("a.safetensors", "as-large.safetensors", "model.safetensors")
    report = execute_in(library, *files, spectra=True, hashes=True, duplicates=True)
    words, page = as_text(report), report_html(report)
    for text in ("a.safetensors", "LoRA for Stable Diffusion 1", "AUTOMATIC1111", "Forge", "SHA-256",
                 "Stable Diffusion 1 checkpoint", "cosine of the changes"):  # fmt: skip
        assert text in words
        assert text in page
    assert page.count('<img class="hypermerge-picture"') == 3  # two LoRAs, one matrix
    assert "bit for bit" in words and "bit for bit" in page


def test_names_from_files_are_escaped_on_the_page(tmp_path):
    save_lora(tmp_path / "a.safetensors", metadata={"ss_output_name": "<script>", "<b>": "<i>"})
    page = report_html(execute_in(None, tmp_path / "a.safetensors"))
    assert "<script>" not in page and "<i>" not in page and "<b>:" not in page
    assert "&lt;script&gt;" in page


def test_half_a_character_in_a_header_can_be_answered(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", metadata={"ss_output_name": "ABCDEF", "KEY": "GHIJKL"})
    content = path.read_bytes().replace(b"ABCDEF", b"\\ud800").replace(b"GHIJKL", b"\\udfff")
    path.write_bytes(content)
    report = execute_in(None, path)
    for answer in (json.dumps(report.to_json(), ensure_ascii=False), as_text(report), report_html(report)):
        answer.encode("utf-8")
    assert report.details["files"][0]["alias"] == "?"


def test_the_forecast_says_what_will_be_read(tmp_path):
    files = [save_lora(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    from lib_hypermerge.hosts.standalone import PathHost

    verb = find_verb("inspect")

    def plan(**more):
        return forecast(verb, verb.spec.from_json({"files": [str(f) for f in files], **more}), PathHost())

    assert plan(similarity="none")["bytes_to_read"] == 0
    assert plan(similarity="none", hashes=True)["bytes_to_read"] == sum(f.stat().st_size for f in files)
    assert plan_html(plan())


def test_it_can_be_cancelled_while_it_reads(tmp_path):
    from lib_hypermerge.hosts.standalone import PathHost

    path = save_checkpoint(tmp_path / "a.safetensors", base_weights("sd15"))
    verb = find_verb("inspect")
    asked = []

    def interrupted() -> bool:
        asked.append(1)
        return len(asked) > 3

    spec = verb.spec.from_json({"files": [str(path)], "hashes": True})
    with pytest.raises(Cancelled):
        execute(verb, spec, PathHost(), Context(interrupted=interrupted))
