"""What no LoRA carries: each tensor of the hyper-model is the mean, one model's own, or the template's, as foretold."""

import re

import pytest
import torch
from models import NORM, base_weights, is_vae, rank_change, save_checkpoint, tuned_weights
from safetensors.torch import load_file, save_file

from lib_hypermerge.errors import NumericalError, SpecError
from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.hyper.inputs import open_inputs
from lib_hypermerge.jobs.hyper.rest_values import RestValues
from lib_hypermerge.jobs.hyper.rests import MEASURED, plan_rests, tensor_plans
from lib_hypermerge.jobs.hyper.spec import HyperSpec

BIAS = "model.diffusion_model.input_blocks.4.0.in_layers.2.bias"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
VAE = "first_stage_model.encoder.conv_in.weight"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
LAYER = "model.diffusion_model.input_blocks.4.1.proj_in"


_KEPT = re.compile(r"input_blocks\.[014]\.|layers\.0\.|resblocks\.[03]\.|embedding|final|first_stage_model")


def few_layers(weights):
    """A checkpoint that is recognised, and looked through in no time."""
    return {key: weight for key, weight in weights.items() if _KEPT.search(key)}


def anything_changes(strength=0.05):
    """Every float tensor outside the VAE, norms and biases too."""
    low_rank = rank_change(2)

    def change(key, weight, generator):
        if not weight.is_floating_point() or is_vae(key):
            return None
        delta = low_rank(key, weight, generator)
        return strength * torch.randn(weight.shape, generator=generator) if delta is None else delta

    return change


@pytest.fixture(scope="module")
def family():
    base = few_layers(base_weights("sd15", 64))
    return [base, *(tuned_weights(base, anything_changes(), seed) for seed in (1, 2, 3))]


def save(folder, models, dtypes=(torch.float32,) * 4):
    paths = []
    for name, weights, dtype in zip("abcd", models, dtypes, strict=False):
        cast = {k: w.to(dtype) if w.is_floating_point() else w for k, w in weights.items()}
        paths.append(save_checkpoint(folder / f"{name}.safetensors", cast))
    return paths


def look(paths, **options):
    """(template's weights, models' weights, name → (rest, value), warnings, names of layers)."""
    spec = HyperSpec.from_json(
        {"models": [str(p) for p in paths], "name": "x", "ranks": "2"}
        | {k: v if v is True else str(v) for k, v in options.items()}
    )
    inputs = open_inputs(spec, PathHost())
    try:
        rests = plan_rests(inputs, spec, PathHost())
        values = RestValues(inputs, spec, rests)
        out = {rest.name: (rest, values.value(rest)) for rest in rests}
        plans = tensor_plans(inputs, spec)
        assert list(plans) == [i.name for i in sorted(inputs.template.file.tensors.values(), key=lambda i: i.offset)]
        assert all(plans[name].dtype == rest.dtype for name, (rest, _) in out.items())
        layers = {layer.module.weight.name for layer in inputs.layers}
        assert out.keys() | layers == plans.keys() and not out.keys() & layers
    finally:
        inputs.close()
    return out, values.warnings


