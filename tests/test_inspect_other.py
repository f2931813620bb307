"""Inspect of what is neither checkpoint nor adapter: embeddings, VAEs alone, tensors that are not known."""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from models import base_weights, last_json, run_cli
from safetensors.torch import save_file
from test_inspect import inspect, only

from lib_hypermerge.files.pickle import PickleFile
from lib_hypermerge.render_inspect import describe
from lib_hypermerge.ui.inspect_view import view


def old_embedding(vectors: torch.Tensor) -> dict:
    """As textual inversion's first programs saved it: in modules rather than plain tables."""
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}


def a1111_embedding(vectors: torch.Tensor) -> dict:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "cat", "step": 500,
            "sd_checkpoint": "6ce0161689", "sd_checkpoint_name": "v1-5", "optimizer_state_dict": None}  # fmt: skip


EMBEDDINGS = {
    "a1111.pt": (a1111_embedding(torch.ones(4, 768)), "sd1", {"*": 4}, {"*": 768}),
    "old.pt": (old_embedding(torch.ones(2, 768)), "sd1", {"*": 2}, {"*": 768}),
    "learned_embeds.bin": ({"<cat>": torch.ones(1024)}, "sd2", {"<cat>": 1}, {"<cat>": 1024}),
    "one.safetensors": ({"emb_params": torch.ones(3, 1024).half()}, "sd2", {"emb_params": 3}, {"emb_params": 1024}),
    "narrow.safetensors": ({"emb_params": torch.ones(3, 24)}, None, {"emb_params": 3}, {"emb_params": 24}),
    "xl.safetensors": ({"clip_l": torch.ones(8, 768), "clip_g": torch.ones(8, 1280)}, "sdxl",
                       {"CLIP-L": 8, "CLIP-G": 8}, {"CLIP-L": 768, "CLIP-G": 1280}),
}  # fmt: skip


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_an_embedding_is_told_by_its_vectors(tmp_path, name):
    content, architecture, vectors, widths = EMBEDDINGS[name]
    path = tmp_path / name
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    file = only(path, "--hashes", "--norms")
    assert (file["kind"], file["architecture"], file["vectors"]) == ("embedding", architecture, vectors)
    assert file["widths"] == widths
    assert file["parameters"] == sum(vectors[part] * widths[part] for part in vectors)
    assert file["bytes_of_tensors"] == file["parameters"] * (2 if name == "one.safetensors" else 4)
    assert file["dtypes"] == {"F16" if name == "one.safetensors" else "F32": len(vectors)}
    assert len(file["hashes"]["sha256"]) == 64
    norms = {part: values["norm"] for part, values in file["values"]["components"].items()}
    assert norms == pytest.approx({part: math.sqrt(vectors[part] * widths[part]) for part in vectors})
    assert "embedding (textual inversion)" in dict(describe(file))["kind"]


@pytest.mark.parametrize("zipped", [True, False])
def test_what_an_embedding_was_trained_on_is_told(tmp_path, zipped):
    torch.save(a1111_embedding(torch.ones(1, 768)), tmp_path / "cat.pt", _use_new_zipfile_serialization=zipped)
    metadata = only(tmp_path / "cat.pt")["metadata"]
    assert metadata == {"name": "cat", "step": "500", "sd_checkpoint": "6ce0161689", "sd_checkpoint_name": "v1-5"}


def test_a_checkpoint_s_pickle_has_no_metadata_of_an_embedding(tmp_path):
    torch.save({"state_dict": OrderedDict(a=torch.ones(1)), "epoch": 3}, tmp_path / "a.ckpt")
    with PickleFile(tmp_path / "a.ckpt") as file:
        assert (list(file.tensors), file.metadata) == (["a"], {})


def test_nan_in_an_embedding_is_found(tmp_path):
    vectors = torch.ones(2, 768)
    vectors[1, :3] = float("nan")
    save_file({"emb_params": vectors}, tmp_path / "a.safetensors")
    file = only(tmp_path / "a.safetensors", "--norms")
    assert file["values"]["nonfinite"] == {"count": 1, "names": ["emb_params"], "values": 3}
    assert dict(describe(file))["NaN or Inf"] == "emb_params"


def vae(prefix: str = "") -> dict[str, torch.Tensor]:
    """A few layers of one, under the names of the original code."""
    renamed = {"down_blocks.0.resnets.0": "down.0.block.0", "up_blocks.0.resnets.0": "up.0.block.0"}
    out = {}
    for key, weight in diffusers_vae(4).items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        out[prefix + key] = weight
    return out | {f"{prefix}quant_conv.weight": torch.ones(8, 8, 1, 1)}


