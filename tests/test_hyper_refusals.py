"""hyper: models that cannot be merged with each other are refused from their headers; what is odd is said."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from adapter_samples import SAMPLES, Dice
from models import (
    ATTENTION,
    CONVOLUTION,
    NORM,
    SD1_TEXT,
    UNET,
    Weights,
    base_weights,
    cast,
    last_json,
    listing,
    rank_change,
    reachable,
    run_cli,
    save_checkpoint,
    tuned_weights,
)
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import FormatError, HypermergeError, LayoutError, SpecError
from lib_hypermerge.hosts.standalone import FolderHost, PathHost
from lib_hypermerge.jobs.hyper import prediction
from lib_hypermerge.jobs.hyper.inputs import Inputs, open_inputs
from lib_hypermerge.jobs.hyper.spec import HyperSpec

SD1, SD2, XL = "sd15", "sd21", "sdxl"


@functools.cache
def weights(family: str = SD1, seed: int = 0) -> Weights:
    base = base_weights(family, 64)
    return cast(tuned_weights(base, rank_change(2), seed=seed), torch.float16) if seed else cast(base, torch.float16)


@dataclass
class Files:
    """Writes models into a folder of its own."""

    folder: Path

    def model(self, name: str, family: str = SD1, seed: int = 1, without: str = "", texts=None, **more) -> Path:
        """A checkpoint; without: no tensor whose name holds this.  more: tensors by name, None to leave one out."""
        stored = {key: w for key, w in weights(family, seed).items() if not without or without not in key}
        stored = {key: w for key, w in (stored | more).items() if w is not None}
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        if not name.endswith(".safetensors"):
            return save_checkpoint(path, stored)
        save_file({key: w.contiguous() for key, w in stored.items()}, path, texts)
        return path

    def lora(self, name: str, family: str = SD1, kind: str = "lora", only=lambda name: "attn1" in name, texts=None,
             **more) -> Path:  # fmt: skip
        dice, tensors = Dice(0), {}
        for module, size in reached(family):
            if only(module):
                tensors |= {f"{module}.{part}": t for part, t in SAMPLES[kind](size, dice)[0].items()}
        path = self.folder / name
        save_file(tensors | more, path, texts)
        return path

    def two(self, **more) -> list[Path]:
        return [self.model("a.safetensors", seed=1, **more), self.model("b.safetensors", seed=2, **more)]


@functools.cache
def reached(family: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kohya's name, size) of every layer that a LoRA reaches."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(reachable(save_checkpoint(Path(folder) / "m.safetensors", weights(family))))
    return [(name, tuple(weights(family)[key][rows].shape)) for name, key, rows in found]


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


def opened(models: list[Path], base: Path | None = None, **more) -> Inputs:
    values = {"models": [str(path) for path in models], "name": "h", "ranks": "1", **more}
    return open_inputs(HyperSpec.from_json(values | ({"base": str(base)} if base else {})), PathHost())


def warned(models: list[Path], base: Path | None = None, **more) -> list[str]:
    inputs = opened(models, base, **more)
    inputs.close()
    return inputs.warnings


EMPTY = torch.zeros(0)
V_PRED, EPS = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}


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


# --- what is said, and goes on ---------------------------------------------------------------------------------------


def test_nothing_is_said_of_models_that_are_alike(files):
    assert warned(files.two()) == []
    assert warned(files.two(), files.model("base.safetensors", seed=0), ranks="1,1") == []


def test_the_same_model_twice(files):
    a, b = files.two()
    link = files.folder / "link.safetensors"
    link.symlink_to(a)
    inputs = opened([a, b, a, link])
    assert inputs.labels == ["a", "b", "a (2)", "link"]
    assert inputs.warnings == [
        "a and a (2) and link are the same file: their multipliers are the same, and it counts 3 times in the mean."
    ]
    inputs.close()


def test_models_of_one_name_in_several_folders(files):
    paths = [files.model(f"{folder}/m.safetensors", seed=i + 1) for i, folder in enumerate("xyz")]
    inputs = opened(paths)
    assert inputs.labels == ["m", "m (2)", "m (3)"] and inputs.warnings == []
    inputs.close()


def test_a_model_that_is_the_base(files):
    a, b = files.two()
    (said,) = warned([a, b], a)
    assert said == "a is the base itself: it changes nothing, and its multipliers are 0."
    (said,) = warned([a, b, a], a)
    assert said == "a and a (2) are the base itself: they change nothing, and their multipliers are 0."


@pytest.mark.parametrize("ranks", ["1", "1,1"])
def test_models_that_are_all_one(files, ranks):
    a, _ = files.two()
    (said,) = warned([a, a, a], ranks=ranks)
    assert said == "All models are the same file: all multipliers are 0."
    (said,) = warned([a, a], a, ranks=ranks)
    assert said.startswith("All models are the base itself")


PARTS = {"te": "cond_stage_model", "vae": "first_stage_model", "layer": ATTENTION}


@pytest.mark.parametrize("part", PARTS)
def test_the_most_complete_model_is_the_template_in_any_order(files, part):
    whole, poor = files.model("whole.safetensors"), files.model("poor.safetensors", seed=2, without=PARTS[part])
    told = []
    for models in ([poor, whole], [whole, poor], [poor, whole, files.model("more.safetensors", seed=3)]):
        inputs = opened(models)
        assert inputs.template.file.path == whole
        assert inputs.labels == [path.stem for path in models]  # in their own order
        told.append(inputs.warnings)
        inputs.close()
    assert told[0] == told[1] == told[2] and not any("by itself" in text for text in told[0])


def test_a_base_is_the_template_however_little_it_has(files):
    base, models = files.model("base.safetensors", without="first_stage_model"), files.two()
    (said,) = warned(models, base)
    assert said == (
        "The hyper-model will have no VAE, as base.safetensors, the base, has none: a WebUI does not load it by itself."
    )
    assert warned(models, base, loras_only=True) == []


def test_a_hyper_model_that_no_webui_loads_alone(files):
    """One lacks the text encoder, the other the VAE."""
    without_te = files.model("a.safetensors", without="cond_stage_model")
    without_vae = files.model("b.safetensors", seed=2, without="first_stage_model")
    said = warned([without_te, without_vae])
    assert any("no VAE, as b.safetensors, the most complete model, has none" in text for text in said)
    neither = [files.model(f"{i}.safetensors", seed=i, without="stage_model") for i in (1, 2)]
    (said,) = warned(neither)
    assert said.startswith("The hyper-model will have no text encoder and no VAE, as 1.safetensors")


@pytest.mark.parametrize(
    ("ranks", "with_base", "most"),
    [("1,1", False, 1), ("1,1,1", False, 1), ("full,full", False, 1), ("1", False, None), ("1,1", True, None),
     ("1,1,1", True, 2), ("full,full,full", True, 2)],
)  # fmt: skip
def test_more_loras_than_models_can_tell_apart(files, ranks, with_base, most):
    said = warned(files.two(), files.model("base.safetensors", seed=0) if with_base else None, ranks=ranks)
    count = len(ranks.split(","))
    wanted = [f"{count} LoRAs for 2 models: the multipliers of more than {most} depend on each other; "
              "the smallest are taken (pseudo-inverse)."]  # fmt: skip
    assert said == (wanted if most else [])


def test_repeated_models_count_once(files):
    a, b = files.two()
    said = warned([a, b, a], ranks="1,1")
    assert any("more than 1 depend" in text for text in said)


def test_a_number_of_loras_with_a_size(files):
    said = warned(files.two(), size=1.0, count=3)
    assert any("3 LoRAs for 2 models" in text for text in said)
    assert warned(files.two(), size=1.0) == []


def test_ranks_above_a_layers_size(files):
    (said,) = warned(files.two(), ranks="4096")
    inputs = opened(files.two())
    assert said.startswith(f"Rank 4096 is more than {len(inputs.layers)} of {len(inputs.layers)} layers have room for")
    inputs.close()


def test_different_number_formats(files):
    a = files.model("a.safetensors")
    b = files.model("b.safetensors", **{key: w.float() for key, w in weights(seed=2).items() if w.is_floating_point()})
    c = files.model("c.safetensors", **{ATTENTION: weights(seed=2)[ATTENTION].bfloat16()})
    (said,) = warned([a, b, c])
    assert "a: fp16; b: fp32; c: bf16 and fp16" in said


def test_a_component_that_one_lacks(files):
    a, b = files.model("a.safetensors"), files.model("b.safetensors", without="cond_stage_model")
    for models in ([a, b], [b, a]):
        inputs = opened(models)
        assert inputs.warnings == ["te: b.safetensors has none, so no LoRA carries it."]
        assert {layer.module.component for layer in inputs.layers} == {"unet"}
        inputs.close()


def test_layers_that_one_lacks(files):
    a, b = files.model("a.safetensors"), files.model("b.safetensors", **{ATTENTION: None})
    for models in ([a, b], [b, a]):
        (said,) = warned(models)
        assert "1 layers are not in all models (unet.input_blocks.4.1" in said
    (said,) = warned([a, files.model("c.safetensors", seed=3)], b)
    assert "1 layers are not in b.safetensors (unet.input_blocks.4.1" in said


def test_zero_terminal_snr_of_one(files):
    models = [
        files.model("a.safetensors", XL, v_pred=EMPTY),
        files.model("b.safetensors", XL, v_pred=EMPTY, ztsnr=EMPTY),
    ]
    (said,) = warned(models)
    assert said.startswith("Only b.safetensors is marked for zero terminal SNR")


def test_sd2_files_that_do_not_say_what_they_predict(files):
    plain, v = files.model("a.safetensors", SD2), files.model("b.safetensors", SD2, texts=V_PRED)
    (said,) = warned([plain, v])
    assert said.startswith("a.safetensors: the file does not say") and "v or epsilon" in said


def test_a_lora_for_v_prediction_on_a_base_that_is_not_marked(files):
    style = files.lora("style.safetensors", texts=V_PRED)
    (said,) = warned([style, files.lora("x.safetensors")], files.model("base.safetensors"))
    assert said == "style.safetensors: trained on a model of v-prediction, which base.safetensors is not marked as."


def test_loras_that_were_trained_on_other_models(files):
    base = files.model("base.safetensors", seed=0)
    own = files.lora("own.safetensors", texts={"ss_sd_model_name": "base.safetensors"})
    other = files.lora("other.safetensors", texts={"ss_sd_model_name": "C:\\models\\anime.ckpt"})
    silent = files.lora("silent.safetensors")
    (said,) = warned([own, other, silent], base)
    assert "other models than base.safetensors: other on anime.ckpt;" in said


def test_what_a_lora_brings_besides(files):
    """Norms, biases, embeddings, modules of no layer: counted, left out."""
    base = files.model("base.safetensors", seed=0)
    norm = torch.ones(len(weights()[f"{NORM}.weight"]))
    name = "lora_unet_down_blocks_1_resnets_0"
    more = {
        f"{name}_norm1.w_norm": norm, f"{name}_norm1.b_norm": norm.clone(),
        f"{name}_conv1.diff_b": torch.ones(len(weights()[CONVOLUTION])),
        "bundle_emb.cat.string_to_param.*": torch.zeros(1, 8),
        "lora_unet_nothing.lora_up.weight": torch.zeros(2, 1), "lora_unet_nothing.lora_down.weight": torch.zeros(1, 2),
    }  # fmt: skip
    said = warned([files.lora("x.safetensors", **more), files.lora("y.safetensors")], base)
    assert [text.split(":")[0] for text in said] == ["x.safetensors"] * 4
    text = " ".join(said)
    assert "1 changes of norms" in text and "2 changes of biases" in text
    assert "lora_unet_nothing" in text and "tensors of embeddings" in text


def test_a_lora_of_layers_that_a_checkpoint_lacks(files):
    base, lora = files.model("base.safetensors", seed=0), files.lora("x.safetensors")
    lacking = files.model("a.safetensors", **{ATTENTION: None})
    said = warned([lacking, lora], base)
    assert any("1 layers are not in all models" in text for text in said)
    assert any(text.startswith("x.safetensors: 1 changes of layers that not all models have") for text in said)


def test_names_that_no_list_has(tmp_path):
    for folder in ("models", "loras"):
        (tmp_path / folder).mkdir()
    files = Files(tmp_path / "models")
    files.two()
    host = FolderHost(tmp_path / "models", tmp_path / "loras")
    for name in ("../models/a.safetensors", "c.safetensors"):
        spec = HyperSpec.from_json({"models": ["a.safetensors", name], "name": "h", "ranks": "1"})
        with pytest.raises(SpecError, match="There is no model"):
            open_inputs(spec, host)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v"), ("    parameterization: v\n", "v"),
        ("    parameterization: eps\n", "epsilon"), ("    linear_start: 0.1\n    # parameterization: v\n", "epsilon"),
        ("something: else\n", ""), ("", ""), (b"\xff\xfe\x00", ""),
    ],
)  # fmt: skip
def test_what_a_configuration_says_of_prediction(files, config, kind):
    (files.folder / "a.yaml").write_bytes(config if isinstance(config, bytes) else config.encode())
    model = opened([files.model("a.safetensors", SD2), files.model("b.safetensors", SD2)])
    assert prediction.of_model(model.template) == kind
    model.close()


def test_what_a_pipelines_scheduler_says_of_prediction(files):
    inputs = opened([files.model("a.safetensors", SD2), files.model("b.safetensors", SD2)])
    scheduler = files.folder / "scheduler"
    scheduler.mkdir()
    inputs.template.file.path = files.folder
    for text, kind in (('{"prediction_type": "v_prediction"}', "v"), ('{"prediction_type": "epsilon"}', "epsilon"),
                       ("[]", ""), ("{", ""), (json.dumps({"prediction_type": None}), "")):  # fmt: skip
        (scheduler / "scheduler_config.json").write_text(text)
        assert prediction.of_model(inputs.template) == kind
    inputs.close()