def mean_of(models, name, weights=None):
    weights = weights or [1] * len(models)
    return sum(w * model[name].double() for w, model in zip(weights, models, strict=True)) / sum(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_and_errors_are_those_of_the_definition(tmp_path, family, dtype):
    paths = save(tmp_path, family[1:], (dtype,) * 3)
    models = [load_file(path) for path in paths]
    found, warnings = look(paths)
    assert not warnings
    for name, (_, value) in found.items():
        if not models[0][name].is_floating_point() or name == VAE:
            assert torch.equal(value.tensor, models[0][name])
            continue
        mean = mean_of(models, name)
        assert value.tensor.dtype == dtype and torch.equal(value.tensor, mean.to(dtype))
        for m, model in enumerate(models):
            own = model[name].double()
            assert value.errors[m] == pytest.approx(float((own - value.tensor.double()).square().sum()), rel=1e-9)
            assert value.changes[m] == pytest.approx(float((own - mean).square().sum()), rel=1e-9, abs=1e-20)
    kinds = {rest.kind for rest, _ in found.values()}
    assert kinds == {"norm", "bias", "embedding", "vae", "fixed"}
    assert found[f"{NORM}.weight"][0].kind == found[f"{NORM}.bias"][0].kind == "norm"
    assert (found[BIAS][0].kind, found[TOKENS][0].kind, found[POSITIONS][0].kind) == ("bias", "embedding", "fixed")
    assert found[BIAS][0].label == "unet.input_blocks.4.0.in_layers.2.bias"


def test_mixed_formats_and_weights(tmp_path, family):
    paths = save(tmp_path, family[1:], (torch.float16, torch.float32, torch.bfloat16))
    models = [load_file(path) for path in paths]
    found, _ = look(paths, weights="2,1,1", model_dtype="fp32")
    for name in (f"{NORM}.weight", BIAS, TOKENS):
        assert torch.equal(found[name][1].tensor, mean_of(models, name, [2, 1, 1]).float())
    assert found[POSITIONS][1].tensor.dtype == torch.int64


def test_models_that_agree_give_their_own_bits(tmp_path, family):
    paths = save(tmp_path, [family[1]] * 3)
    models = load_file(paths[0])
    found, warnings = look(paths, weights="0.3,0.3,0.1")
    assert not warnings
    for name, (_, value) in found.items():
        assert torch.equal(value.tensor, models[name])
        assert not value.errors.any() and not value.changes.any()


def test_the_rest_of_one_model(tmp_path, family):
    paths = save(tmp_path, family[1:])
    models = [load_file(path) for path in paths]
    found, _ = look(paths, rest_from=paths[1])
    for name, (rest, value) in found.items():
        if rest.kind in MEASURED:
            assert torch.equal(value.tensor, models[1][name])
            for m, model in enumerate(models):
                distance = float((model[name].double() - models[1][name].double()).square().sum())
                assert value.errors[m] == pytest.approx(distance, rel=1e-9)


def test_with_a_base_changes_count_from_it_and_means_are_the_models(tmp_path, family):
    paths = save(tmp_path, family)
    base, *models = (load_file(path) for path in paths)
    found, _ = look(paths[1:], base=paths[0])
    for name in (f"{NORM}.weight", BIAS, TOKENS):
        value = found[name][1]
        assert torch.equal(value.tensor, mean_of(models, name).float())
        for m, model in enumerate(models):
            assert value.changes[m] == pytest.approx(float((model[name].double() - base[name].double()).square().sum()))
    found, _ = look(paths[1:], base=paths[0], rest_from=paths[0], vae_from=paths[0])
    for name, (_, value) in found.items():
        assert torch.equal(value.tensor, base[name])


def test_where_loras_alone_are_written_the_base_is_what_they_stand_on(tmp_path, family):
    paths = save(tmp_path, with_vae(family, [0, 0.05, 0])[:2] + [family[0]])
    models = [load_file(path) for path in paths]
    found, warnings = look(paths[:2], base=paths[2], loras_only=True)
    assert not warnings
    for name, (_, value) in found.items():
        assert torch.equal(value.tensor, models[2][name])
        assert torch.equal(value.errors, value.changes)
    assert all(found[TOKENS][1].errors > 0)


def test_a_lora_brings_the_rest_of_its_base(tmp_path, family):
    paths = save(tmp_path, family)
    base, one, *_ = (load_file(path) for path in paths)
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    n, k = base["model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"].shape
    parts = {"lora_up.weight": torch.randn(n, 2), "lora_down.weight": torch.randn(2, k), "alpha": torch.tensor(2.0)}
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "l.safetensors")
    found, _ = look([paths[1], tmp_path / "l.safetensors"], base=paths[0])
    for name in (BIAS, TOKENS):
        value = found[name][1]
        assert torch.equal(value.tensor, mean_of([base, one], name).float())
        assert value.changes[1] == 0 and value.errors[1] > 0