def diffusers_vae(channels: int) -> dict[str, torch.Tensor]:
    """A few layers of one, under the names that diffusers gives them."""
    return {
        "encoder.conv_in.weight": torch.ones(8, 3, 3, 3),
        "encoder.down_blocks.0.resnets.0.conv1.weight": torch.ones(8, 8, 3, 3),
        "encoder.conv_out.weight": torch.ones(2 * channels, 8, 3, 3),
        "decoder.conv_in.weight": torch.ones(8, channels, 3, 3),
        "decoder.up_blocks.0.resnets.0.conv1.weight": torch.ones(8, 8, 3, 3),
    }


VAES = {
    "bare": (vae, "original", 4), "prefixed": (lambda: vae("first_stage_model."), "original", 4),
    "diffusers": (lambda: diffusers_vae(16), "diffusers", 16),
    "encoder alone": (lambda: {k: w for k, w in diffusers_vae(4).items() if "encoder" in k}, "diffusers", 4),
}  # fmt: skip


@pytest.mark.parametrize("which", VAES)
def test_a_vae_alone_is_told_by_its_latents(tmp_path, which):
    make, layout, channels = VAES[which]
    weights = make()
    first = next(iter(weights))
    weights[first] = weights[first].clone()
    weights[first].view(-1)[0] = float("inf")
    save_file(weights | {"loss.logvar": torch.ones(1)}, tmp_path / "a.safetensors")
    file = only(tmp_path / "a.safetensors", "--norms")
    assert (file["kind"], file["layout"], file["latent_channels"]) == ("VAE", layout, channels)
    assert (file["tensors"], file["others"]) == (len(weights), 1)
    assert file["parameters"] == sum(w.numel() for w in weights.values())
    assert file["bytes_of_tensors"] == sum(w.nbytes for w in weights.values())
    assert file["values"]["nonfinite"]["names"] == [first]
    assert f"{channels}, as of" in dict(describe(file))["latent channels"]


def test_a_folder_of_a_vae_is_its_file(tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(diffusers_vae(4), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert only(folder)["kind"] == "VAE"


@pytest.mark.parametrize("which", ["bare", "prefixed", "diffusers"])
def test_a_vae_in_place_of_a_checkpoint_is_refused_without_a_wrong_hint(tmp_path, which):
    save_file(VAES[which][0](), tmp_path / "a.safetensors")
    save_file({"emb_params": torch.ones(1, 768)}, tmp_path / "b.safetensors")
    result = run_cli(["inspect", tmp_path / "b.safetensors", "--base", tmp_path / "a.safetensors", "--json", "--quiet"])
    error = last_json(result)["error"]
    assert (result.returncode, error["code"]) == (2, "wrong_model")
    assert "a VAE" in error["why"]
    assert "layout" not in error["hint"]


def test_other_tensors_are_described_and_said_to_be_unknown(tmp_path):
    quantised = base_weights("sd15")
    quantised["model.diffusion_model.out.2.scale_weight"] = torch.ones(1)
    save_file(quantised, tmp_path / "quantised.safetensors")
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.ones(4).half()}
    save_file(tensors, tmp_path / "strange.safetensors", {"who": "me"})
    save_file({"lora_unet_conv_in.alpha": torch.ones(())}, tmp_path / "alphas.safetensors")
    names = ("quantised", "strange", "alphas")
    files = inspect(*(tmp_path / f"{name}.safetensors" for name in names), "--norms")["files"]
    assert [file["kind"] for file in files] == ["tensors"] * 3
    assert "quantised" in files[0]["why"] and "scale_weight" in files[0]["why"]
    strange = files[1]
    assert (strange["tensors"], strange["parameters"], strange["bytes_of_tensors"]) == (2, 10, 32)
    assert (strange["dtypes"], strange["names"]) == ({"F32": 1, "F16": 1}, ["a.weight", "b"])
    assert strange["metadata"] == {"who": "me"}
    assert strange["values"]["components"]["all tensors"]["norm"] == pytest.approx(10**0.5)
    assert "does not know" in dict(describe(strange))["kind"]
    assert "none of its factors: lora_unet_conv_in.alpha" in files[2]["why"]


def test_the_page_shows_them_all(tmp_path):
    from test_inspect_files import execute_in

    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, tmp_path / "a.safetensors")
    save_file(diffusers_vae(16), tmp_path / "b.safetensors")
    save_file({"<i>": torch.ones(1)}, tmp_path / "c.safetensors")
    page = view(execute_in(None, *(tmp_path / f"{name}.safetensors" for name in "abc"), norms=True, hashes=True))
    for text in ("Stable Diffusion XL", "vectors CLIP-G", "VAE alone", "does not know", "&lt;i&gt;"):
        assert text in page
