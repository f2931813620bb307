"""A base and a fine-tune that spell the same weights differently still pair up."""

import pytest
import torch
from models import (
    ATTENTION,
    UNET,
    cast,
    extract,
    is_vae,
    lora_deltas,
    relative_error,
    save_checkpoint,
    torch_saves,
    true_deltas,
)
from safetensors import safe_open
from safetensors.torch import load_file


def data_hash(folder, base, tuned, *flags) -> str:
    """What the LoRA holds, whatever the inputs were called."""
    extract(base, tuned, folder / "o", "--rank", 4, "--overwrite", *flags)
    with safe_open(folder / "o.safetensors", "pt") as file:
        return file.metadata()["sshs_model_hash"]


def without_text_model(weights):
    return {key.replace("transformer.text_model.", "transformer."): w for key, w in weights.items()}


def with_ema_and_schedule(weights):
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): w * 2 for k, w in weights.items() if UNET in k}
    schedule = {name: torch.rand(1000) for name in ("betas", "alphas_cumprod", "sqrt_alphas_cumprod")}
    return weights | ema | schedule | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}


def without_position_ids(weights):
    return {key: w for key, w in weights.items() if not key.endswith("position_ids")}


def with_marker_keys(weights):
    return weights | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}


def reordered(weights):
    return dict(reversed(weights.items()))


@pytest.mark.parametrize(
    "spell",
    [without_text_model, with_ema_and_schedule, without_position_ids, with_marker_keys, reordered],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_a_spelling_on_one_side_changes_nothing(tmp_path, known_pair, spell, side):
    files = dict(zip(("base", "tuned"), known_pair("sd15"), strict=True))
    plain = data_hash(tmp_path, **files)
    # .ckpt keeps the order of its keys
    spelled = save_checkpoint(
        tmp_path / f"spelled{'.ckpt' if spell is reordered else '.safetensors'}", spell(load_file(files[side]))
    )
    assert data_hash(tmp_path, **files | {side: spelled}) == plain


@pytest.mark.parametrize(
    ("family", "prefix"),
    [("sd15", "model.diffusion_model."), ("sd15", "diffusion_model."), ("sd15", ""), ("sd21", ""), ("sdxl", "")],
)
def test_a_unet_alone_under_any_prefix(tmp_path, known_pair, family, prefix):
    base, tuned = known_pair(family)
    unet = {prefix + k.removeprefix(UNET): w for k, w in load_file(tuned).items() if k.startswith(UNET)}
    alone = save_checkpoint(tmp_path / "unet.safetensors", unet)
    flags = ("--components", "unet")
    assert data_hash(tmp_path, base, alone, *flags) == data_hash(tmp_path, base, tuned, *flags)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_a_ckpt_against_safetensors(tmp_path, known_pair, options):
    base, tuned = known_pair("sd15")
    pickled = save_checkpoint(tmp_path / "tuned.ckpt", load_file(tuned), **options)
    assert data_hash(tmp_path, base, pickled) == data_hash(tmp_path, base, tuned)


def test_a_ckpt_of_transposed_views(tmp_path, known_pair):
    base, tuned = known_pair("sd21")
    weights = {k: w.t().contiguous().t() if w.dim() == 2 else w for k, w in load_file(tuned).items()}
    assert not weights[ATTENTION].is_contiguous()
    pickled = save_checkpoint(tmp_path / "tuned.ckpt", weights)
    extract(base, pickled, tmp_path / "o", "--rank", 4)
    expected, stored = true_deltas(base, tuned), lora_deltas(tmp_path / "o.safetensors")
    assert stored.keys() == expected.keys()
    assert relative_error(expected, stored) < 1e-3


MIXED = (torch.float16, torch.float32, torch.bfloat16, torch.float64)


def mixed(weights):
    floats = (key for key, w in weights.items() if w.is_floating_point())
    dtypes = {key: MIXED[i % len(MIXED)] for i, key in enumerate(floats)}
    return {key: w.to(dtypes.get(key, w.dtype)) for key, w in weights.items()}


def fp8(dtype):
    def convert(weights):
        big = {k: w.to(dtype) for k, w in weights.items() if w.dim() >= 2 and w.is_floating_point() and not is_vae(k)}
        return cast(weights, torch.float16) | big

    return convert


def half(weights):
    return cast(weights, torch.float16)


FORMATS = {
    "mixed_base": (mixed, half), "mixed_tuned": (half, mixed),
    "fp8_tuned": (half, fp8(torch.float8_e4m3fn)), "fp8_base": (fp8(torch.float8_e5m2), half),
}  # fmt: skip


@pytest.mark.parametrize(
    ("of_base", "of_tuned", "suffix"),
    [
        pytest.param(*formats, suffix, id=f"{name}-{suffix}")
        for name, formats in FORMATS.items()
        for suffix in (".safetensors", ".ckpt")
        if suffix != ".ckpt" or "fp8" not in name or torch_saves(torch.float8_e5m2)
    ],
)
def test_mixed_number_formats(tmp_path, known_pair, of_base, of_tuned, suffix):
    """What is extracted is the difference of the numbers that the files hold."""
    base, tuned = (load_file(path) for path in known_pair("sd15"))
    files = [
        save_checkpoint(tmp_path / f"{name}.safetensors", convert(weights))
        for name, weights, convert in (("base", base, of_base), ("tuned", tuned, of_tuned))
    ]
    given = [path.with_suffix(suffix) for path in files]
    for path, target in zip(files, given, strict=True):
        if target != path:
            save_checkpoint(target, load_file(path))
    extract(*given, tmp_path / "o", "--rank", 4096, "--layers", "attention,inout")
    expected, stored = true_deltas(*files), lora_deltas(tmp_path / "o.safetensors")
    assert stored.keys() == {name for name in expected if "attn" in name or name.endswith(("conv_in", "conv_out"))}
    assert relative_error(expected, stored) < 1e-3
