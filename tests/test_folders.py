"""Models as diffusers saves them, seen as single files: diffusers' own conversion must turn them back exactly."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pipelines
import pytest
import torch
from diffusers.loaders import single_file_utils as single_file
from models import extract, run_cli
from pipelines import single_view
from safetensors.torch import load_file, save_file

from lib_hypermerge.layouts.module import LORA_KINDS
from lib_hypermerge.layouts.opening import open_checkpoint
from lib_hypermerge.layouts.tables import shapes

KINDS = ("sd1", "sd2", "sdxl", "sd3", "flux")


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
