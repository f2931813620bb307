"""Any family to a plain LoRA: exactly where it is of low rank, else at a rank or an energy with the error measured."""

import functools

import numpy as np
import pytest
import torch
from adapter_samples import SAMPLES, Dice
from convert_files import convert, deltas, diffusers_names, layers, load, refusal, same_bits, save
from models import base_weights, save_checkpoint

from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import CONV, LINEAR, NORM

LOW_RANK = ("lora", "locon_cp", "loha", "loha_cp", "lokr")
NEED_WEIGHT = ("ia3", "dora_input", "dora_output", "glora", "oft")


@functools.cache
def chosen() -> dict[str, object]:
    """A linear layer, a 1×1 and a 3×3 convolution, a text encoder's layer, each large enough for rank 9."""
    found = layers("sd15", 16)
    paths = ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_in",
             "input_blocks.4.0.in_layers.2", "encoder.layers.0.mlp.fc1")  # fmt: skip
    return {path: next(m for m in found if m.path == path) for path in paths}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    weights = base_weights("sd15", 16)
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors", weights)


def weight_of(checkpoint, module) -> torch.Tensor:
    with open_tensors(checkpoint) as file:
        info = recognise(file).components[module.component][module.path].weight
        return file.read(info).double()


def sample(family: str, seed: int = 0):
    """(a file's tensors, module name → W ↦ ΔW) of a family on the chosen layers."""
    tensors, changes = {}, {}
    for i, module in enumerate(chosen().values()):
        parts, change = SAMPLES[family](tuple(module.weight.shape), Dice(seed + i))
        tensors |= {f"{module.name}.{part}": t.clone() for part, t in parts.items()}
        changes[module.name] = change
    return tensors, changes


def wanted(changes, checkpoint) -> dict[str, torch.Tensor]:
    modules = {m.name: m for m in chosen().values()}
    return {name: change(weight_of(checkpoint, modules[name])).flatten(1) for name, change in changes.items()}


def miss(made: dict, goal: dict) -> float:
    error2 = sum(float((made[name] - goal[name]).square().sum()) for name in goal)
    return (error2 / sum(float(delta.square().sum()) for delta in goal.values())) ** 0.5


@pytest.mark.parametrize("family", LOW_RANK)
def test_what_is_of_low_rank_becomes_a_lora_exactly(tmp_path, checkpoint, family):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    with_base = ["--checkpoint", checkpoint] if family != "lora" else []
    answer = convert(source, tmp_path / "b", "--family", "lora", "--dtype", "fp32", *with_base)
    made, goal = deltas(load(tmp_path / "b.safetensors")), wanted(changes, checkpoint)
    assert made.keys() == goal.keys()
    assert miss(made, goal) < 1e-6
    assert answer["relative_error"] < 1e-6
    if family == "lora":
        assert same_bits({k: t for k, t in load(tmp_path / "b.safetensors").items() if "alpha" in k},
                         {k: t for k, t in tensors.items() if "alpha" in k})  # fmt: skip


@pytest.mark.parametrize("family", [*NEED_WEIGHT, "full", "lokr_full"])
def test_other_families_are_cut_to_a_rank_and_the_error_is_measured(tmp_path, checkpoint, family):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    answer = convert(source, tmp_path / "b", "--family", "lora", "--rank", 6, "--dtype", "fp32", "--checkpoint",
                     checkpoint)  # fmt: skip
    made, goal = deltas(load(tmp_path / "b.safetensors")), wanted(changes, checkpoint)
    assert miss(made, goal) == pytest.approx(answer["relative_error"], rel=1e-3, abs=1e-6)
    best2 = sum(np.square(np.linalg.svd(d.numpy(), compute_uv=False)[6:]).sum() for d in goal.values())
    whole2 = sum(float(d.square().sum()) for d in goal.values())
    assert answer["relative_error"] <= 1.01 * (best2 / whole2) ** 0.5 + 1e-6
    assert set(answer["components"]) == {"unet", "te"}


@pytest.mark.parametrize("family", ["full", "dora_output", "loha", "lora"])
@pytest.mark.parametrize("energy", [0.5, 0.9])
def test_an_energy_is_retained_in_every_layer_with_no_rank_to_spare(tmp_path, checkpoint, family, energy):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "b", "--family", "lora", "--energy", energy, "--dtype", "fp32", "--checkpoint",
            checkpoint)  # fmt: skip
    stored = load(tmp_path / "b.safetensors")
    made = deltas(stored)
    for name, delta in wanted(changes, checkpoint).items():
        left = float((made[name] - delta).square().sum() / delta.square().sum())
        rank = len(stored[f"{name}.lora_down.weight"])
        S2 = np.square(np.linalg.svd(delta.numpy(), compute_uv=False))
        assert left <= 1 - energy + 1e-3
        assert S2[: rank - 1].sum() < energy * S2.sum() * (1 + 1e-4)


