"""Transfer to models with fewer blocks, numbered anew or with gaps, and to models of another width."""

from __future__ import annotations

import re
from pathlib import Path

import convert_files as files
import pipelines
import pytest
import torch
from diffusers import UNet2DConditionModel
from models import UNET, Weights, base_weights, save_checkpoint
from pipelines import ATTEND, PLAIN, WIDTHS
from safetensors.torch import load_file
from transfer_models import (
    each_matrix,
    fewer_transformer_blocks,
    noisy,
    refusal,
    renumbered,
    transfer,
    without_blocks,
)

from lib_hypermerge.jobs.transfer.pairing import PLACE, SIMILARITY, Choice, Chosen, comparable, lay
from lib_hypermerge.jobs.transfer.tree import place, tree
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.reference import Outline, reference_model

# which of SDXL's transformer blocks are left, by the path of their list; the middle has no attention, as in SSD-1B
KEPT = {
    "input_blocks.7.1": [0, 2, 5, 9], "input_blocks.8.1": [1, 3, 4, 8], "middle_block.1": [],
    "output_blocks.0.1": [0, 1, 2, 3], "output_blocks.1.1": [0, 3, 6, 9], "output_blocks.4.1": [1],
    "output_blocks.5.1": [0],
}  # fmt: skip
CHOSEN, BY_PLACE = 18, 16  # transformer blocks that are left in these lists, and in the others


def parent(name: str) -> str:
    """What the layer of a name of the pruned SDXL was called before, as kohya's files say it."""
    for path, kept in KEPT.items():
        start = f"lora_unet_{path.replace('.', '_')}_transformer_blocks_"
        if name.startswith(start):
            number, rest = name.removeprefix(start).split("_", 1)
            return f"{start}{kept[int(number)]}_{rest}"
    return name


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL, a model pruned from it as SSD-1B is and trained a little, and a LoRA of the UNet's attention."""
    folder = tmp_path_factory.mktemp("sdxl")
    base = {key: w for key, w in base_weights("sdxl").items() if not key.startswith("conditioner")}
    save_checkpoint(folder / "sdxl.safetensors", base)
    small = without_blocks(fewer_transformer_blocks(base, KEPT), "middle_block.2")
    save_checkpoint(folder / "ssd.safetensors", noisy(small, 0.1))
    lora = files.lora("sdxl", only=lambda m: m.component == "unet" and "attn" in m.path)
    files.save(folder / "style.safetensors", lora)
    return folder


def test_transformer_blocks_are_paired_by_similarity(sdxl, tmp_path):
    report = transfer(sdxl / "style.safetensors", sdxl / "sdxl.safetensors", sdxl / "ssd.safetensors", tmp_path / "new",
                      "--method", "copy", "--threshold", 0)  # fmt: skip
    assert {choice["list"]: [pair["source"] for pair in choice["pairs"]] for choice in report["choices"]} == {
        "unet.input.2.7.1.transformer_blocks": KEPT["input_blocks.7.1"],
        "unet.input.2.8.1.transformer_blocks": KEPT["input_blocks.8.1"],
        "unet.output.2.0.1.transformer_blocks": KEPT["output_blocks.0.1"],
        "unet.output.2.1.1.transformer_blocks": KEPT["output_blocks.1.1"],
        "unet.output.1.4.1.transformer_blocks": KEPT["output_blocks.4.1"],
        "unet.output.1.5.1.transformer_blocks": KEPT["output_blocks.5.1"],
    }
    assert all(pair["similarity"] > 0.8 for choice in report["choices"] for pair in choice["pairs"])
    made, style = load_file(tmp_path / "new.safetensors"), load_file(sdxl / "style.safetensors")
    names = {name.split(".")[0] for name in made}
    assert len(names) == report["modules"] == 8 * (CHOSEN + BY_PLACE)
    for name in names:  # the very numbers of the block that it came from
        for part in ("lora_up.weight", "lora_down.weight", "alpha"):
            assert torch.equal(made[f"{name}.{part}"], style[f"{parent(name)}.{part}"])
    gone = len({name.split(".")[0] for name in style}) - len(names)
    assert report["skipped_because"] == {"no layer in the target": gone} and report["unreachable"] == gone
    assert 0.3 < report["loras"][0]["arrived"] < 0.7 and report["loras"][0]["retained"] == 1
    assert report["paired"] == {"place": 8 * BY_PLACE, "similarity": 8 * CHOSEN}


