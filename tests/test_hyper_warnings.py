"""hyper: what is odd about models, and what is made of it, is said; the merge goes on."""

from __future__ import annotations

import json

import pytest
import torch
from hyper_models import EMPTY, SD2, V_PRED, XL, Files, opened, warned, weights
from models import ATTENTION, CONVOLUTION, NORM

from lib_hypermerge.errors import SpecError
from lib_hypermerge.hosts.standalone import FolderHost
from lib_hypermerge.jobs.hyper import prediction
from lib_hypermerge.jobs.hyper.inputs import open_inputs
from lib_hypermerge.jobs.hyper.spec import HyperSpec


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


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
