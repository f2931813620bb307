"""Bad input gets a clear error and loses nothing: exit code, words, and a folder that is as it was."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import (
    ATTENTION,
    NORM,
    ROOT,
    SD1_TEXT,
    UNET,
    base_weights,
    extract_arguments,
    last_json,
    listing,
    lora_ranks,
    rank_change,
    run_cli,
    save_checkpoint,
    tuned_weights,
)

from lib_hypermerge import cli
from lib_hypermerge.errors import SpecError
from lib_hypermerge.hosts.standalone import FolderHost, file_stem
from lib_hypermerge.jobs.extract_spec import ExtractSpec


@pytest.fixture(scope="module")
def weights() -> tuple[dict, dict]:
    base = base_weights("sd15", 64)
    return base, tuned_weights(base, rank_change(2))


@pytest.fixture
def pair(tmp_path, weights) -> tuple[Path, Path]:
    base, tuned = weights
    return (
        save_checkpoint(tmp_path / "base.safetensors", base),
        save_checkpoint(tmp_path / "tuned.safetensors", tuned),
    )


def refused(arguments: list, folder: Path, *words: str, code: int = 2, spawn: bool = False) -> dict:
    """Run and check: exit code, the words in the message, JSON on the last line, nothing changed in the folder."""
    before = listing(folder)
    result = run_cli(arguments, spawn)
    assert result.returncode == code, result.stderr
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr
    answer = last_json(result)
    assert answer["exit_code"] == code
    assert answer["error"]["what"] in result.stderr
    assert listing(folder) == before
    return answer["error"]


# --- what is asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "0"], ["'rank'", "between 1 and 4096"]),
        (["--rank", "-1"], ["'rank'", "-1"]),
        (["--rank", "abc"], ["--rank", "whole number", "abc"]),
        (["--rank", "1.5"], ["--rank", "whole number", "1.5"]),
        (["--rank", "99999"], ["'rank'", "4096"]),
        (["--conv-rank", "-3"], ["'conv_rank'"]),
        (["--rank-rule", "energy"], ["'energy'", "target"]),
        (["--rank-rule", "energy", "--rank-target", "1.5"], ["at most 1"]),
        (["--rank-rule", "size", "--rank-target", "0"], ["above 0"]),
        (["--rank-rule", "size", "--rank-target", "nan"], ["'rank_target'", "number"]),
        (["--rank-rule", "best"], ["rank_rule", "fixed, ratio, energy, cumulative, size"]),
        (["--rank-target", "0.5"], ["'fixed'"]),
        (["--components", "unet,vae"], ["components", "unet, te, te1, te2"]),
        (["--components", ""], ["components"]),
        (["--layers", "attn"], ["layers", "attention"]),
        (["--dtype", "int8"], ["dtype", "fp16, bf16, fp32"]),
        (["--device", "tpu"], ["device"]),
        (["--seed", "-1"], ["'seed'"]),
        (["--rank", "9" * 400], ["'rank'", "must be a number"]),
        (["--rank", "9" * 9000], ["--rank", "whole number"]),
        (["--threads", "9" * 40], ["--threads"]),
        (["--components", "unet, vae"], ["components", "unet, te, te1, te2"]),
        (["--threads", "-1"], ["--threads"]),
        (["--min-rank", "9", "--max-rank", "4"], ["4", "9"]),
        (["--tuned-weight", "0"], ["fine-tune"]),
        (["--frobnicate"], ["frobnicate"]),
        (["--overw"], ["--overw"]),
        (["surplus"], ["surplus"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_a_wrong_request_is_told_from_the_flags_alone(tmp_path, flags, words):
    arguments = extract_arguments(tmp_path / "no base", tmp_path / "no tuned", tmp_path / "o", *flags)
    assert refused(arguments, tmp_path, *words)["code"] == "bad_request"


@pytest.mark.parametrize("flag", ["--base", "--tuned", "--out"])
def test_a_missing_flag_is_named(tmp_path, flag):
    arguments = extract_arguments(tmp_path / "b", tmp_path / "t", tmp_path / "o")
    place = arguments.index(flag)
    refused(arguments[:place] + arguments[place + 2 :], tmp_path, flag)


def test_an_unknown_verb(tmp_path):
    refused(["conjure", "--json"], tmp_path, "conjure", "extract", spawn=True)


def test_no_verb_at_all_is_a_wrong_request():
    result = run_cli([], spawn=True)
    assert result.returncode == 2
    assert "VERB" in result.stderr


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "../up", "..", "a\\b", "c:x", "<lora>", 'quo"te', "a\nb", ".hidden", "x" * 300]
)
def test_an_output_name_with_a_folder_in_it(tmp_path, name):
    with pytest.raises(SpecError, match="cannot be a file name"):
        file_stem(name)
    with pytest.raises(SpecError):
        FolderHost(tmp_path, tmp_path).lora_output(name)


# --- what is named ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_file_that_is_not_there(tmp_path, pair, side):
    files = dict(zip(("base", "tuned"), pair, strict=True)) | {side: tmp_path / "absent.safetensors"}
    refused(extract_arguments(files["base"], files["tuned"], tmp_path / "o"), tmp_path, "absent.safetensors")


@pytest.mark.parametrize("name", ["folder", "x" * 400])
def test_a_path_that_cannot_be_a_file(tmp_path, pair, name):
    (tmp_path / "folder").mkdir()
    refused(extract_arguments(tmp_path / name, pair[1], tmp_path / "o"), tmp_path, name, code=2)


def test_the_same_file_twice(tmp_path, pair):
    (tmp_path / "link.safetensors").symlink_to(pair[0])
    for other in (pair[0], tmp_path / "link.safetensors"):
        error = refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, "same file")
        assert error["code"] == "nothing_changed"


@pytest.mark.parametrize(
    "rule", [[], ["--rank-rule", "size", "--rank-target", "1"], ["--rank-rule", "energy", "--rank-target", "0.9"]]
)
def test_copies_of_the_same_content(tmp_path, pair, weights, rule):
    copy = save_checkpoint(tmp_path / "copy.ckpt", weights[0])
    refused(extract_arguments(pair[0], copy, tmp_path / "o", *rule), tmp_path, "identical")


def test_only_what_no_lora_carries_differs(tmp_path, pair, weights):
    tuned = weights[0] | {NORM + ".weight": weights[0][NORM + ".weight"] + 1}
    path = save_checkpoint(tmp_path / "norm.safetensors", tuned)
    refused(extract_arguments(pair[0], path, tmp_path / "o"), tmp_path, "Only 1 tensors", "differ")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("sdxl", ["Stable Diffusion XL", "Stable Diffusion 1"]),
        ("sd21", ["Stable Diffusion 2"]),
        ("sd15_inpainting", ["inpainting"]),
    ],
)
def test_another_architecture(tmp_path, pair, family, words):
    other = save_checkpoint(tmp_path / "other.safetensors", base_weights(family, 128))
    for files in ((pair[0], other), (other, pair[0])):
        error = refused(extract_arguments(*files, tmp_path / "o"), tmp_path, "different kinds", *words)
        assert error["code"] == "wrong_model"


def test_other_shapes_name_the_first_few(tmp_path, pair):
    other = save_checkpoint(tmp_path / "other.safetensors", base_weights("sd15", 32))
    error = refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, "different shapes")
    assert error["why"].count(" in the base and ") == 3
    assert " more." in error["why"]


def test_a_single_other_shape_is_named_with_both(tmp_path, pair, weights):
    rows, columns = weights[0][ATTENTION].shape
    odd = weights[1] | {ATTENTION: torch.randn(rows, columns + 1)}
    other = save_checkpoint(tmp_path / "other.safetensors", odd)
    path = ATTENTION.removeprefix(UNET).removesuffix(".weight")
    words = (f"unet.{path} is [{rows}, {columns}] in the base and [{rows}, {columns + 1}] in the fine-tune",)
    refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, *words)


def test_a_lora_given_as_a_checkpoint(tmp_path, pair):
    assert run_cli(extract_arguments(*pair, tmp_path / "lora", "--rank", 1)).returncode == 0
    lora = tmp_path / "lora.safetensors"
    for files in ((pair[0], lora), (lora, pair[1])):
        refused(extract_arguments(*files, tmp_path / "o"), tmp_path, "lora.safetensors is a LoRA, not a checkpoint")


@pytest.mark.parametrize(
    ("key", "kind"),
    [("double_blocks.0.img_attn.qkv.weight", "Flux"), ("joint_blocks.0.x.weight", "Stable Diffusion 3"),
     ("decoder.up.0.block.0.conv1.weight", "VAE"), ("down_blocks.0.resnets.0.conv1.weight", "diffusers"),
     ("some.weight", "None of its tensors")],
)  # fmt: skip
def test_a_model_of_another_kind_is_recognised(tmp_path, pair, key, kind):
    other = save_checkpoint(tmp_path / "other.safetensors", {key: torch.randn(4, 4)})
    refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, "other.safetensors", kind)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
@pytest.mark.parametrize("content", [b"", b"abc", b"garbage " * 100, b"\xff" * 100, b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_model(tmp_path, pair, suffix, content):
    other = tmp_path / f"other{suffix}"
    other.write_bytes(content)
    assert refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, other.name)["code"] == "bad_file"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("keep", [0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(tmp_path, pair, weights, suffix, keep):
    other = save_checkpoint(tmp_path / f"cut{suffix}", weights[1])
    os.truncate(other, int(other.stat().st_size * keep))
    refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, other.name, "truncated")


def test_a_pickle_that_imports_something(tmp_path, pair, weights):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/marker",)

    torch.save({"state_dict": weights[1], "x": Evil()}, tmp_path / "evil.ckpt")
    arguments = extract_arguments(pair[0], tmp_path / "evil.ckpt", tmp_path / "o")
    refused(
        arguments, tmp_path, "evil.ckpt was refused", "posix.system" if os.name == "posix" else "nt.system", spawn=True
    )


# --- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", [[], ["--rank-rule", "size", "--rank-target", "1"]], ids=["fixed", "size"])
def test_nan_and_inf_are_refused_by_name_or_skipped_and_counted(tmp_path, pair, weights, value, rule):
    bad = {key: weights[1][key].clone() for key in (ATTENTION, SD1_TEXT)}
    for tensor in bad.values():
        tensor[0, 0] = value
    other = save_checkpoint(tmp_path / "bad.safetensors", weights[1] | bad)
    arguments = extract_arguments(pair[0], other, tmp_path / "o", *rule)
    names = (
        "unet." + ATTENTION.removeprefix(UNET).removesuffix(".weight"),
        "te.encoder.layers.0.mlp.fc1",
    )
    assert refused(arguments, tmp_path, "2 tensors hold NaN or Inf", *names, code=1)["code"] == "numerical"

    result = run_cli([*arguments, "--skip-nonfinite"])
    assert result.returncode == 0, result.stderr
    answer = last_json(result)
    assert answer["skipped_because"]["nonfinite"] == 2
    assert any("2 tensors with NaN or Inf were skipped" in warning for warning in answer["warnings"])
    written = lora_ranks(tmp_path / "o.safetensors")
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1" not in written
    assert len(written) == answer["modules"]


def test_nan_in_a_norm_is_named(tmp_path, pair, weights):
    other = save_checkpoint(
        tmp_path / "bad.safetensors", weights[1] | {NORM + ".weight": weights[1][NORM + ".weight"] * float("nan")}
    )
    refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, "input_blocks.4.0.in_layers.0", code=1)


def test_a_change_too_large_for_the_output_format(tmp_path, pair, weights):
    other = save_checkpoint(tmp_path / "huge.safetensors", weights[1] | {ATTENTION: weights[1][ATTENTION] * 1e12})
    refused(extract_arguments(pair[0], other, tmp_path / "o"), tmp_path, "too large for float16", code=1)
    assert run_cli(extract_arguments(pair[0], other, tmp_path / "o", "--dtype", "bf16")).returncode == 0


def test_a_size_target_that_is_too_small(tmp_path, pair):
    arguments = extract_arguments(*pair, tmp_path / "o", "--rank-rule", "size", "--rank-target", "0.05")
    refused(arguments, tmp_path, "0.05 MiB", "too small")


# --- where it goes ----------------------------------------------------------------------------------------


def test_an_output_that_exists_is_kept_unless_overwriting_is_asked(tmp_path, pair):
    (tmp_path / "o.safetensors").write_bytes(b"precious")
    arguments = extract_arguments(*pair, tmp_path / "o", "--rank", 1)
    refused(arguments, tmp_path, "o.safetensors exists already")
    assert run_cli([*arguments, "--overwrite"]).returncode == 0
    assert lora_ranks(tmp_path / "o.safetensors")


def test_an_output_that_is_an_input(tmp_path, pair):
    (tmp_path / "link.safetensors").symlink_to(pair[1])
    for target in (*pair, tmp_path / "link.safetensors"):
        refused(extract_arguments(*pair, target), tmp_path, "exists already")
        refused(extract_arguments(*pair, target, "--overwrite"), tmp_path, "one of the inputs")


def test_an_output_folder_that_is_not_there(tmp_path, pair):
    refused(extract_arguments(*pair, tmp_path / "absent" / "o"), tmp_path, "There is no folder", "absent")


def test_a_component_the_model_lacks(tmp_path, pair):
    refused(extract_arguments(*pair, tmp_path / "o", "--components", "te2"), tmp_path, "has no component te2")


def test_a_full_disk_while_writing(tmp_path, pair):
    """A limit on the size of files, as a quota; the kernel stops the write."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    limited += "from lib_hypermerge.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [str(a) for a in extract_arguments(*pair, tmp_path / "o")]
    before = listing(tmp_path)
    result = subprocess.run([sys.executable, "-c", limited, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["error"]["code"] == "output"
    assert "o.safetensors could not be written" in result.stderr
    assert listing(tmp_path) == before


# --- numbers and texts beyond what was thought of -----------------------------------------------------------


@pytest.mark.parametrize("name", ["rank", "seed", "rank_target", "tuned_weight"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 10**9000], ids=["large", "small", "unprintable"])
def test_a_whole_number_beyond_every_float(name, value):
    values = {"base": "b", "tuned": "t", "out": "o", name: value}
    with pytest.raises(SpecError, match=f"'{name}'") as caught:
        ExtractSpec.from_json(values)
    assert len(str(caught.value)) < 1000


def test_spaces_in_a_list_are_no_mistake(tmp_path, pair):
    arguments = extract_arguments(*pair, tmp_path / "o", "--components", " unet , te", "--rank", 1)
    assert run_cli(arguments).returncode == 0


def test_names_from_files_cannot_command_a_terminal(tmp_path, pair):
    nasty = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    other = save_checkpoint(tmp_path / f"{nasty}.safetensors", {f"some{nasty}.weight": torch.ones(2, 2)})
    result = run_cli(extract_arguments(other, pair[1], tmp_path / "o"))
    assert result.returncode == 2
    assert "?]0;owned??[2J?31m?" in result.stderr
    assert not any(sign in result.stderr + result.stdout for sign in "\x1b\x07\x9b\u202e")
    assert "\x1b" in last_json(result)["error"]["what"]  # JSON spells them out, and keeps the name


def test_a_report_and_a_forecast_cannot_either(tmp_path, pair):
    out = tmp_path / "out\x9b31m"
    for more in (["--dry-run"], []):
        arguments = [a for a in extract_arguments(*pair, out, "--rank", 1, *more) if a != "--json"]
        result = run_cli(arguments)
        if result.returncode == 0:
            assert "out?31m" in result.stdout
        assert "\x9b" not in result.stdout + result.stderr


def test_a_defect_cannot_either(monkeypatch):
    def failing():
        raise ZeroDivisionError("\x1b[2J")

    monkeypatch.setattr(cli, "build_parser", failing)
    result = run_cli(["extract", "--json"])
    assert result.returncode == 1
    assert "ZeroDivisionError: ?[2J" in result.stderr and "\x1b" not in result.stderr


# --- interrupted before anything began ----------------------------------------------------------------------


def test_ctrl_c_before_the_handlers_are_set(monkeypatch):
    def interrupted(_stop):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_stop_on_signals", interrupted)
    result = run_cli(["extract", "--json"])
    assert result.returncode == 130
    assert last_json(result)["error"]["code"] == "cancelled" and "Traceback" not in result.stderr


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_while_the_command_is_still_being_read(tmp_path, pair, monkeypatch, more, sent):
    real = cli.build_parser

    def slow():
        os.kill(os.getpid(), sent)
        return real()

    monkeypatch.setattr(cli, "build_parser", slow)
    before = listing(tmp_path)
    result = run_cli(extract_arguments(*pair, tmp_path / "o", *more))
    assert result.returncode == 130, result.stderr
    assert last_json(result)["error"]["code"] == "cancelled" and "Traceback" not in result.stderr
    assert listing(tmp_path) == before