def test_projected_too_a_pruned_models_lora_is_that_of_its_blocks(sdxl, tmp_path):
    transfer(sdxl / "style.safetensors", sdxl / "sdxl.safetensors", sdxl / "ssd.safetensors", tmp_path / "new",
             "--threshold", 0)  # fmt: skip
    made, style = (files.deltas(load_file(p)) for p in (tmp_path / "new.safetensors", sdxl / "style.safetensors"))
    for name, delta in made.items():
        cosine = float((delta * style[parent(name)]).sum() / delta.norm() / style[parent(name)].norm())
        assert cosine > 0.85, name


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    save_checkpoint(folder / "sd15.safetensors", base_weights())
    files.save(folder / "style.safetensors", files.lora("sd15"))
    return folder


def test_blocks_that_are_gone_as_in_bk_sdm(sd15, tmp_path):
    """Of two blocks at a resolution the first is left, of three two; names keep their gaps."""
    gone = [
        "middle_block",
        *(f"input_blocks.{i}" for i in (2, 5, 8, 11)),
        *(f"output_blocks.{i}" for i in (1, 4, 7, 10)),
    ]
    small = noisy(without_blocks(base_weights(), *gone), 0.05)
    save_checkpoint(tmp_path / "bk.safetensors", small)
    report = transfer(sd15 / "style.safetensors", sd15 / "sd15.safetensors", tmp_path / "bk.safetensors",
                      tmp_path / "new", "--method", "copy", "--threshold", 0)  # fmt: skip
    assert {choice["list"]: [pair["source"] for pair in choice["pairs"]] for choice in report["choices"]} == {
        **{f"unet.input.{i}": [3 * i + 1] for i in range(4)},
        **{f"unet.output.{3 - i}": [3 * i, 3 * i + 2] for i in range(4)},
    }
    made, style = load_file(tmp_path / "new.safetensors"), load_file(sd15 / "style.safetensors")
    assert files.same_bits(made, {key: style[key] for key in made})
    stays = {m.name for m in files.layers("sd15") if files.linear_or_conv(m)
             and (m.component == "te" or not m.path.startswith(tuple(f"{block}." for block in gone)))}  # fmt: skip
    assert {key.split(".")[0] for key in made} == stays


def test_blocks_that_a_compact_numbering_moved_to_another_resolutions_numbers(tmp_path):
    """As a network with one block at each resolution of the way in, and two on the way out, is saved."""
    base = {key: w for key, w in base_weights("sdxl").items() if not key.startswith("conditioner")}
    order = {"input_blocks": (1, 3, 5, 6, 7), "output_blocks": (0, 2, 3, 5, 7, 8)}
    first = {"input_blocks": 1, "output_blocks": 0}
    numbers = {f"{side}.{old}": f"{side}.{first[side] + new}"
               for side, left in order.items() for new, old in enumerate(left)}  # fmt: skip
    gone = [f"input_blocks.{i}" for i in (2, 4, 8)] + [f"output_blocks.{i}" for i in (1, 4, 6)]
    save_checkpoint(tmp_path / "sdxl.safetensors", base)
    save_checkpoint(tmp_path / "small.safetensors", noisy(renumbered(without_blocks(base, *gone), numbers), 0.05))
    style = files.lora("sdxl", only=lambda m: m.component == "unet" and ("proj" in m.path or "op" in m.path or
                                                                         "attn1.to_q" in m.path))  # fmt: skip
    files.save(tmp_path / "style.safetensors", style)
    report = transfer(tmp_path / "style.safetensors", tmp_path / "sdxl.safetensors", tmp_path / "small.safetensors",
                      tmp_path / "new", "--method", "copy", "--threshold", 0)  # fmt: skip
    made = load_file(tmp_path / "new.safetensors")
    back = {
        f"lora_unet_{new.replace('.', '_')}_": f"lora_unet_{old.replace('.', '_')}_" for old, new in numbers.items()
    }
    for key, tensor in made.items():
        start = next((new for new in back if key.startswith(new)), None)
        assert torch.equal(tensor, style[key if start is None else back[start] + key.removeprefix(start)]), key
    assert report["similarity"] > 0.9 and report["modules"] == len(files.deltas(made)) > 60


