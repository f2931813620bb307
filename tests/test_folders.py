"""Models as diffusers saves them, seen as single files: diffusers' own conversion must turn them back exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from models import extract, extract_arguments, last_json, listing, run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import FormatError, HypermergeError, InputChangedError, LayoutError, SpecError
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.module import LORA_KINDS
from lib_hypermerge.layouts.opening import open_checkpoint
from lib_hypermerge.layouts.tables import shapes

KINDS = ("sd1", "sd2", "sdxl", "sd3", "flux")


def single_view(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint under its single-file name, as a job reads it."""
    model = open_checkpoint(path)
    with model.file as file:
        return {name: file.read(info) for name, info in file.tensors.items()}


def below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def turned_back(
    kind: str, name: str, model: torch.nn.Module, state: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What diffusers' converters from single files make of ours, for one component."""
    if name == "unet":
        return single_file.convert_ldm_unet_checkpoint(state, dict(model.config))
    if name == "vae":
        return single_file.convert_ldm_vae_checkpoint(state, dict(model.config))
    if name == "transformer":
        own = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
        if kind == "flux":
            return flux_turned_back(own)
        return single_file.convert_sd3_transformer_checkpoint_to_diffusers(own)
    prefix = {
        ("sd1", "text_encoder"): "cond_stage_model.transformer.",
        ("sd2", "text_encoder"): "cond_stage_model.model.",
        ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.",
        ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.",
        ("flux", "text_encoder"): "text_encoders.clip_l.transformer.",
        ("flux", "text_encoder_2"): "text_encoders.t5xxl.transformer.",
        ("sd3", "text_encoder"): "text_encoders.clip_l.transformer.",
        ("sd3", "text_encoder_2"): "text_encoders.clip_g.transformer.",
        ("sd3", "text_encoder_3"): "text_encoders.t5xxl.transformer.",
    }[kind, name]
    if prefix.endswith(".model."):
        width = model.config.hidden_size
        if prefix + "text_projection" not in state:  # without it diffusers takes the width for 1024
            assert not hasattr(model, "text_projection")
            return single_file.convert_open_clip_checkpoint(_Sized(width), state, prefix)
        return single_file.convert_open_clip_checkpoint(model, state, prefix)
    return below(state, prefix)


class _Sized:
    def __init__(self, width: int):
        self.config = type("Config", (), {"projection_dim": width})


def flux_turned_back(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """diffusers' converter splits single blocks for a width of 3072 alone; pad ours to that width and cut it off."""
    out = {}
    mine = below(state, "model.diffusion_model.")
    width = mine["img_in.weight"].shape[0]
    fused = {key: value for key, value in mine.items() if ".linear1." in key}
    placed = dict(mine)
    for key, value in fused.items():
        parts = value.split((width, width, width, len(value) - 3 * width))
        wide = [torch.zeros((size, *value.shape[1:])) for size in (3072, 3072, 3072, 12288)]
        for part, room in zip(parts, wide, strict=True):
            room[: len(part)] = part
        placed[key] = torch.cat(wide)
    for key, value in single_file.convert_flux_transformer_checkpoint_to_diffusers(placed).items():
        if "single_transformer_blocks" in key and (".attn.to_" in key or ".proj_mlp." in key):
            rows = width if ".attn.to_" in key else len(fused["single_blocks.0.linear1.weight"]) - 3 * width
            value = value[:rows]
        out[key] = value
    return out


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def models(kind):
    return pipelines.parts(kind)


@pytest.fixture(scope="module")
def folder(kind, models, tmp_path_factory):
    return pipelines.save(tmp_path_factory.mktemp(kind) / "my-model", models)


def test_diffusers_turns_our_view_back_into_the_pipeline(kind, models, folder):
    state = single_view(folder)
    for name, model in models.items():
        # T5's embedding has two names, of which safetensors files hold one
        expected = {key: value for key, value in model.state_dict().items() if "embed_tokens" not in key}
        found = turned_back(kind, name, model, dict(state))
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert found[key].shape == value.shape and torch.equal(found[key], value), (name, key)


def test_it_is_recognised_whole(kind, folder):
    model = open_checkpoint(folder)
    with model.file as file:
        # of SD3, the projections of CLIP-L and CLIP-G, which no job changes
        assert model.architecture.id == kind and model.ignored == ({"other tensors": 2} if kind == "sd3" else {})
        assert set(model.components) == {table.id for table in model.architecture.components}
        held = [i.name for c in model.components.values() for m in c.values() for i in (m.weight, m.bias) if i]
        vae = {f"{model.architecture.vae_prefixes[0]}{path}" for path in model.vae}
        assert set(held) | vae == {name for name in file.tensors if "transformer.text_projection" not in name}
        assert file.size == sum(p.stat().st_size for p in folder.rglob("*.safetensors"))
        assert file.path == folder and len(file.parts) == len(list(folder.rglob("*.safetensors")))
        names = [m.name for c in model.components.values() for m in c.values() if m.name and m.kind in LORA_KINDS]
        assert len(set(names)) == len(names)


AS_DEEP_AS = {  # real checkpoints
    "sd15": lambda: {
        "unet": pipelines.unet("sd1"), "text_encoder": pipelines.clip(24, layers=12), "vae": pipelines.vae(),
    },
    "sd21": lambda: {
        "unet": pipelines.unet("sd2"), "text_encoder": pipelines.clip(24, layers=23), "vae": pipelines.vae(),
    },
    "sdxl": lambda: {
        "unet": pipelines.unet("sdxl", 10), "text_encoder": pipelines.clip(16, layers=12),
        "text_encoder_2": pipelines.clip(32, 40, layers=32), "vae": pipelines.vae(),
    },
    "flux_dev": lambda: {"transformer": pipelines.flux(19, 38)},
}  # fmt: skip
NOT_IN_FOLDERS = re.compile(  # what transformers has no use for, and the last block of SD2's text encoder
    r".*(position_ids|logit_scale)|cond_stage_model\.model\.(transformer\.resblocks\.23\..*|text_projection)"
)


@pytest.mark.parametrize("table", AS_DEEP_AS)
def test_the_names_are_those_of_real_checkpoints(tmp_path, table):
    model = open_checkpoint(pipelines.save(tmp_path / "m", AS_DEEP_AS[table]()))
    with model.file as file:
        real = shapes(table)
        assert set(file.tensors) == {key for key in real if not NOT_IN_FOLDERS.fullmatch(key)}
        assert all(len(file.tensors[key].shape) == len(real[key]) for key in file.tensors)


@pytest.mark.parametrize(
    "options",
    [{"max_shard_size": "40KB"}, {"variant": "fp16"}, {"safe_serialization": False},
     {"max_shard_size": "40KB", "variant": "fp16"}, {"max_shard_size": "40KB", "safe_serialization": False}],
    ids=["shards", "variant", "bin", "shards of a variant", "shards of bin"],
)  # fmt: skip
def test_shards_variants_and_pickles_are_the_same_model(kind, models, folder, tmp_path, options):
    other = pipelines.save(tmp_path / "other", models, **options)
    expected, found = single_view(folder), single_view(other)
    assert "max_shard_size" not in options or len(list(other.rglob("*-of-*"))) > 4
    assert {key for key in found if "embed_tokens" not in key} == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def save_single(folder: Path, path: Path) -> Path:
    save_file({key: value.contiguous() for key, value in single_view(folder).items()}, path)
    return path


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sd3"], indirect=True)
def test_extract_from_and_merge_into_folders_as_into_single_files(kind, models, folder, tmp_path):
    torch.manual_seed(1)
    tuned = pipelines.parts(kind)
    with torch.no_grad():
        for model in tuned.values():
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
    tuned_folder = pipelines.save(tmp_path / "tuned", tuned, max_shard_size="40KB")
    singles = [save_single(f, tmp_path / f"{name}.safetensors") for f, name in ((folder, "base"), (tuned_folder, "t"))]
    options = ("--rank", 4, "--norms", "--biases", "--dtype", "fp32")
    extract(folder, tuned_folder, tmp_path / "from_folders", *options)
    extract(*singles, tmp_path / "from_files", *options)
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("from_folders", "from_files"))
    assert one.keys() == other.keys() and len(one) > 200
    assert all(torch.equal(one[key], other[key]) for key in one)
    for source, name in ((folder, "into_folder"), (singles[0], "into_file")):
        arguments = ["--checkpoint", source, "--lora", tmp_path / "from_files.safetensors", "--out", tmp_path / name]
        result = run_cli(["merge", "--json", "--quiet", *arguments])
        assert result.returncode == 0, result.stdout
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("into_folder", "into_file"))
    assert one.keys() == other.keys() == single_view(folder).keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- other shapes of the same thing -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "flux"], indirect=True)
