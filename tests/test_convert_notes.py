"""The notes that bring a LoRA's bits back: any LoRA's come back, and nobody's forged notes do harm."""

import json

import pytest
import torch
from convert_files import convert, deltas, load, lora, refusal, save, some, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.adapters.lora import DOWN, UP
from lib_hypermerge.algebra.folding import fold, is_invertible, same_bits
from lib_hypermerge.jobs.convert_restore import ALPHA, Notes, kind_of, read, restored

DTYPES = st.sampled_from((torch.float16, torch.bfloat16, torch.float32))


@st.composite
def modules(draw):
    """A LoRA module's tensors as kohya files may hold them."""
    n, k, r = (draw(st.integers(1, 6)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    ones, kernel = draw(st.sampled_from((([], []), ([1, 1], [1, 1]), ([1, 1], [3, 3]))))
    out = {
        UP: (torch.randn(n, r, *ones, generator=generator)).to(draw(DTYPES)),
        DOWN: (torch.randn(r, k, *kernel, generator=generator)).to(draw(DTYPES)),
    }
    alpha = draw(st.sampled_from((None, 0.5, 1.0, 3.0, 16.0, 24.0)))
    if alpha is not None:
        out[ALPHA] = torch.tensor(alpha, dtype=draw(DTYPES)).reshape(draw(st.sampled_from(([], [1]))))
    return out


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.lists(modules(), min_size=1, max_size=4), st.integers(0, 3))
def test_what_was_folded_and_filled_up_comes_back(made, more):
    names = [f"unet.layer.{i}" for i in range(len(made))]
    told = json.loads(json.dumps(Notes({n: kind_of(t) for n, t in zip(names, made, strict=True)}).to_json()))
    notes = read({"restore": told}, names)
    for name, before in zip(names, made, strict=True):
        kind = notes.kinds[name]
        up = fold(before[UP], kind.scale, torch.float32)
        down = before[DOWN].float()
        up = torch.cat((up, up.new_zeros(len(up), more, *up.shape[2:])), 1)
        down = torch.cat((down, down.new_zeros(more, *down.shape[1:])))
        after = restored({UP: up, DOWN: down}, kind, None)
        if is_invertible(before[UP], kind.scale, torch.float32):
            assert after.keys() == before.keys()
            assert all(same_bits(after[part], before[part]) for part in before)
        else:
            assert torch.allclose(after[UP].float(), before[UP].float(), rtol=1e-6)


FORGED = [
    None, 7, [], {"kinds": []}, {"kinds": [[1]], "others": {}, "names": {}}, {"kinds": [["x"] * 9]},
    *({"kinds": [kind], "others": {}, "names": {}} for kind in (
        [0, 1.0, "F16", 0, "F16", "F16", 2, 2, ""], [4, float("nan"), "F16", 0, "F16", "F16", 2, 2, ""],
        [4, 1.0, "I64", 0, "F16", "F16", 2, 2, ""], [4, 1.0, "F16", 0, "F99", "F16", 2, 2, ""],
        [4, 1.0, "F16", 10**9, "F16", "F16", 2, 2, ""], [4, 1.0, "F16", 0, "F16", "F16", 10**9, 2, ""],
        [10**9, 1.0, "F16", 0, "F16", "F16", 2, 2, ""], [4, 1e300, "F32", 0, "F16", "F16", 2, 2, ""],
        [1, 1.0, "F16", 0, "F16", "F16", 2, 2, ""],
    )),
    {"kinds": [[4, 1.0, "F16", 0, "F16", "F16", 2, 2, ""]], "others": {"9": ["unet.mid_block.attentions.0.proj_in"]},
     "names": {}},
]  # fmt: skip


@pytest.mark.parametrize("forged", FORGED, ids=range(len(FORGED)))
def test_forged_notes_change_nothing(tmp_path, forged):
    before = lora("sd15", only=lambda m: some(m) and "attn" in m.path)
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    metadata = texts(tmp_path / "b.safetensors") | {"hypermerge": json.dumps({"restore": forged})}
    save(tmp_path / "c.safetensors", load(tmp_path / "b.safetensors"), metadata)
    convert(tmp_path / "c.safetensors", tmp_path / "d")
    made, goal = deltas(load(tmp_path / "d.safetensors")), deltas(before)
    assert made.keys() == goal.keys()
    assert all(torch.allclose(made[name], goal[name], rtol=1e-3, atol=1e-6) for name in goal)


def test_forged_names_are_refused_or_ignored(tmp_path):
    before = lora("sd15", only=lambda m: some(m) and "attn1.to_q" in m.path)
    convert(save(tmp_path / "a.safetensors", before), tmp_path / "b", "--to", "diffusers")
    made = texts(tmp_path / "b.safetensors")
    first, second = (k.removesuffix(".lora_A.weight") for k in list(load(tmp_path / "b.safetensors"))[::2][:2])
    for names, fine in (({first: "a.b/../c"}, True), ({first: "x", second: "x"}, False)):
        recipe = json.loads(made["hypermerge"])
        recipe["restore"]["names"] = names
        save(tmp_path / "c.safetensors", load(tmp_path / "b.safetensors"), made | {"hypermerge": json.dumps(recipe)})
        if fine:
            convert(tmp_path / "c.safetensors", tmp_path / "d")
            assert deltas(load(tmp_path / "d.safetensors")).keys() == deltas(before).keys()
        else:
            assert refusal(tmp_path / "c.safetensors", tmp_path / "e")["code"] == "bad_file"
