"""A model's folder with parts that are broken, missing or unusual: refused by name, or read as what it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from models import extract_arguments, last_json, listing, run_cli
from pipelines import single_view
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import FormatError, HypermergeError, InputChangedError, LayoutError, SpecError
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.opening import open_checkpoint


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """An SDXL pipeline in shards."""
    return pipelines.save(tmp_path_factory.mktemp("sharded") / "xl", pipelines.parts("sdxl"), max_shard_size="60KB")


@pytest.fixture
def copy(sharded, tmp_path):
    shutil.copytree(sharded, tmp_path / "xl")
    return tmp_path / "xl"


UNET_INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reason(path: Path, kind: type[HypermergeError]) -> str:
    with pytest.raises(kind) as caught:
        open_checkpoint(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_components_that_are_null_or_not_there_are_absent(copy):
    shutil.rmtree(copy / "vae")
    edit(copy / "model_index.json", lambda index: index.update(text_encoder=[None, None]))
    model = open_checkpoint(copy)
    with model.file:
        assert set(model.components) == {"unet", "te2"} and not model.vae


@pytest.mark.parametrize(
    ("scheduler", "markers"),
    [({"prediction_type": "v_prediction"}, {"v_pred"}), ({"prediction_type": "epsilon"}, set()), ({}, set()),
     ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"})],
)  # fmt: skip
def test_the_scheduler_s_kind_of_prediction_is_marked_as_in_a_single_file(copy, scheduler, markers):
    (copy / "scheduler").mkdir()
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    state = single_view(copy)
    assert {"v_pred", "ztsnr"} & state.keys() == markers and all(state[name].numel() == 0 for name in markers)


def test_what_has_no_place_in_a_single_file_is_counted(copy):
    text = copy / "text_encoder" / "model.safetensors"
    for old in (copy / "text_encoder").glob("model*"):
        old.unlink()
    save_file({"text_model.final_layer_norm.weight": torch.ones(4), "other.weight": torch.ones(2)}, text)
    model = open_checkpoint(copy)
    with model.file:
        assert model.ignored == {"other tensors": 2}  # one CLIP tensor makes no text encoder


def test_a_missing_shard(copy):
    shard = sorted((copy / "unet").glob("*-of-*"))[1]
    shard.unlink()
    assert f"{shard.name} is missing" in reason(copy, FormatError)


def test_a_truncated_shard(copy):
    shard = sorted((copy / "unet").glob("*-of-*"))[2]
    os.truncate(shard, shard.stat().st_size - 10)
    said = reason(copy, FormatError)
    assert shard.name in said and "truncated" in said


def test_an_index_that_names_what_is_not_there(copy):
    shard = sorted((copy / "unet").glob("*-of-*"))[0].name
    edit(copy / UNET_INDEX, lambda index: index["weight_map"].update({"ghost.weight": shard}))
    assert f"{shard} does not hold ghost.weight" in reason(copy, FormatError)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b", "", 7, None])
def test_an_index_that_leads_elsewhere(copy, name):
    edit(copy / UNET_INDEX, lambda index: index["weight_map"].update({"ghost.weight": name}))
    assert "is no file name" in reason(copy, FormatError)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100000, "\xff"])
def test_a_broken_index(copy, content):
    (copy / UNET_INDEX).write_bytes(content.encode("latin-1"))
    assert "is no sound index" in reason(copy, FormatError)


def test_a_component_without_weights(copy):
    for file in (copy / "text_encoder_2").glob("model*"):
        file.unlink()
    assert "xl/text_encoder_2 holds no weights" in reason(copy, FormatError)


def test_a_pipeline_without_a_denoiser(copy):
    shutil.rmtree(copy / "unet")
    assert "neither a unet nor a transformer" in reason(copy, FormatError)


def test_an_index_without_any_component(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "neither a unet nor a transformer" in reason(tmp_path, FormatError)


def rewrite(folder: Path, change) -> None:
    """All weights of a component in one file, after a change."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    change(state)
    save_file(state, folder / "model.safetensors")