def test_a_denoiser_alone_as_folder_file_or_index(kind, models, folder, tmp_path):
    name = "unet" if "unet" in models else "transformer"
    whole = {key: value for key, value in single_view(folder).items() if key.startswith("model.diffusion_model.")}
    sharded = pipelines.save(tmp_path / "m", {name: models[name]}, max_shard_size="40KB") / name
    index = sharded / "diffusion_pytorch_model.safetensors.index.json"
    lone = folder / name / "diffusion_pytorch_model.safetensors"
    for path in (folder / name, lone, sharded, index, sharded.parent):
        found = single_view(path)
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole), path


def test_the_file_that_names_the_components_stands_for_the_folder(folder):
    assert single_view(folder / "model_index.json").keys() == single_view(folder).keys()


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_a_full_file_is_preferred_to_its_variants_and_safetensors_to_pickles(kind, models, folder, tmp_path):
    copy = tmp_path / "m"
    shutil.copytree(folder, copy)
    others = pipelines.parts(kind, seed=7)
    for options in ({"variant": "fp16"}, {"safe_serialization": False}, {"variant": "non_ema"}):
        pipelines.save(copy, others, **options)
    found, expected = single_view(copy), single_view(folder)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- one pipeline taken apart -----------------------------------------------------------------------------------


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
