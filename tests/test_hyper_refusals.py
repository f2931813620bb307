"""hyper: models that cannot be merged with each other are refused from their headers; what is odd is said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hyper_models import EMPTY, EPS, SD2, V_PRED, XL, Files, opened, weights
from models import ATTENTION, NORM, SD1_TEXT, UNET, last_json, listing, run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import FormatError, HypermergeError, LayoutError, SpecError


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


@dataclass(frozen=True)
class Refusal:
    """make(files) → (models, base).  says: what the message names."""

    make: Callable[[Files], tuple[list[Path], Path | None]]
    kind: type[HypermergeError]
    says: tuple[str, ...]


def case(kind: type[HypermergeError], *says: str):
    return lambda make: REFUSALS.__setitem__(make.__name__, Refusal(make, kind, says))


REFUSALS: dict[str, Refusal] = {}


@case(SpecError, "two or more models")
def one_model(f: Files):
    return [f.model("a.safetensors")], None


@case(SpecError, "nowhere.safetensors")
def a_model_that_is_not_there(f: Files):
    return [f.model("a.safetensors"), f.folder / "nowhere.safetensors"], None


@case(SpecError, "nowhere.safetensors")
def a_base_that_is_not_there(f: Files):
    return f.two(), f.folder / "nowhere.safetensors"


@case(LayoutError, "a.safetensors is Stable Diffusion 1", "b.safetensors is Stable Diffusion XL")
def other_architectures(f: Files):
    return [f.model("a.safetensors"), f.model("b.safetensors", XL)], None


@case(LayoutError, "x/m.safetensors", "y/m.safetensors", "tensors have different shapes")
def models_of_one_name_that_differ_in_shape(f: Files):
    return [f.model("x/m.safetensors"), f.model("y/m.safetensors", **{ATTENTION: torch.zeros(3, 5).half()})], None


@case(LayoutError, "base.safetensors is Stable Diffusion 2", "a.safetensors is Stable Diffusion 1")
def a_base_of_another_architecture(f: Files):
    return f.two(), f.model("base.safetensors", SD2)


@case(LayoutError, "b.safetensors is an in-painting model, a.safetensors is not")
def in_painting_beside_plain(f: Files):
    return [f.model("a.safetensors"), f.model("b.safetensors", "sd15_inpainting")], None


@case(LayoutError, "b.safetensors is an in-painting model, a.safetensors is not")
def plain_beside_in_painting(f: Files):
    return [f.model("b.safetensors", "sd15_inpainting"), f.model("a.safetensors")], None


@case(LayoutError, "tensors have different shapes", "attn1.to_q is [", "in a.safetensors", "in b.safetensors")
def other_shapes(f: Files):
    return [f.model("a.safetensors"), f.model("b.safetensors", **{ATTENTION: torch.zeros(3, 5).half()})], None


@case(LayoutError, "tensors have different shapes", "token_embedding is [")
def other_vocabularies(f: Files):
    key = next(key for key in weights() if "token_embedding" in key)
    return [f.model("a.safetensors"), f.model("b.safetensors", **{key: torch.zeros(7, 5).half()})], None


@case(LayoutError, "b.safetensors: v-prediction; a.safetensors: epsilon")
def v_prediction_by_its_mark(f: Files):
    return [f.model("a.safetensors", XL), f.model("b.safetensors", XL, v_pred=EMPTY)], None


@case(LayoutError, "b.safetensors: v-prediction; a.safetensors: epsilon")
def v_prediction_by_metadata(f: Files):
    return [f.model("a.safetensors", SD2, texts=EPS), f.model("b.safetensors", SD2, texts=V_PRED)], None


@case(LayoutError, "b.safetensors: v-prediction; a.safetensors: epsilon")
def v_prediction_by_the_configuration_beside_it(f: Files):
    config = "model:\n  params:\n    linear_start: 0.00085\n"
    (f.folder / "a.yaml").write_text(config)
    (f.folder / "b.yaml").write_text(config + '    parameterization: "v"\n')
    return [f.model("a.safetensors", SD2), f.model("b.safetensors", SD2)], None


@case(LayoutError, "a.safetensors and b.safetensors: v-prediction", "base.safetensors: epsilon")
def models_of_v_on_a_base_of_epsilon(f: Files):
    return f.two(texts=V_PRED), f.model("base.safetensors", texts=EPS)


@case(LayoutError, "style.safetensors: v-prediction", "base.safetensors: epsilon")
def a_lora_that_was_trained_on_a_model_of_v(f: Files):
    loras = [f.lora("style.safetensors", SD2, texts={"ss_base_model_version": "sd_v2_v"}), f.lora("x.safetensors", SD2)]
    return loras, f.model("base.safetensors", SD2, texts=EPS)


@case(LayoutError, "y.safetensors: v-prediction; x.safetensors: epsilon")
def loras_of_both_kinds(f: Files):
    return [f.lora("x.safetensors", texts=EPS), f.lora("y.safetensors", texts=V_PRED)], f.model("base.safetensors")


@case(SpecError, "style.safetensors is a LoRA", "Name the base that the LoRAs were trained on")
def a_lora_without_a_base(f: Files):
    return [f.model("a.safetensors"), f.lora("style.safetensors")], None


@case(LayoutError, "xl.safetensors", "XL")
def a_lora_for_another_architecture(f: Files):
    return [f.lora("style.safetensors"), f.lora("xl.safetensors", XL)], f.model("base.safetensors")


@case(LayoutError, "style.safetensors says that it was trained on Stable Diffusion 2", "base.safetensors is")
def a_lora_that_names_another_architecture(f: Files):
    loras = [f.lora("style.safetensors", texts={"ss_base_model_version": "sd_v2"}), f.lora("x.safetensors")]
    return loras, f.model("base.safetensors")


@case(LayoutError, "None of the LoRAs changes a layer")
def loras_of_norms_alone(f: Files):
    norm = torch.ones(len(weights()[f"{NORM}.weight"]))
    name = "lora_unet_down_blocks_1_resnets_0_norm1"
    extra = {f"{name}.w_norm": norm, f"{name}.b_norm": norm.clone()}
    loras = [f.lora(n, only=lambda name: False, **extra) for n in ("x.safetensors", "y.safetensors")]
    return loras, f.model("base.safetensors")


@case(LayoutError, "b.safetensors has no UNet")
def text_encoders_alone(f: Files):
    return [f.model("a.safetensors"), f.model("b.safetensors", without=UNET)], None


@case(LayoutError, "too little in common", "a.safetensors", "b.safetensors")
def most_layers_missing(f: Files):
    lacking = {key: None for key in weights() if "output_blocks" in key or ".encoder.layers" in key or "middle" in key}
    kept = {SD1_TEXT.replace("fc1", part): weights()[SD1_TEXT.replace("fc1", part)] for part in ("fc1",)}
    inner = {key: None for key in weights() if any(f"input_blocks.{i}." in key for i in (2, 5, 7, 8, 11))}
    return [f.model("a.safetensors"), f.model("b.safetensors", **(lacking | inner | kept))], None


@case(LayoutError, "b.safetensors is quantised")
def a_quantised_model(f: Files):
    codes = weights()[ATTENTION].to(torch.int8)
    return [f.model("a.safetensors"), f.model("b.safetensors", **{ATTENTION: codes})], None


@case(FormatError, "b.safetensors", "truncated")
def a_truncated_model(f: Files):
    path = f.model("b.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    return [f.model("a.safetensors"), path], None


@case(LayoutError, "b.safetensors is neither a checkpoint nor a LoRA")
def another_file_of_tensors(f: Files):
    save_file({"x": torch.zeros(2, 2)}, f.folder / "b.safetensors")
    return [f.model("a.safetensors"), f.folder / "b.safetensors"], None


@case(FormatError, "style.safetensors", "lora_up")
def half_a_lora(f: Files):
    path = f.lora("style.safetensors")
    save_file({key: t for key, t in load_file(path).items() if not key.endswith("attn1_to_q.lora_up.weight")}, path)
    return [f.lora("x.safetensors"), path], f.model("base.safetensors")


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(files, name):
    """By a typed error that names the files; by the command line in JSON, with nothing written."""
    refusal = REFUSALS[name]
    models, base = refusal.make(files)
    with pytest.raises(refusal.kind) as caught:
        opened(models, base)
    assert type(caught.value) is refusal.kind
    assert all(text in str(caught.value) for text in refusal.says), str(caught.value)
    before = listing(files.folder)
    chosen = [part for path in models for part in ("--model", path)]
    result = run_cli(
        ["hyper", *chosen, *(["--base", base] if base else []), "--ranks", "1", "--name", "h",
         "--out-dir", files.folder / "out", "--device", "cpu", "--json", "--quiet"]
    )  # fmt: skip
    assert result.returncode == 2, result.stdout + result.stderr
    answer = last_json(result)
    assert (answer["exit_code"], answer["error"]) == (2, caught.value.to_json())
    assert listing(files.folder) == before
