"""Files and folders that are no adapter, or a broken one, are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from dialect_files import ARCHITECTURES, checkpoint_weights, save_distinct
from models import save_checkpoint
from safetensors.torch import save_file

from lib_hypermerge.errors import FormatError, HypermergeError, LayoutError, SpecError
from lib_hypermerge.layouts.adapter_file import open_adapter


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_a_checkpoint_is_no_lora(tmp_path, family):
    path = save_distinct(tmp_path, family)
    with pytest.raises(LayoutError, match=f"{family}.safetensors is a checkpoint, not a LoRA.*Stable Diffusion"):
        open_adapter(path)


def test_a_pickled_checkpoint_is_no_lora(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", checkpoint_weights("sd15"))
    with pytest.raises(LayoutError, match="a checkpoint, not a LoRA"):
        open_adapter(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.ones(1, 768)}, "is an embedding"),
        ({"x.weight": torch.ones(2, 2), "y": torch.ones(2)}, r"is no LoRA.*x\.weight, y"),
        ({"lora_unet_a.alpha": torch.ones(())}, "is no LoRA"),
        ({}, "holds no tensors"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(LayoutError, match=message):
        open_adapter(tmp_path / "a.safetensors")


def test_one_part_under_two_names_is_refused(tmp_path):
    tensors = {"unet.a.to_q.lora_A.weight": torch.ones(2, 3), "unet.a.to_q.lora.down.weight": torch.ones(2, 3) * 2}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(FormatError, match=r"lora_down\.weight of unet\.a\.to_q twice"):
        open_adapter(tmp_path / "a.safetensors")


GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
CONFIGS = {
    "not json": "{",
    "not utf-8": b"\xff\xfe\x00",
    "a list": "[1]",
    "deep": "[" * 100_000,
    "a rank of text": json.dumps(GOOD | {"r": "4"}),
    "a rank of zero": json.dumps(GOOD | {"r": 0}),
    "an alpha that is none": json.dumps(GOOD | {"lora_alpha": None}),
    "an infinite alpha": '{"r": 2, "lora_alpha": Infinity}',
    "a bad pattern": json.dumps(GOOD | {"rank_pattern": {"(": 3}}),
    "a pattern that takes for ever": json.dumps(GOOD | {"rank_pattern": {"(a+)+x": 3}}),
    "a bad rank in a pattern": json.dumps(GOOD | {"rank_pattern": {"to_q": -1}}),
    "patterns that are none": json.dumps(GOOD | {"alpha_pattern": [1]}),
    "another kind": json.dumps(GOOD | {"peft_type": "IA3"}),
    "another rank": json.dumps(GOOD | {"r": 5}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_configurations_are_refused(tmp_path, case):
    text = CONFIGS[case]
    (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    tensors = {f"base_model.model.a.to_q.lora_{x}.weight": torch.ones(2, 2) * (x == "A") for x in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError) as caught:
        open_adapter(tmp_path)
    assert "configuration" in str(caught.value) or "IA3" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', '{"unet.r": "a"}', '{"unet.r": 2, "unet.lora_alpha": []}'])
def test_bad_configurations_in_a_header_are_refused(tmp_path, text):
    tensors = {f"unet.a.to_q.lora_{x}.weight": torch.ones(2, 2) * (x == "A") for x in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(FormatError, match="configuration"):
        open_adapter(tmp_path / "a.safetensors")


def test_folders_without_an_adapter_are_refused(tmp_path):
    with pytest.raises(LayoutError, match=r"holds no adapter_config\.json"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    with pytest.raises(SpecError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path)
    with pytest.raises(SpecError, match="There is no file"):
        open_adapter(tmp_path / "absent.safetensors")


def test_a_truncated_file_in_a_folder_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(HypermergeError, match="truncated"):
        open_adapter(tmp_path)