def test_text_encoders_whose_names_begin_one_level_down(sharded, copy):
    """CLIP without the `text_model.` before every name."""

    def shorten(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.startswith("text_model.")]:
            state[key.removeprefix("text_model.")] = state.pop(key)

    for name in ("text_encoder", "text_encoder_2"):
        rewrite(copy / name, shorten)
    found, expected = single_view(copy), single_view(sharded)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


QUERY = "text_model.encoder.layers.1.self_attn.q_proj.weight"


def test_parts_of_a_layer_in_different_formats(copy):
    rewrite(copy / "text_encoder_2", lambda state: state.update({QUERY: state[QUERY].half()}))
    said = reason(copy, FormatError)
    assert "do not fit together" in said and "F16" in said and "F32" in said and "layers.1.self_attn" in said


def test_parts_of_a_layer_in_different_widths(copy):
    rewrite(copy / "text_encoder_2", lambda state: state.update({QUERY: state[QUERY][:, :-1].contiguous()}))
    assert "do not fit together" in reason(copy, FormatError)


def test_a_layer_that_lacks_a_part(copy):
    rewrite(copy / "text_encoder_2", lambda state: state.pop(QUERY))
    said = reason(copy, FormatError)
    assert "incomplete" in said and "3 parts belong together, 2 are there" in said


def test_a_denoiser_of_another_kind(tmp_path):
    (tmp_path / "m" / "transformer").mkdir(parents=True)
    (tmp_path / "m" / "model_index.json").write_text('{"transformer": ["diffusers", "Other"]}')
    save_file({"blocks.0.attn.weight": torch.ones(2, 2)}, tmp_path / "m" / "transformer" / "model.safetensors")
    assert "transformer is of another kind" in reason(tmp_path / "m", LayoutError)


def test_a_controlnet_is_no_unet(tmp_path):
    names = ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight", "controlnet_mid_block.weight")
    save_file({name: torch.ones(2, 2, 1, 1) for name in names}, tmp_path / "control.safetensors")
    assert "control.safetensors is no Stable Diffusion" in reason(tmp_path / "control.safetensors", LayoutError)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: (p / "notes.txt").write_text("x")], ids=["empty", "notes"])
def test_a_folder_that_is_no_model(tmp_path, make):
    make(tmp_path)
    assert "is a folder" in reason(tmp_path, SpecError)


def test_quantised_weights_in_a_folder(copy):
    rewrite(copy / "unet", lambda state: state.update({"conv_in.SCB": torch.ones(3)}))
    assert "is quantised" in reason(copy, LayoutError)


def test_a_shard_replaced_while_the_model_is_open(copy):
    model = open_checkpoint(copy)
    with model.file as file:
        file.check_unchanged()
        shard = sorted((copy / "unet").glob("*-of-*"))[0]
        shard.write_bytes(shard.read_bytes())
        with pytest.raises(InputChangedError, match=shard.name):
            file.check_unchanged()


def test_a_folder_is_itself_and_no_other(sharded, copy):
    with (
        open_checkpoint(sharded).file as one,
        open_checkpoint(sharded).file as same,
        open_checkpoint(copy).file as other,
    ):
        assert one.is_same(same) and not one.is_same(other) and not one.is_same(one.parts[0])
        assert not one.parts[0].is_same(one) and one.parts[0].is_same(same.parts[0])


def test_the_same_folder_twice_is_refused(sharded, tmp_path):
    before = listing(sharded)
    result = run_cli(extract_arguments(sharded, sharded, tmp_path / "o"))
    assert result.returncode == 2 and last_json(result)["error"]["code"] == "nothing_changed"
    assert listing(sharded) == before


def test_a_single_file_layout_in_shards(sharded, tmp_path):
    state = {key: value.contiguous() for key, value in single_view(sharded).items()}
    halves = sorted(state)[::2], sorted(state)[1::2]
    weight_map = {}
    for number, names in enumerate(halves):
        save_file({name: state[name] for name in names}, tmp_path / f"m-{number}.safetensors", {"format": "pt"})
        weight_map |= {name: f"m-{number}.safetensors" for name in names}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, tmp_path / "m.safetensors.index.json"):
        found = single_view(path)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    with open_tensors(tmp_path) as file:
        assert file.metadata == {"format": "pt"} and len(file.parts) == 2