def test_a_rank_cuts_loras_that_are_larger_and_keeps_the_others(tmp_path):
    tensors, _ = sample("lora")
    source = save(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "same", "--family", "lora", "--rank", 3)
    assert same_bits(load(tmp_path / "same.safetensors"), tensors)
    answer = convert(source, tmp_path / "less", "--family", "lora", "--rank", 2, "--dtype", "fp32")
    made, goal = deltas(load(tmp_path / "less.safetensors")), deltas(tensors)
    assert miss(made, goal) == pytest.approx(answer["relative_error"], rel=1e-4)
    assert answer["ranks"] == {"2": 4}


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_family_may_change_with_the_dialect(tmp_path, checkpoint, to):
    tensors, changes = sample("dora_output")
    source = save(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "b", "--family", "lora", "--rank", 8, "--to", to, "--checkpoint", checkpoint)
    middle = tmp_path / ("b" if to == "peft" else "b.safetensors")
    convert(middle, tmp_path / "c", "--checkpoint", checkpoint)
    straight = convert(source, tmp_path / "d", "--family", "lora", "--rank", 8, "--checkpoint", checkpoint)
    assert same_bits(load(tmp_path / "c.safetensors"), load(tmp_path / "d.safetensors"))
    assert 0 < straight["relative_error"] < 1


def test_spectral_shifts_become_a_lora(tmp_path, checkpoint):
    tensors, goal = {}, {}
    for i, module in enumerate(chosen().values()):
        W = weight_of(checkpoint, module).flatten(1)
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        delta = 0.1 * torch.randn(len(S), generator=torch.Generator().manual_seed(i))
        goal[module.name] = (U * ((S + delta).clamp_min(0) - S)) @ Vh
        path = {"unet": "unet", "te": "text_encoder"}[module.component]
        tensors[f"{path}.{dict_name(module)}.delta"] = delta
    norm = next(m for m in layers("sd15", 16) if m.kind == NORM and m.component == "unet")
    tensors[f"unet.{dict_name(norm)}.delta"] = torch.tensor([0.25])
    source = save(tmp_path / "spectral_shifts.safetensors", tensors)
    answer = convert(source, tmp_path / "b", "--family", "lora", "--rank", 20, "--dtype", "fp32", "--checkpoint",
                     checkpoint)  # fmt: skip
    stored = load(tmp_path / "b.safetensors")
    made = deltas(stored)
    assert made.keys() == goal.keys()
    assert miss(made, goal) == pytest.approx(answer["relative_error"], rel=1e-2, abs=1e-5)
    assert answer["relative_error"] < 0.7
    W = weight_of(checkpoint, norm)  # of one row: its only singular value is its length
    assert torch.allclose(stored[f"{norm.name}.w_norm"].double(), 0.25 * W / W.norm(), atol=1e-6)
    assert not stored[f"{norm.name}.b_norm"].any()
    assert "no words for" in refusal(source, tmp_path / "c")["what"]


def dict_name(module) -> str:
    return diffusers_names("sd15", module)[0][0].split(".", 1)[1]


# --- magnitudes -------------------------------------------------------------------------------------------------------


def magnitude_form(stored: dict, name: str, W: torch.Tensor) -> torch.Tensor:
    """W' of a DoRA as LyCORIS defines it, from the tensors of a kohya file, float64."""
    up, down = stored[f"{name}.lora_up.weight"].double(), stored[f"{name}.lora_down.weight"].double()
    scale = float(stored[f"{name}.alpha"]) / len(down)
    V = W + (scale * up.flatten(1) @ down.flatten(1)).reshape(W.shape)
    m = stored[f"{name}.dora_scale"].double()
    axis = 0 if m.shape[0] == W.shape[0] else 1
    others = [i for i in range(W.dim()) if i != axis]
    return m * V / V.square().sum(others, keepdim=True).sqrt()


@pytest.mark.parametrize(("family", "axis"), [("dora_output", "input"), ("dora_input", "output")])
def test_magnitudes_move_to_the_other_axis_and_the_error_is_measured(tmp_path, checkpoint, family, axis):
    tensors, changes = sample(family)
    source = save(tmp_path / "a.safetensors", tensors)
    answer = convert(source, tmp_path / "b", "--dora-axis", axis, "--rank", 8, "--checkpoint", checkpoint)
    stored, goal = load(tmp_path / "b.safetensors"), wanted(changes, checkpoint)
    made = {}
    for module in chosen().values():
        W = weight_of(checkpoint, module)
        m = stored[f"{module.name}.dora_scale"]
        assert m.shape == tuple(W.shape[i] if i == (1 if axis == "input" else 0) else 1 for i in range(W.dim()))
        made[module.name] = (magnitude_form(stored, module.name, W) - W).flatten(1)
    assert miss(made, goal) == pytest.approx(answer["relative_error"], rel=1e-2)
    plain = convert(source, tmp_path / "c", "--family", "lora", "--rank", 8, "--checkpoint", checkpoint)
    assert answer["relative_error"] < plain["relative_error"]  # magnitudes of one's own are worth something