STUDENTS = {
    "base": {}, "small": {"mid_block_type": None}, "tiny": {"mid_block_type": None, "down_block_types": [ATTEND] * 3},
}  # fmt: skip


def student(kind: str, teacher: dict[str, torch.Tensor]) -> UNet2DConditionModel:
    """BK-SDM's networks in diffusers' own form, with the teacher's weights: one block at each resolution on the way
    in, the first and the last of three on the way out, "small" without the middle, "tiny" without the innermost too."""
    downs = STUDENTS[kind].get("down_block_types", [ATTEND] * 3 + [PLAIN])
    more = {"mid_block_type": "UNetMidBlock2DCrossAttn", **STUDENTS[kind], "down_block_types": downs}
    network = UNet2DConditionModel(
        block_out_channels=WIDTHS[: len(downs)], up_block_types=[b.replace("Down", "Up") for b in reversed(downs)],
        layers_per_block=1, cross_attention_dim=24, attention_head_dim=8, **more,
    )  # fmt: skip
    network.load_state_dict({key: teacher[taught(key, 4 - len(downs))] for key in network.state_dict()})
    return network


def taught(key: str, fewer: int = 0) -> str:
    """The teacher's name of a student's layer."""
    match = re.fullmatch(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", key)
    if match:
        return f"up_blocks.{int(match[1]) + fewer}.{match[2]}.{2 * int(match[3])}.{match[4]}"
    return re.sub(r"^up_blocks\.(\d)", lambda m: f"up_blocks.{int(m[1]) + fewer}", key)


@pytest.mark.parametrize("kind", STUDENTS)
def test_students_in_diffusers_own_folders(tmp_path, kind):
    torch.manual_seed(0)
    teacher = pipelines.unet("sd1")
    pipelines.save(tmp_path / "teacher", {"unet": teacher})
    network = student(kind, teacher.state_dict())
    pipelines.save(tmp_path / "student", {"unet": network})
    lora = {}
    for key, weight in teacher.state_dict().items():
        if key.endswith(("to_q.weight", "to_v.weight", "conv1.weight")):
            down = torch.randn(2, *weight.shape[1:])
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            up = torch.randn(len(weight), 2, *[1] * (weight.dim() - 2))
            lora |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    files.save(tmp_path / "style.safetensors", lora)
    report = transfer(tmp_path / "style.safetensors", tmp_path / "teacher", tmp_path / "student", tmp_path / "new")
    made = load_file(tmp_path / "new.safetensors")
    names = [k.removesuffix(".weight") for k in network.state_dict()
             if k.endswith(("to_q.weight", "to_v.weight", "conv1.weight"))]  # fmt: skip
    fewer = 4 - len(network.config["down_block_types"])
    assert len(made) == 2 * len(names) == 2 * report["modules"] == 2 * report["layers_equal"]
    for name in names:
        mine, theirs = (f"lora_unet_{n.replace('.', '_')}" for n in (name, taught(f"{name}.", fewer)[:-1]))
        for part in ("lora_up.weight", "lora_down.weight"):
            assert torch.equal(made[f"{mine}.{part}"], lora[f"{theirs}.{part}"]), name


def test_a_target_with_more_blocks_gets_what_there_is(sdxl, tmp_path):
    """The other way round: a pruned model's LoRA in the whole one."""
    small = load_file(sdxl / "ssd.safetensors")
    outline = Outline("ssd", {key: tuple(w.shape) for key, w in small.items()})
    modules = [m for m in recognise(outline).components["unet"].values() if m.name and "attn1.to_q" in m.path]
    lora: files.Tensors = {}
    for i, module in enumerate(modules):
        n, k = module.matrix_shape
        generator = torch.Generator().manual_seed(i)
        lora[f"{module.name}.lora_up.weight"] = torch.randn(n, 4, generator=generator)
        lora[f"{module.name}.lora_down.weight"] = torch.randn(4, k, generator=generator)
    files.save(tmp_path / "small.safetensors", lora)
    report = transfer(tmp_path / "small.safetensors", sdxl / "ssd.safetensors", sdxl / "sdxl.safetensors",
                      tmp_path / "new", "--method", "copy", "--threshold", 0)  # fmt: skip
    made = load_file(tmp_path / "new.safetensors")
    assert files.same_bits({f"{parent(k.split('.')[0])}.{k.split('.', 1)[1]}": t for k, t in lora.items()}, made)
    assert report["skipped"] == 0
    none = [pair for choice in report["choices"] for pair in choice["pairs"] if pair["source"] is None]
    assert len(none) == sum(10 - len(kept) for path, kept in KEPT.items() if len(kept) == 4) + 2


# --- other widths ---------------------------------------------------------------------------------------------


def widened(weights: Weights) -> Weights:
    """Each width twice as large: weights mixed by fixed orthonormal maps, one per size, as a network of another width
    that computes the same would have them. Only attention's input side grows; the output stays, so that sides of one
    size tell what belongs together."""
    maps: dict[int, torch.Tensor] = {}

    def wider(key: str, W: torch.Tensor) -> torch.Tensor:
        k = W.shape[1]
        if k not in maps:
            generator = torch.Generator().manual_seed(k)
            maps[k] = torch.linalg.qr(torch.randn(2 * k, k, generator=generator).double()).Q
        return W @ maps[k].mT

    out = dict(weights)
    for key, weight in weights.items():
        if ".attn" in key and weight.dim() == 2:
            out[key] = wider(key, weight.double()).float()
    return out


def test_cross_goes_from_one_size_to_another(tmp_path):
    """Only the input side of attention layers differs, by known maps; the LoRA lies within the weights' rows."""
    base = base_weights()
    save_checkpoint(tmp_path / "source.safetensors", base)
    save_checkpoint(tmp_path / "target.safetensors", widened(base))
    layers = [m for m in files.layers("sd15") if ".attn" in m.path and m.component == "unet"]
    lora: files.Tensors = {}
    truth = {}
    for i, module in enumerate(layers):
        generator = torch.Generator().manual_seed(i)
        W = base[f"{UNET}{module.path}.weight"].double()
        n, k = W.shape
        up, down = (torch.randn(size, 2, generator=generator).double() for size in (k, n))
        up, down = W @ up, down.mT @ W
        lora |= {f"{module.name}.lora_up.weight": up.float(), f"{module.name}.lora_down.weight": down.float()}
        map_ = torch.linalg.qr(torch.randn(2 * k, k, generator=torch.Generator().manual_seed(k)).double()).Q
        truth[module.name] = up @ down @ map_.mT
    files.save(tmp_path / "style.safetensors", lora)
    report = transfer(tmp_path / "style.safetensors", tmp_path / "source.safetensors", tmp_path / "target.safetensors",
                      tmp_path / "new", "--method", "cross", "--basis-energy", 1)  # fmt: skip
    assert report["actions"] == {"mapped": len(layers)} and report["similarity"] == pytest.approx(1, abs=1e-3)
    made = files.deltas(load_file(tmp_path / "new.safetensors"))
    for name, delta in made.items():
        assert float((delta - truth[name]).norm() / truth[name].norm()) < 0.01, name
    assert any("direction by direction" in warning for warning in report["warnings"])


@pytest.fixture(scope="module")
def wide(sd15: Path) -> Path:
    return save_checkpoint(sd15 / "wide.safetensors", base_weights("sd15", 16))


def test_other_widths_without_cross_are_refused_with_the_way_out(sd15, wide, tmp_path):
    error = refusal(sd15 / "style.safetensors", sd15 / "sd15.safetensors", wide, tmp_path / "new")
    assert error["code"] == "wrong_model" and "cross" in error["hint"]
    assert "[20, 40]" in error["why"] or "[40, 80" in error["why"] or "in the target" in error["why"]


def test_where_nothing_can_be_compared_cross_must_be_forced(sd15, wide, tmp_path):
    command = (sd15 / "style.safetensors", sd15 / "sd15.safetensors", wide, tmp_path / "new", "--method", "cross")
    error = refusal(*command)
    assert error["code"] == "wrong_model" and "Nothing tells whether" in error["what"]
    assert not (tmp_path / "new.safetensors").exists()
    report = transfer(*command, "--force")
    assert report["actions"] == {"mapped": 354} and report["layers_compared"] < 5
    parts = report["components"].values()
    assert sum(part["compared"] for part in parts) == report["layers_compared"]
    assert sum(part["layers"] for part in parts) == len(report["layers"]) == 354
    assert sum(block["compared"] for part in parts for block in part["blocks"].values()) == report["layers_compared"]
    shapes = {m.name: m.matrix_shape for m in files.layers("sd15", 16) if files.linear_or_conv(m)}
    made = files.deltas(load_file(tmp_path / "new.safetensors"))
    assert {name: tuple(delta.shape) for name, delta in made.items()} == shapes
    assert any("Forced" in warning for warning in report["warnings"])


def test_layers_of_another_size_are_counted_where_others_agree(tmp_path):
    """An in-painting model's first layer, say: all others are those of the plain model."""
    base = base_weights()
    first = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    save_checkpoint(tmp_path / "source.safetensors", base)
    other = noisy(base, 0.02)
    other[first] = torch.cat((other[first], other[first]), 1)
    save_checkpoint(tmp_path / "target.safetensors", other)
    files.save(tmp_path / "style.safetensors", files.lora("sd15", only=lambda m: m.block == "IN01"))
    report = transfer(tmp_path / "style.safetensors", tmp_path / "source.safetensors", tmp_path / "target.safetensors",
                      tmp_path / "new")  # fmt: skip
    assert report["skipped_because"] == {"of another size": 1}
    assert any("the method cross maps them" in warning for warning in report["warnings"])
    crossed = transfer(tmp_path / "style.safetensors", tmp_path / "source.safetensors", tmp_path / "target.safetensors",
                       tmp_path / "crossed", "--method", "cross")  # fmt: skip
    assert crossed["actions"]["mapped"] == 1 and crossed["skipped"] == 0


# --- places, from names alone ---------------------------------------------------------------------------------


def test_every_layer_of_every_architecture_has_a_place_of_its_own():
    for architecture in ("sd1", "sd2", "sdxl", "sd3", "flux"):
        for component, modules in reference_model(architecture).components.items():
            places = {(tuple(steps), leaf) for steps, leaf in (place(path, modules) for path in modules)}
            assert len(places) == len(modules), (architecture, component)


@pytest.mark.parametrize(
    ("architecture", "path", "expected"),
    [
        ("sd1", "input_blocks.0.0", ([], "input_blocks.0.0")),
        ("sd1", "input_blocks.4.0.in_layers.2", ([("input.1", 4)], "0.in_layers.2")),
        ("sd1", "input_blocks.6.0.op", ([], "input.1.op")),
        ("sd1", "output_blocks.2.1.conv", ([], "output.3.conv")),
        ("sd1", "output_blocks.5.2.conv", ([], "output.2.conv")),
        ("sdxl", "output_blocks.2.2.conv", ([], "output.2.conv")),
        ("sdxl", "input_blocks.8.1.transformer_blocks.9.attn1.to_q",
         ([("input.2", 8), ("1.transformer_blocks", 9)], "attn1.to_q")),
        ("sdxl", "middle_block.1.transformer_blocks.3.ff.net.2",
         ([("middle_block.1.transformer_blocks", 3)], "ff.net.2")),
        ("sdxl", "middle_block.2.in_layers.2", ([], "middle_block.2.in_layers.2")),
        ("flux", "double_blocks.7.img_attn.qkv", ([("double_blocks", 7)], "img_attn.qkv")),
        ("sd3", "joint_blocks.23.context_block.attn.qkv", ([("joint_blocks", 23)], "context_block.attn.qkv")),
    ],
)  # fmt: skip
def test_places(architecture, path, expected):
    assert place(path, reference_model(architecture).components["unet"]) == expected


def test_text_encoders_layers_have_places_too():
    assert place("encoder.layers.11.mlp.fc1", ()) == ([("encoder.layers", 11)], "mlp.fc1")
    assert place("transformer.resblocks.3.attn.q_proj", ()) == ([("transformer.resblocks", 3)], "attn.q_proj")
    assert place("encoder.block.5.layer.0.SelfAttention.q", ()) == ([("encoder.block", 5)], "layer.0.SelfAttention.q")
    assert place("final_layer_norm", ()) == ([], "final_layer_norm")


def test_choices_are_asked_from_outside_inwards_and_what_was_chosen_is_inherited():
    modules = reference_model("sdxl").components["unet"]
    few = {path: m for path, m in modules.items() if not path.startswith(("input_blocks.8.", "output_blocks.1."))}
    asked: list[str] = []

    def choose(choice: Choice) -> Chosen:
        asked.append(choice.where)
        names = comparable(choice)
        assert names and all(name in block.leaves for _, block in choice.source for name in names)
        return Chosen([len(choice.source) - 1 - i for i in range(len(choice.target))][::-1], SIMILARITY)

    partners = list(lay(tree(modules), tree(few), choose, "unet"))
    assert asked == ["unet.input.2", "unet.output.2"]
    assert len(partners) == len(few) - 1  # only the first block of a resolution has a skip_connection
    how = {partner.target.path: partner.how for partner in partners}
    assert how["input_blocks.7.1.transformer_blocks.3.attn1.to_q"] == SIMILARITY
    assert how["input_blocks.5.1.transformer_blocks.1.attn1.to_q"] == PLACE
    moved = {partner.target.path: partner.source.path for partner in partners}
    inner = "1.transformer_blocks.3.attn1.to_q"
    assert moved[f"input_blocks.7.{inner}"] == f"input_blocks.8.{inner}"


def test_other_lists_of_the_wrong_length_take_part_in_nothing():
    """A list that the source lacks altogether gets nothing, and is no question."""
    modules = reference_model("flux").components["unet"]
    without = {path: m for path, m in modules.items() if not path.startswith("single_blocks")}

    def never(choice: Choice) -> Chosen:
        raise AssertionError(choice.where)

    assert {p.target.path for p in lay(tree(without), tree(modules), never, "unet")} == set(without)


def test_weights_mixed_beyond_recognition_are_no_relatives(sd15, tmp_path):
    """Each matrix turned by a random rotation: same spectra, same sizes, no direction in common."""

    def mixed(key: str, W: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(key))
        left, right = (torch.linalg.qr(torch.randn(s, s, generator=generator).double()).Q for s in W.shape)
        return left @ W @ right

    save_checkpoint(tmp_path / "mixed.safetensors", each_matrix(base_weights(), mixed))
    error = refusal(sd15 / "style.safetensors", sd15 / "sd15.safetensors", tmp_path / "mixed.safetensors",
                    tmp_path / "new")  # fmt: skip
    assert "not related" in error["what"]