# --- what is not alike in all models ------------------------------------------------------------------------


def test_layers_and_biases_that_a_model_lacks_are_means_of_the_others(tmp_path, family):
    less = [dict(model) for model in family[1:]]
    del less[1][f"{LAYER}.weight"], less[1][f"{LAYER}.bias"], less[2][BIAS]
    paths = save(tmp_path, less)
    found, _ = look(paths)
    rest, value = found[f"{LAYER}.weight"]
    assert rest.kind == "layer"
    for name, having in ((f"{LAYER}.weight", [0, 2]), (f"{LAYER}.bias", [0, 2]), (BIAS, [0, 1])):
        value = found[name][1]
        assert torch.equal(value.tensor, mean_of([less[m] for m in having], name).float())
        assert [bool(e) for e in value.changes] == [m in having for m in range(3)]
    found, _ = look(paths, weights="0,1,0")  # nobody who has it counts: those who have it count alike
    assert torch.equal(found[f"{LAYER}.weight"][1].tensor, mean_of([less[0], less[2]], f"{LAYER}.weight").float())


def test_fused_attention_of_one_model_alone(tmp_path):
    base = few_layers(base_weights("sd21", 64))
    models = [tuned_weights(base, anything_changes(), seed) for seed in (1, 2, 3)]
    fused = "cond_stage_model.model.transformer.resblocks.3.attn."
    paths = save(tmp_path, models)
    found, _ = look(paths)
    rest, value = found[f"{fused}in_proj_bias"]
    assert rest.kind == "bias" and rest.label == "te.transformer.resblocks.3.attn.bias"
    assert torch.equal(value.tensor, mean_of(models, rest.name).float())
    for part in ("in_proj_weight", "in_proj_bias"):
        del models[1][fused + part]
    found, _ = look(save(tmp_path, models))
    rest, value = found[f"{fused}in_proj_weight"]
    assert rest.kind == "layer" and rest.label == "te.transformer.resblocks.3.attn"
    assert torch.equal(value.tensor, mean_of([models[0], models[2]], rest.name).float())


def test_marks_and_schedules_are_the_templates_and_averages_of_weights_are_averaged(tmp_path, family):
    extra = [
        {"v_pred": torch.zeros(0), "alphas_cumprod": torch.rand(10), "model_ema.weight": torch.randn(3),
         "step": torch.tensor(m), "first_stage_model.count": torch.tensor([m])} for m in range(3)
    ]  # fmt: skip
    del extra[2]["model_ema.weight"]
    paths = save(tmp_path, [m | e for m, e in zip(family[1:], extra, strict=True)])
    found, _ = look(paths, model_dtype="fp16")
    for name in ("v_pred", "alphas_cumprod", "step", "first_stage_model.count"):
        rest, value = found[name]
        assert rest.kind == "fixed" and torch.equal(value.tensor, extra[0][name])
        assert value.tensor.dtype == extra[0][name].dtype and value.tensor.shape == extra[0][name].shape
    assert torch.equal(found["model_ema.weight"][1].tensor, mean_of(extra[:2], "model_ema.weight").half())


# --- VAEs ---------------------------------------------------------------------------------------------------


def with_vae(family, differences):
    """Models whose VAEs differ from the first one's by these shares of its norm."""
    generator, out = torch.Generator().manual_seed(5), []
    for model, share in zip(family[1:], differences, strict=True):
        noise = torch.randn(model[VAE].shape, generator=generator)
        out.append(model | {VAE: model[VAE] + share * model[VAE].norm() / noise.norm() * noise})
    return out


