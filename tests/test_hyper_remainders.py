"""Remainder files: merged into the hyper-model they bring a model's norms and biases back, and say how far."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from models import base_weights, listing, run_cli, save_checkpoint, tuned_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hyper_rests import anything_changes, few_layers, save

from lib_hypermerge.errors import NumericalError
from lib_hypermerge.files.together import publish_together
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.hyper import remainders
from lib_hypermerge.jobs.hyper.inputs import open_inputs
from lib_hypermerge.jobs.hyper.remainders import Remainder
from lib_hypermerge.jobs.hyper.rest_values import RestValues
from lib_hypermerge.jobs.hyper.rests import MEASURED, plan_rests
from lib_hypermerge.jobs.hyper.spec import HyperSpec

LABELS = "abc"


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def family(request):
    base = few_layers(base_weights(request.param, 64))
    return [tuned_weights(base, anything_changes(), seed) for seed in (1, 2, 3)]


def make(folder, paths, write=True, **options):
    """(label → Remainder, label → what it restores, the hyper-model's file); the files of all are there."""
    spec = HyperSpec.from_json({"models": [str(p) for p in paths], "name": "x", "ranks": "2"} | options)
    with contextlib.ExitStack() as stack:
        inputs = open_inputs(spec, PathHost())
        stack.callback(inputs.close)
        rests = plan_rests(inputs, spec, PathHost())
        values = RestValues(inputs, spec, rests)
        found = {rest.name: (rest, values.value(rest)) for rest in rests}
        hyper = inputs.template.file.path.parent / "hyper.safetensors"
        template = load_file(inputs.template.file.path)
        save_file(template | {name: value.tensor for name, (_, value) in found.items()}, hyper)
        targets = {label: folder / f"x-{label}-rest.safetensors" for label in inputs.labels}
        made = remainders.make(inputs, spec, rests, values, targets, hyper.name, write)
        writers = [one.writer for one in made if one.writer is not None]
        assert len(writers) == (len(made) if write else 0)
        for writer in writers:
            stack.enter_context(writer)
        publish_together(writers)
    errors = sum(value.errors for rest, value in found.values() if rest.kind in MEASURED)
    restored = {one.label: one.restores(float(errors[inputs.labels.index(one.label)])) for one in made}
    return {one.label: one for one in made}, restored, hyper


def carried(key: str, weights, biases: bool) -> bool:
    """By the definition: norms with a shift; other biases where asked for, and not the parts of a fused layer.

    No WebUI has names for the norms of SD2's text encoder.
    """
    stem = key.rsplit(".", 1)[0]
    if f"{stem}.weight" not in weights or any(part in key for part in ("in_proj", "first_stage", ".ln_")):
        return False
    if weights[f"{stem}.weight"].dim() == 1:
        return f"{stem}.bias" in weights
    return biases and key.endswith(".bias")


@pytest.mark.parametrize("biases", [False, True], ids=["norms", "all"])
def test_merging_a_remainder_brings_norms_and_biases_back(tmp_path, family, biases):
    paths = save(tmp_path, family)
    made, restored, hyper_path = make(tmp_path, paths, remainders="all" if biases else "norms", dtype="fp32")
    hyper = load_file(hyper_path)
    assert made.keys() == set(LABELS)
    for label, own in zip(LABELS, family, strict=True):
        file = made[label].path
        result = run_cli(["merge", "--checkpoint", hyper_path, "--lora", file, "--out", tmp_path / "m", "--json"])
        assert result.returncode == 0, result.stderr
        merged = load_file(tmp_path / "m.safetensors")
        (tmp_path / "m.safetensors").unlink()
        error, left = 0.0, 0.0
        for key, tensor in merged.items():
            if tensor.dtype == torch.int64 or "first_stage" in key:
                continue
            is_layer = tensor.dim() >= 2 and "embedding" not in key
            before = float((own[key].double() - hyper[key].double()).square().sum())
            if carried(key, own, biases):
                assert torch.allclose(tensor, own[key], rtol=1e-6, atol=1e-7), key
            else:
                assert torch.equal(tensor, hyper[key]), key
            if not is_layer:
                error += before
                left += float((own[key].double() - tensor.double()).square().sum())
        assert restored[label] == pytest.approx(1 - left / error, abs=1e-6)
        assert 0.005 < restored[label] < 1


def test_the_file_is_one_that_webuis_load(tmp_path, family):
    paths = save(tmp_path, family, (torch.float16,) * 3)
    made, *_ = make(tmp_path, paths, remainders="norms")
    for label, one in made.items():
        with safe_open(one.path, "pt") as file:
            names, metadata = set(file.keys()), file.metadata()
            assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
        modules = {name.rsplit(".", 1)[0] for name in names}
        assert names == {f"{module}.{part}" for module in modules for part in ("w_norm", "b_norm")}
        assert len(modules) == one.modules and one.bytes == one.path.stat().st_size
        assert metadata["ss_training_comment"] == "remainder of a hyper-merge by Hypermerge"
        assert metadata["ss_sd_model_name"] == "hyper.safetensors" and metadata["ss_output_name"] == one.path.stem
        assert len(metadata["sshs_model_hash"]) == 64
        recipe = json.loads(metadata["hypermerge"])
        assert (recipe["job"], recipe["model"], recipe["modules"]) == ("hyper-remainder", label, one.modules)


def test_what_is_rounded_away_is_not_written_and_nothing_is_no_file(tmp_path, family):
    alike = [dict(family[0]) for _ in range(3)]
    norm = next(key for key in alike[0] if key.endswith("ln_final.bias") or key.endswith("in_layers.0.bias"))
    for m, model in enumerate(alike):
        model[norm] = model[norm] + 1e-9 * m  # fp16 knows no such numbers
    made, restored, _ = make(tmp_path, save(tmp_path, alike), remainders="all")
    assert made == {} and restored == {}
    assert {name for name in listing(tmp_path) if "-rest" in name or "part" in name} == set()


def test_models_without_a_file_are_told(tmp_path):
    def told(labels: str, kind: str) -> list[str]:
        spec = HyperSpec.from_json({"models": ["x", "y"], "name": "x", "ranks": "2", "remainders": kind})
        made = [Remainder(label, tmp_path / label, None) for label in labels]
        return remainders.note(made, SimpleNamespace(labels=list(LABELS)), spec)

    assert told("", "none") == told("abc", "all") == []
    assert told("b", "norms") == ["No remainder file for a and c, whose norms are those of the hyper-model."]
    (said,) = told("", "all")
    assert said.startswith("No remainder files: the models' norms and biases are those of the hyper-model")


def test_the_model_that_the_rest_was_taken_from_needs_none(tmp_path, family):
    paths = save(tmp_path, family)
    made, *_ = make(tmp_path, paths, remainders="norms", rest_from=str(paths[1]))
    assert made.keys() == {"a", "c"}


def test_a_preview_measures_the_same_and_writes_nothing(tmp_path, family):
    paths = save(tmp_path, family)
    _, expected, _ = make(tmp_path, paths, remainders="all")
    (tmp_path / "preview").mkdir()
    _, restored, _ = make(tmp_path / "preview", paths, write=False, remainders="all")
    assert restored == expected and listing(tmp_path / "preview") == {}


def test_a_change_that_the_format_cannot_hold_leaves_nothing(tmp_path, family):
    models = [dict(model) for model in family]
    norm = next(key for key in models[0] if key.endswith("in_layers.0.weight"))
    models[1][norm] = models[1][norm] + 1e6
    with pytest.raises(NumericalError, match=r"in_layers\.0 in [abc] is too large for float16"):
        make(tmp_path, save(tmp_path, models), remainders="norms")
    assert not any("-rest" in name for name in listing(tmp_path))


def test_a_layer_that_a_model_lacks_stays_out_of_its_file(tmp_path, family):
    models = [dict(model) for model in family]
    stem = next(key for key in models[0] if key.endswith("in_layers.0.weight")).removesuffix(".weight")
    del models[1][f"{stem}.weight"], models[1][f"{stem}.bias"]
    made, *_ = make(tmp_path, [save_checkpoint(p, m) for p, m in zip(save(tmp_path, models), models, strict=True)],
                    remainders="norms")  # fmt: skip
    assert made["a"].modules == made["c"].modules == made["b"].modules + 1
