"""What inspect says of adapters that change nothing, that no WebUI loads, or that fit more than one model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from test_inspect import only
from test_inspect_files import execute_in

from lib_hypermerge.render_inspect import describe
from lib_hypermerge.ui.inspect_view import view


def save(path, names, alpha: float = 1.0, sizes=(4, 4), **metadata: str):
    tensors = {}
    for name in names:
        tensors |= {f"{name}.lora_up.weight": torch.ones(sizes[0], 2), f"{name}.alpha": torch.tensor(alpha),
                    f"{name}.lora_down.weight": torch.ones(2, sizes[1])}  # fmt: skip
    save_file(tensors, path, metadata)
    return path


TIME = ("lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2")


def test_an_alpha_of_0_changes_nothing(tmp_path):
    path = save(tmp_path / "a.safetensors", TIME, alpha=0.0)
    file = only(path, "--norms")
    rows = dict(describe(file))
    assert rows["note"] == "alpha is 0: they change nothing (2 modules)"
    assert (rows["norm of the change"], rows["norm in UNet"]) == ("0", "0")
    assert "<img" not in view(execute_in(None, path, norms=True))
    other = only(save(tmp_path / "b.safetensors", TIME))
    assert other["notes"] == []


def test_a_prompt_is_shown_only_where_a_webui_loads_modules(tmp_path):
    known = only(save(tmp_path / "a.safetensors", TIME))
    assert known["prompt"] == dict(describe(known))["prompt"] == "<lora:a:1>"
    for path in (save(tmp_path / "b.safetensors", ("lora_unet_strange",)), save(tmp_path / "c.lora", TIME)):
        unknown = only(path)
        assert unknown["prompt"] is None
        assert "prompt" not in dict(describe(unknown))


def test_t5_is_called_t5(tmp_path):
    names = [f"lora_te3_encoder_block_{i}_layer_0_SelfAttention_q" for i in range(4)]
    names += [f"lora_unet_double_blocks_{i}_img_attn_proj" for i in range(4)]
    file = only(save(tmp_path / "a.safetensors", names))
    assert file["architecture"] == "flux"
    assert dict(describe(file))["T5"] == "4 modules"


@pytest.mark.parametrize(
    ("more", "metadata", "title"),
    [
        ((), {}, "Stable Diffusion 3 medium or Stable Diffusion 3.5 medium"),
        (("lora_unet_joint_blocks_0_x_block_attn2_proj",), {}, "Stable Diffusion 3.5 medium"),
        ((), {"modelspec.architecture": "stable-diffusion-3-medium/lora"}, "Stable Diffusion 3 medium"),
        ((), {"modelspec.architecture": "stable-diffusion-3-5-medium/lora"}, "Stable Diffusion 3.5 medium"),
    ],
)
def test_a_lora_that_fits_two_members_is_said_to_be_for_either(tmp_path, more, metadata, title):
    names = [f"lora_unet_joint_blocks_{i}_x_block_attn_proj" for i in range(3)]
    path = save(tmp_path / "a.safetensors", [*names, *more], sizes=(1536, 1536), **metadata)
    assert only(path)["title"] == title