def test_vaes_that_are_alike_are_averaged(tmp_path, family):
    models = with_vae(family, [0, 0.005, 0])
    found, warnings = look(save(tmp_path, models))
    assert not warnings and torch.equal(found[VAE][1].tensor, mean_of(models, VAE).float())
    rounded = save(tmp_path, with_vae(family, [0, 0, 0]), (torch.float32, torch.bfloat16, torch.float16))
    found, warnings = look(rounded)
    assert not warnings and torch.equal(found[VAE][1].tensor, mean_of([load_file(p) for p in rounded], VAE).float())


def test_of_different_vaes_the_first_is_taken_and_said_so(tmp_path, family):
    models = with_vae(family, [0, 0.05, 0])
    paths = save(tmp_path, models)
    found, warnings = look(paths)
    assert torch.equal(found[VAE][1].tensor, models[0][VAE])
    assert len(warnings) == 1 and "b by 5.0 %" in warnings[0] and warnings[0].endswith("that of a.")
    found, warnings = look(paths, vae_from=paths[1])
    assert not warnings and torch.equal(found[VAE][1].tensor, models[1][VAE])


def test_models_without_a_vae_have_no_say_in_it(tmp_path, family):
    models = with_vae(family, [0, 0.004, 0.05])
    del models[2][VAE]
    found, warnings = look(save(tmp_path, models))
    assert not warnings and torch.equal(found[VAE][1].tensor, mean_of(models[:2], VAE).float())
    paths = save(tmp_path, [family[0], *({k: w for k, w in m.items() if k != VAE} for m in models)])
    found, _ = look(paths[1:], base=paths[0])
    assert torch.equal(found[VAE][1].tensor, family[0][VAE])


def test_a_vae_or_rest_that_cannot_be_taken(tmp_path, family):
    models = [dict(model) for model in family[1:]]
    del models[2][VAE]
    paths = save(tmp_path, models)
    other = save_checkpoint(tmp_path / "other.safetensors", family[0])
    for options, why in [
        ({"vae_from": paths[2]}, "no VAE of the same kind"),
        ({"vae_from": other}, "none of the models"),
        ({"rest_from": other}, "none of the models"),
        ({"rest_from": tmp_path / "absent.safetensors"}, "none of the models"),
    ]:
        with pytest.raises(SpecError, match=why):
            look(paths, **options)
    save_checkpoint(paths[2], {key: w for key, w in models[2].items() if not is_vae(key)})
    with pytest.raises(SpecError, match="so the hyper-model has none"):
        look([paths[0], paths[1]], base=paths[2], vae_from=paths[0])
    look([paths[2], paths[0]], vae_from=paths[0])  # in any order


def test_formats_are_kept_as_in_the_first_model_though_another_is_more_complete(tmp_path, family):
    poor = {key: w for key, w in family[0].items() if not is_vae(key)}
    paths = save(tmp_path, [poor, family[1]], (torch.float16, torch.float32))
    found, _ = look(paths)
    assert found[TOKENS][1].tensor.dtype == torch.float16 and found[VAE][1].tensor.dtype == torch.float32
    found, _ = look(paths[::-1])
    assert found[TOKENS][1].tensor.dtype == torch.float32 and found[VAE][1].tensor.dtype == torch.float32


# --- damage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [BIAS, TOKENS, f"{NORM}.weight", VAE])
def test_damage_names_model_and_tensor(tmp_path, family, name):
    models = [dict(model) for model in family[1:]]
    models[1][name] = models[1][name].clone()
    models[1][name].view(-1)[1] = float("nan")
    paths = save(tmp_path, models)
    with pytest.raises(NumericalError, match="NaN or Inf in b") as caught:
        look(paths)
    label = {BIAS: "in_layers.2.bias", TOKENS: "token_embedding", VAE: "conv_in"}.get(name, "in_layers.0")
    assert label in str(caught.value)


def test_numbers_that_the_format_cannot_hold(tmp_path, family):
    models = [model | {BIAS: torch.full_like(model[BIAS], 1e6)} for model in family[1:]]
    with pytest.raises(NumericalError, match="float16"):
        look(save(tmp_path, models), model_dtype="fp16")
