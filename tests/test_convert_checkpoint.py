"""Convert a checkpoint: number formats, pruning, pickles; everything else carried over bit for bit."""

import json

import pipelines
import pytest
import torch
from models import base_weights, cast, last_json, listing, run_cli, save_checkpoint, torch_saves
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import SpecError
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.convert import ConvertSpec, make_plan
from lib_hypermerge.jobs.convert_checkpoint import is_finite
from lib_hypermerge.layouts.opening import open_checkpoint

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."
FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def arguments(source, out, *more) -> list:
    return ["convert", "--checkpoint", source, "--out", out, "--json", "--quiet", *more]


def convert(source, out, *more) -> dict:
    result = run_cli(arguments(source, out, *more))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def refusal(source, out, *more) -> dict:
    result = run_cli(arguments(source, out, *more))
    assert result.returncode == 2, result.stdout
    return last_json(result)["error"]


def metadata(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """SD1.5 with what files have besides: markers, a schedule, EMA copies, a training loss, integers."""
    found = base_weights("sd15")
    ema = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": v + 1 for k, v in found.items() if UNET in k}
    return found | ema | {
        "v_pred": torch.zeros(0), "ztsnr": torch.ones(1, dtype=torch.float64),
        "alphas_cumprod": torch.linspace(1, 0.0047, 1000), "model_ema.decay": torch.tensor(0.9999),
        f"{VAE}loss.logvar": torch.zeros(()), f"{TEXT}transformer.text_model.embeddings.position_ids":
        torch.arange(77)[None], "optimizer.state.0": torch.ones(3),
    }  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    texts = {"format": "pt", "modelspec.title": "A model – ünïcode", "note": "x" * 5000,
             "modelspec.hash_sha256": "0xabc"}  # fmt: skip
    save_file({k: v.contiguous() for k, v in weights.items()}, path, texts)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_networks_are_rounded_and_the_rest_is_carried_bit_for_bit(tmp_path, weights, checkpoint, name):
    answer = convert(checkpoint, tmp_path / "o", "--dtype", name)
    stored = load_file(tmp_path / "o.safetensors")
    assert stored.keys() == weights.keys()
    for key, tensor in stored.items():
        network = key.startswith((UNET, VAE, TEXT)) and weights[key].is_floating_point()
        wanted = weights[key].to(FORMATS[name]) if network else weights[key]
        assert torch.equal(tensor, wanted) and tensor.dtype == wanted.dtype, key
    assert answer["bytes_before"] == checkpoint.stat().st_size
    assert answer["outputs"][0]["bytes"] == (tmp_path / "o.safetensors").stat().st_size
    assert answer["converted"] + answer["carried"] == len(weights)
    assert (answer["converted"] == 0) == (name == "fp32")


def test_metadata_is_carried_and_says_how_the_file_was_made(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "o", "--dtype", "fp16")
    before, after = metadata(checkpoint), metadata(tmp_path / "o.safetensors")
    made = json.loads(after.pop("hypermerge"))
    assert after == {k: v for k, v in before.items() if k != "modelspec.hash_sha256"}  # that of other numbers
    assert made["job"] == "convert" and made["parameters"]["dtype"] == "fp16"
    assert made["parents"]["checkpoint"] == {"name": "model.safetensors", "bytes": checkpoint.stat().st_size}
    convert(tmp_path / "o.safetensors", tmp_path / "p", "--dtype", "fp32")
    assert json.loads(metadata(tmp_path / "p.safetensors")["hypermerge"])["parents"]["checkpoint"]["recipe"] == made


def test_nothing_asked_for_changes_nothing(tmp_path, weights, checkpoint):
    answer = convert(checkpoint, tmp_path / "o")
    assert all(same_bits(t, weights[k]) for k, t in load_file(tmp_path / "o.safetensors").items())
    assert metadata(tmp_path / "o.safetensors")["modelspec.hash_sha256"] == "0xabc"  # still its own
    assert answer["converted"] == answer["skipped"] == 0


def test_prune_drops_what_only_training_needs_and_counts_it(tmp_path, weights, checkpoint):
    answer = convert(checkpoint, tmp_path / "o", "--prune")
    stored = load_file(tmp_path / "o.safetensors")
    gone = weights.keys() - stored.keys()
    assert gone == {k for k in weights if k.startswith(("model_ema.", "first_stage_model.loss.", "optimizer."))}
    assert all(same_bits(tensor, weights[key]) for key, tensor in stored.items())
    copies = sum(key.startswith("model_ema.") for key in weights)
    assert answer["pruned"] == {"EMA copies": copies, "loss of the VAE's training": 1, "optimizer states": 1}
    assert answer["skipped"] == len(gone)
    assert json.loads(metadata(tmp_path / "o.safetensors")["hypermerge"])["pruned"] == answer["pruned"]


def test_nothing_to_prune_is_said(tmp_path):
    source = save_checkpoint(tmp_path / "m.safetensors", base_weights("sd15"))
    assert convert(source, tmp_path / "o", "--prune")["warnings"] == ["There was nothing to prune."]


def test_a_file_of_ema_copies_alone_is_not_pruned_to_nothing(tmp_path):
    found = base_weights("sd15")
    only = {f"model_ema.{k[6:].replace('.', '')}" if k.startswith(UNET) else k: v for k, v in found.items()}
    source = save_checkpoint(tmp_path / "m.safetensors", only)
    assert refusal(source, tmp_path / "o", "--prune")["code"] == "wrong_model"
    assert listing(tmp_path).keys() == {"m.safetensors"}


@pytest.mark.parametrize("suffix", [".ckpt", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_becomes_safetensors_with_the_same_numbers(tmp_path, suffix, zipped):
    found = cast(base_weights("sd15"), torch.bfloat16)
    key = UNET + "middle_block.1.proj_in.weight"
    found[key] = found[key].transpose(0, 1).contiguous().transpose(0, 1)  # columns first, in the file
    source = save_checkpoint(tmp_path / f"m{suffix}", found, _use_new_zipfile_serialization=zipped)
    convert(source, tmp_path / "o")
    stored = load_file(tmp_path / "o.safetensors")
    assert stored.keys() == found.keys()
    assert all(torch.equal(stored[k], found[k]) and stored[k].dtype == found[k].dtype for k in found)
    assert metadata(tmp_path / "o.safetensors")["format"] == "pt"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("more", [[], ["--prune"]])
def test_what_a_pickle_holds_besides_is_told(tmp_path, more, zipped):
    found = base_weights("sd15")
    states = [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}]
    whole = {"epoch": 3, "global_step": 7, "callbacks": {}, "optimizer_states": states, "state_dict": found}
    torch.save(whole, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    answer = convert(tmp_path / "m.ckpt", tmp_path / "o", *more)
    assert answer["warnings"] == [
        "Left out, as only the state dict is kept: epoch, global_step, callbacks, optimizer_states."
    ]
    assert answer["besides"] == 4
    assert load_file(tmp_path / "o.safetensors").keys() == found.keys()


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_are_for_matrices(tmp_path, weights, checkpoint, name):
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[name]
    convert(checkpoint, tmp_path / "o", "--dtype", name)
    for key, tensor in load_file(tmp_path / "o.safetensors").items():
        if key.startswith((UNET, TEXT)) and weights[key].is_floating_point():
            wanted = weights[key].to(dtype if weights[key].dim() > 1 else torch.float16)
            assert tensor.dtype == wanted.dtype, key
            assert torch.equal(tensor.float(), wanted.float()), key
        else:  # the VAE stays as it is
            assert torch.equal(tensor, weights[key]) and tensor.dtype == weights[key].dtype, key


def test_a_file_in_eight_bits_can_be_widened_again(tmp_path, weights, checkpoint):
    convert(checkpoint, tmp_path / "o", "--dtype", "fp8_e4m3")
    convert(tmp_path / "o.safetensors", tmp_path / "p", "--dtype", "fp16")
    key = UNET + "middle_block.1.proj_in.weight"
    wide = load_file(tmp_path / "p.safetensors")[key]
    assert torch.equal(wide, weights[key].to(torch.float8_e4m3fn).to(torch.float16))


def test_components_have_formats_of_their_own(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "o", "--dtype", "fp16", "--te-dtype", "bf16", "--vae-dtype", "keep")
    stored = load_file(tmp_path / "o.safetensors")
    assert stored[UNET + "middle_block.1.proj_in.weight"].dtype == torch.float16
    assert stored[TEXT + "transformer.text_model.encoder.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16
    assert stored[VAE + "encoder.conv_in.weight"].dtype == torch.float32


def test_a_number_too_large_for_the_format_is_an_error_and_leaves_nothing(tmp_path, weights):
    key = UNET + "middle_block.1.proj_in.weight"
    large = weights[key].clone()
    large[0, 0] = 1e6
    source = save_checkpoint(tmp_path / "m.safetensors", base_weights("sd15") | {key: large})
    result = run_cli(arguments(source, tmp_path / "o", "--dtype", "fp16"))
    assert result.returncode == 1
    assert key in last_json(result)["error"]["what"]
    assert listing(tmp_path).keys() == {"m.safetensors"}
    convert(source, tmp_path / "o", "--dtype", "bf16")


def test_nan_that_was_there_before_is_told_of(tmp_path):
    found = base_weights("sd15")
    found[UNET + "out.2.weight"][0] = torch.nan
    source = save_checkpoint(tmp_path / "m.safetensors", found)
    assert convert(source, tmp_path / "o", "--dtype", "fp16")["warnings"] == ["1 tensors hold NaN or Inf, as they did "
                                                                               "before."]  # fmt: skip


def test_what_is_wrong_is_refused_before_anything_is_written(tmp_path, checkpoint, monkeypatch):
    before = listing(checkpoint.parent)
    for more in ([], ["--overwrite"]):
        assert refusal(checkpoint, checkpoint, *more)["what"].endswith("would replace the file that it is made from.")
    assert refusal(checkpoint, tmp_path / "o", "--to", "peft")["what"].startswith("'to' is about LoRAs")
    assert refusal(checkpoint, tmp_path / "o", "--rank", 4)["what"].startswith("'rank' is about LoRAs")
    assert refusal(tmp_path / "none.safetensors", tmp_path / "o")["code"] == "bad_request"
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    assert refusal(tmp_path / "broken.safetensors", tmp_path / "o")["code"] == "bad_file"
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    assert "LoRA" in refusal(tmp_path / "lora.safetensors", tmp_path / "o")["what"]
    monkeypatch.delattr(torch, "float8_e4m3fn")
    assert refusal(checkpoint, tmp_path / "o", "--dtype", "fp8_e4m3")["what"].startswith("The number format fp8_e4m3")
    assert listing(checkpoint.parent) == before
    assert not (tmp_path / "o.safetensors").exists()


def test_a_forecast_says_the_size_to_the_byte(tmp_path, checkpoint):
    table = last_json(run_cli(arguments(checkpoint, tmp_path / "o", "--dtype", "bf16", "--prune", "--dry-run")))
    assert (
        table["expected_bytes"]
        == convert(checkpoint, tmp_path / "o", "--dtype", "bf16", "--prune")["outputs"][0]["bytes"]
    )


def test_a_pickle_in_eight_bits_is_read(tmp_path):
    if torch_saves(torch.float8_e5m2):
        source = save_checkpoint(tmp_path / "m.ckpt", cast(base_weights("sd15"), torch.float8_e5m2))
        convert(source, tmp_path / "o", "--dtype", "fp16")
        assert load_file(tmp_path / "o.safetensors")[UNET + "out.2.weight"].dtype == torch.float16


def test_a_vae_alone_is_carried_over_from_its_pickle(tmp_path):
    vae = {"encoder.conv_in.weight": torch.randn(4, 3, 3, 3).half(), "decoder.up.0.block.0.norm1.weight": torch.ones(4)}
    source = save_checkpoint(tmp_path / "vae.pt", vae)
    assert convert(source, tmp_path / "o")["architecture"] == "no known model"
    assert all(torch.equal(t, vae[k]) for k, t in load_file(tmp_path / "o.safetensors").items())
    assert refusal(source, tmp_path / "p", "--dtype", "fp16")["code"] == "wrong_model"


def test_a_folder_of_diffusers_becomes_one_file(tmp_path):
    folder = pipelines.save(tmp_path / "pipe", pipelines.parts("sd1"))
    convert(folder, tmp_path / "o", "--dtype", "fp16")
    with open_checkpoint(folder).file as parts, open_checkpoint(tmp_path / "o.safetensors").file as file:
        assert parts.tensors.keys() == file.tensors.keys()
        for name, info in parts.tensors.items():
            tensor, made = parts.read(info), file.read(file.tensors[name])
            assert torch.equal(tensor.half() if tensor.is_floating_point() else tensor, made), name


def test_the_checkpoint_that_is_loaded_at_the_moment_is_not_replaced(tmp_path, checkpoint):
    """Windows cannot, and elsewhere the WebUI would go on with the old one."""

    class Host(PathHost):
        def loaded_checkpoint(self):
            return tmp_path / "loaded.safetensors"

    (tmp_path / "loaded.safetensors").write_bytes(checkpoint.read_bytes())
    spec = ConvertSpec(checkpoint=str(checkpoint), out=str(tmp_path / "loaded"), overwrite=True)
    with pytest.raises(SpecError, match="loaded at the moment"):
        make_plan(spec, Host())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype):
    sound = torch.linspace(-3, 4, 3500).to(dtype).reshape(50, 70)
    assert all(is_finite(part) for part in (sound, sound.mT, sound[:0], sound[3, 4]))
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 1777, 3499):
            broken = sound.float().flatten()
            broken[place] = bad
            broken = broken.to(dtype).reshape(50, 70)
            assert not is_finite(broken) and not is_finite(broken.mT)