@pytest.mark.parametrize(("family", "axis"), [("dora_output", "input"), ("dora_input", "output")])
def test_where_all_magnitudes_are_one_factor_the_other_axis_says_the_same(tmp_path, checkpoint, family, axis):
    tensors, _ = sample(family)
    for module in chosen().values():  # 1.5 · ‖V‖, so W' = 1.5·V
        W = weight_of(checkpoint, module)
        up, down = (tensors[f"{module.name}.lora_{end}.weight"].double().flatten(1) for end in ("up", "down"))
        V = W + (2 / 3 * up @ down).reshape(W.shape)
        kept = 0 if family == "dora_output" else 1
        norms = V.square().sum([i for i in range(W.dim()) if i != kept], keepdim=True).sqrt()
        tensors[f"{module.name}.dora_scale"] = (1.5 * norms).float()
    source = save(tmp_path / "a.safetensors", tensors)
    answer = convert(source, tmp_path / "b", "--dora-axis", axis, "--checkpoint", checkpoint)
    assert answer["relative_error"] < 1e-6 and answer["methods"] == {"the same factors": 4}
    stored = load(tmp_path / "b.safetensors")
    for key, tensor in tensors.items():
        assert key.endswith("dora_scale") or torch.equal(stored[key], tensor)
    for module in chosen().values():
        W = weight_of(checkpoint, module)
        before, after = (magnitude_form(t, module.name, W) for t in (tensors, stored))
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-7)


def test_magnitudes_that_stand_right_are_carried(tmp_path, checkpoint):
    tensors, _ = sample("dora_input")
    source = save(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "b", "--dora-axis", "input")
    assert same_bits(load(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_dora_over_output_rows_goes_there_and_back(tmp_path, checkpoint, to):
    tensors, _ = sample("dora_output")
    source = save(tmp_path / "a.safetensors", tensors)
    convert(source, tmp_path / "b", "--to", to)
    convert(tmp_path / ("b" if to == "peft" else "b.safetensors"), tmp_path / "c")
    assert same_bits(load(tmp_path / "c.safetensors"), tensors)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NEED_WEIGHT)
def test_a_family_that_depends_on_the_weights_is_refused_without_them(tmp_path, family):
    source = save(tmp_path / "a.safetensors", sample(family)[0])
    error = refusal(source, tmp_path / "b", "--family", "lora", "--rank", 4)
    assert "depends on the checkpoint" in error["what"] and "Name the checkpoint" in error["hint"]
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("family", ["full", "dora_input"])
def test_what_is_not_of_low_rank_needs_a_rank_or_an_energy(tmp_path, checkpoint, family):
    source = save(tmp_path / "a.safetensors", sample(family)[0])
    error = refusal(source, tmp_path / "b", "--family", "lora", "--checkpoint", checkpoint)
    assert "not of low rank" in error["what"] and "energy" in error["hint"]


@pytest.mark.parametrize("family", [f for f in SAMPLES if f not in ("lora", "dora_output")])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_families_that_a_dialect_has_no_words_for_are_refused(tmp_path, family, to):
    source = save(tmp_path / "a.safetensors", sample(family)[0])
    error = refusal(source, tmp_path / "b", "--to", to)
    assert error["code"] == "bad_request" and ("no words" in error["what"] or "input channels" in error["what"])


def test_axes_are_refused_where_they_make_no_sense(tmp_path, checkpoint):
    plain = save(tmp_path / "a.safetensors", sample("lora")[0])
    assert "no DoRA" in refusal(plain, tmp_path / "b", "--dora-axis", "input")["what"]
    turned = save(tmp_path / "d.safetensors", sample("dora_output")[0])
    assert "weights" in refusal(turned, tmp_path / "b", "--dora-axis", "input")["what"]
    more = ["--checkpoint", checkpoint, "--dora-axis", "input"]
    assert "no DoRA over input" in refusal(turned, tmp_path / "b", *more, "--to", "peft")["what"]
    assert "no magnitudes" in refusal(turned, tmp_path / "b", *more, "--family", "lora")["what"]


def test_a_linear_layer_and_a_convolution_are_among_the_samples():
    assert {module.kind for module in chosen().values()} >= {LINEAR, CONV}
