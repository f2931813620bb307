"""A LoRA laid over a checkpoint: the same layers whatever the dialect, and clear words where they do not belong."""

from __future__ import annotations

import re

import a1111
import pytest
import torch
from dialect_files import (
    ARCHITECTURES,
    DIALECTS,
    RANK,
    Layer,
    checkpoint_weights,
    diffusers,
    kohya,
    layers,
    save_distinct,
    save_lora,
    stored,
)
from models import base_weights, save_checkpoint
from safetensors.torch import save_file

from lib_hypermerge.errors import FormatError, LayoutError
from lib_hypermerge.jobs.adapter_inputs import open_lora
from lib_hypermerge.layouts.adapter_file import open_adapter
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.opening import open_checkpoint
from lib_hypermerge.layouts.reference import IDS, Outline, reference_model
from lib_hypermerge.layouts.resolve import addresses, identify

FAMILIES = tuple(ARCHITECTURES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resolve")


@pytest.fixture(scope="module")
def made(folder):
    """family -> (checkpoint, its layers)"""
    out = {}
    for family in FAMILIES:
        checkpoint = save_distinct(folder, family)
        out[family] = (checkpoint, layers(family, checkpoint))
    return out


def opened(lora, checkpoint):
    model = open_checkpoint(checkpoint)
    try:
        return open_lora(lora, model)
    finally:
        model.file.close()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_dialect_reaches_the_same_layers(made, tmp_path, family, dialect):
    checkpoint, all_layers = made[family]
    write, expected_dialect = DIALECTS[dialect]
    written = [layer for layer in all_layers if write(layer)]
    if dialect in ("bare", "lycoris"):  # says nothing of which text encoder
        written = [layer for layer in written if layer.module.component != "te2"]
    path = save_lora(tmp_path / "lora.safetensors", written, write)
    with opened(path, checkpoint) as lora:
        assert lora.file.dialect == expected_dialect
        assert (lora.resolution.unmatched, lora.file.unknown, lora.warnings) == ([], [], [])
        found = {(t.module.component, t.module.path): (e, t) for e, t in lora.resolution.targets}
        assert found.keys() == {layer.place for layer in written}
        assert len(lora.resolution.targets) == len(written) > 100
        for layer in written:
            entry, target = found[layer.place]
            assert (target.start, target.stop, target.swapped) == (0, len(layer.up), False)
        for layer in written[::7]:
            entry, target = found[layer.place]
            change = lora.load(entry).change(torch.zeros(target.module.weight.shape, dtype=torch.float64))
            assert torch.allclose(change, layer.delta.reshape(change.shape), rtol=1e-12, atol=1e-12)
        assert identify(lora.file)[0] == ARCHITECTURES[family] or dialect == "attention processors"


def renamed(tensors: dict[str, torch.Tensor], pattern: str, to: str) -> dict[str, torch.Tensor]:
    return {re.sub(pattern, to, key): tensor for key, tensor in tensors.items()}


def test_some_unmatched_modules_are_named(made, tmp_path):
    checkpoint, all_layers = made["sd15"]
    path = save_lora(tmp_path / "a.safetensors", all_layers, kohya)
    strange = renamed(stored(path), "_mid_block_", "_other_block_")
    strange["what.is.this"] = torch.ones(3)
    save_file(strange, path)
    with opened(path, checkpoint) as lora:
        names = {key.split(".")[0] for key in strange if "_other_block_" in key}
        assert set(lora.resolution.unmatched) == names
        assert len(lora.resolution.targets) == len(all_layers) - len(names)
        assert lora.file.unknown == ["what.is.this"]
        assert str(len(names)) in lora.warnings[0] and "what.is.this" in lora.warnings[1]


@pytest.mark.parametrize(
    ("lora_family", "checkpoint_family", "cause"),
    [
        ("sdxl", "sd15", "Stable Diffusion XL"),
        ("sdxl", "sd21", "Stable Diffusion XL"),
        ("sd15", "sdxl", "Stable Diffusion 1"),
        ("sd21", "sdxl", "Stable Diffusion 2"),
        ("sd21", "sd15", "Stable Diffusion 2"),
        ("sd15", "sd21", "Stable Diffusion 1"),
    ],
)
@pytest.mark.parametrize("write", [kohya, diffusers])
def test_a_lora_for_another_architecture_is_named(made, tmp_path, lora_family, checkpoint_family, cause, write):
    path = save_lora(tmp_path / "a.safetensors", made[lora_family][1], write)
    with pytest.raises(LayoutError) as caught:
        opened(path, made[checkpoint_family][0])
    assert cause in caught.value.why + caught.value.hint
    assert "a.safetensors" in caught.value.what


def test_mostly_strange_names_are_refused(made, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", made["sd15"][1], kohya)
    save_file(renamed(stored(path), "lora_unet_", "lora_unet_some_"), path)
    with pytest.raises(LayoutError, match=r"of 354 modules of a\.safetensors have no layer.*lora_unet_some_"):
        opened(path, made["sd15"][0])


def without(checkpoint, start, tmp_path):
    weights = {key: w for key, w in checkpoint_weights(checkpoint).items() if not key.startswith(start)}
    return save_checkpoint(tmp_path / "part.safetensors", weights)


def test_modules_for_an_absent_text_encoder_are_told_apart(made, tmp_path):
    all_layers = made["sdxl"][1]
    path = save_lora(tmp_path / "a.safetensors", all_layers, kohya)
    part = without("sdxl", "conditioner.embedders.1.", tmp_path)
    with opened(path, part) as lora:
        absent = {layer.module.name for layer in all_layers if layer.module.component == "te2"}
        assert set(lora.resolution.absent["te2"]) == absent
        assert lora.resolution.unmatched == []
        assert len(lora.warnings) == 1 and "te2" in lora.warnings[0]


def test_a_lora_of_absent_text_encoders_alone_is_refused(made, tmp_path):
    text = [layer for layer in made["sd15"][1] if layer.module.component == "te"]
    path = save_lora(tmp_path / "a.safetensors", text, kohya)
    with pytest.raises(LayoutError, match="changes only te, which this checkpoint does not bring along"):
        opened(path, without("sd15", "cond_stage_model.", tmp_path))


def few(made) -> list[Layer]:
    return made["sd15"][1][:6]


def broken(made, tmp_path, change) -> str:
    """The text of the error for a LoRA of six modules that somebody damaged."""
    path = save_lora(tmp_path / "a.safetensors", few(made), kohya)
    tensors = stored(path)
    change(tensors, few(made)[2])
    save_file(tensors, path)
    with pytest.raises((FormatError, LayoutError)) as caught:
        opened(path, made["sd15"][0])
    assert few(made)[2].module.name in str(caught.value)
    assert "a.safetensors" in str(caught.value)
    return str(caught.value)


def test_half_a_module_is_refused(made, tmp_path):
    text = broken(made, tmp_path, lambda t, layer: t.pop(f"{layer.module.name}.lora_up.weight"))
    assert "lacks lora_up.weight" in text


def test_ranks_that_disagree_are_refused(made, tmp_path):
    def change(tensors, layer):
        key = f"{layer.module.name}.lora_down.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key]])

    assert f"lora_down.weight is [{2 * RANK}" in broken(made, tmp_path, change)


def test_shapes_that_fit_no_weight_are_refused(made, tmp_path):
    def change(tensors, layer):
        key = f"{layer.module.name}.lora_down.weight"
        tensors[key] = torch.cat([tensors[key], tensors[key]], 1)

    text = broken(made, tmp_path, change)
    assert "does not fit" in text and str(list(few(made)[2].module.weight.shape)) in text


def test_parts_of_no_family_are_refused(made, tmp_path):
    def change(tensors, layer):
        del tensors[f"{layer.module.name}.lora_up.weight"]
        del tensors[f"{layer.module.name}.lora_down.weight"]
        tensors[f"{layer.module.name}.bm.weight"] = torch.ones(2)

    assert "bm.weight" in broken(made, tmp_path, change)


def test_a_layer_named_twice_is_refused(made, tmp_path):
    def change(tensors, layer):
        tensors |= {key: tensor.clone() for key, tensor in diffusers(layer).items()}

    assert "twice" in broken(made, tmp_path, change)


def test_alpha_zero_is_told(made, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", few(made), kohya)
    tensors = stored(path)
    name = few(made)[2].module.name
    tensors[f"{name}.alpha"] = torch.tensor(0.0)
    save_file(tensors, path)
    with opened(path, made["sd15"][0]) as lora:
        assert lora.warnings == [f"a.safetensors: 1 modules have alpha 0, such as {name}: they change nothing."]


def test_a_missing_alpha_is_told_and_a_scale_of_one(made, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", few(made), kohya)
    save_file({key: t for key, t in stored(path).items() if not key.endswith(".alpha")}, path)
    with opened(path, made["sd15"][0]) as lora:
        assert [lora.load(entry).scale for entry, _ in lora.resolution.targets] == [1.0] * 6
        (told,) = lora.warnings
        assert "6 modules have no alpha" in told and "taken to be the rank" in told


def test_a_wrong_size_in_a_lora_for_this_architecture_does_not_name_it_as_another(made, tmp_path):
    def change(tensors, layer):
        key = f"{layer.module.name}.lora_up.weight"
        tensors[key] = torch.cat((tensors[key], tensors[key][:1]))

    message = broken(made, tmp_path, change)
    assert "does not fit" in message and "Choose the kind of checkpoint" in message and "may be for" not in message


def test_a_quantised_module_is_refused(made, tmp_path):
    def change(tensors, layer):
        key = f"{layer.module.name}.lora_up.weight"
        tensors[key] = tensors[key].to(torch.int8)

    assert "stored as I8" in broken(made, tmp_path, change)


@pytest.mark.parametrize(
    ("alpha", "message"), [(torch.ones(2), "no single number"), (torch.tensor(float("nan")), "alpha nan")]
)
def test_an_alpha_that_is_no_number_is_refused(made, tmp_path, alpha, message):
    def change(tensors, layer):
        tensors[f"{layer.module.name}.alpha"] = alpha

    assert message in broken(made, tmp_path, change)


def test_an_alpha_that_is_an_integer_is_read(made, tmp_path):
    path = save_lora(tmp_path / "a.safetensors", few(made)[:1], kohya)
    tensors = stored(path)
    tensors[f"{few(made)[0].module.name}.alpha"] = torch.tensor(2 * RANK)
    save_file(tensors, path)
    with opened(path, made["sd15"][0]) as lora:
        assert [lora.load(entry).scale for entry, _ in lora.resolution.targets] == [2.0]


@pytest.mark.parametrize("magnitudes", [False, True])
def test_a_plain_lora_on_an_inpainting_model_changes_the_first_channels(made, tmp_path, magnitudes):
    """As AUTOMATIC1111 pads it; with magnitudes per input channel, each channel by itself."""
    weights = base_weights("sd15_inpainting")
    checkpoint = save_checkpoint(tmp_path / "inpainting.safetensors", weights)
    (first,) = (layer for layer in made["sd15"][1] if layer.module.path == "input_blocks.0.0")
    path = save_lora(tmp_path / "a.safetensors", [first, *few(made)], kohya)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    weight = weights[key].double()
    expected = torch.zeros_like(weight)
    expected[:, :4] = first.delta
    if magnitudes:
        m = torch.tensor([1.0, 2.0, 3.0, 4.0])
        save_file(stored(path) | {f"{first.module.name}.dora_scale": m.reshape(1, 4, 1, 1)}, path)
        V = weight[:, :4] + first.delta
        V = V * (m / V.square().sum((0, 2, 3)).sqrt()).reshape(1, 4, 1, 1)
        expected[:, :4] = V - weight[:, :4]
    with opened(path, checkpoint) as lora:
        (entry,) = (e for e, t in lora.resolution.targets if t.module.path == "input_blocks.0.0")
        adapter = lora.load(entry)
        assert torch.allclose(adapter.change(weight), expected, atol=1e-9)
        assert adapter.family == ("dora" if magnitudes else "lora")
        low = adapter.low_rank()
        assert (low is None) == magnitudes
        if low is not None:
            product = low.scale * low.up.double() @ low.down.double()
            assert torch.allclose(product.reshape(expected.shape), expected, atol=1e-5)
        assert lora.warnings == [
            "a.safetensors: input_blocks.0.0 has 9 input channels here, 4 of which the LoRA knows; "
            "the others stay as they are."
        ]


# --- what it was made for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", IDS)
def test_the_references_own_names_identify_them(architecture, tmp_path):
    """At full width, from names and shapes alone; a few modules suffice."""
    model = reference_model(architecture)
    assert model.architecture.id == architecture
    tensors = {}
    for module in list(model.components["unet"].values())[::9]:
        if module.name and module.weight and len(module.weight.shape) > 1:
            n, *rest = module.weight.shape
            tensors[f"{module.name}.lora_up.weight"] = torch.zeros(n, 1, *(1 for _ in rest[1:]), dtype=torch.float16)
            tensors[f"{module.name}.lora_down.weight"] = torch.zeros(1, *rest, dtype=torch.float16)
    save_file(tensors, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors") as adapter:
        assert identify(adapter) == (architecture, 1.0)


@pytest.mark.parametrize(("said", "architecture"), [({"ss_v2": "True"}, "sd2"), ({"ss_v2": "False"}, "sd1")])
def test_metadata_decides_between_equal_names(made, tmp_path, said, architecture):
    attention = [layer for layer in made["sd15"][1] if ".attn1.to_q" in layer.module.path]
    path = save_lora(tmp_path / "a.safetensors", attention, kohya, **said)
    with open_adapter(path) as adapter:
        assert identify(adapter) == (architecture, 1.0)


def test_what_belongs_nowhere_is_not_identified(tmp_path):
    save_file({"lora_unet_what_is_this.lora_up.weight": torch.ones(4, 1)}, tmp_path / "a.safetensors")
    with open_adapter(tmp_path / "a.safetensors") as adapter:
        assert identify(adapter) == (None, 0.0)


@pytest.mark.parametrize("architecture", IDS)
def test_no_two_layers_share_an_address(architecture):
    """Whoever says the component reaches every layer under its kohya name."""
    model = reference_model(architecture)
    names = addresses(model)
    for modules in model.components.values():
        for module in modules.values():
            if module.name and module.weight:
                assert names[module.name.removeprefix("lora_")].module == module


@pytest.mark.parametrize("family", FAMILIES)
def test_names_that_a1111_knows_mean_the_same_here(family):
    """Every address that its rule answers to, answered alike."""
    weights = [key for key in checkpoint_weights(family) if not key.startswith("first_stage_model.")]
    shapes = {key: tuple(checkpoint_weights(family)[key].shape) for key in weights}
    model = recognise(Outline(family, shapes))
    known = 0
    host = a1111.host_layers(weights)
    for name, target in addresses(model).items():
        found = a1111.resolve(f"lora_{name}", host)
        if found is not None:
            path, part = found
            stem = re.sub(r"\.?(in_proj_)?weight$", "", target.module.weight.name)
            assert (stem, target.module.part or "") == (path, part), name
            known += 1
    assert known > 600
