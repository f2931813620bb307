"""Whatever an adapter file's names, shapes and configuration are: an answer, or an error that a person can read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lib_hypermerge.errors import HypermergeError
from lib_hypermerge.jobs.adapter_inputs import open_lora
from lib_hypermerge.layouts.adapter_file import open_adapter
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.dialects import peft
from lib_hypermerge.layouts.reference import Outline
from lib_hypermerge.layouts.resolve import nearest
from lib_hypermerge.layouts.tables import narrow, shapes

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=80)

HEADS = ("lora_unet_", "lora_te_", "lora_te2_", "oft_unet_", "lycoris_", "unet.", "text_encoder.", "transformer.",
         "base_model.model.", "diffusion_model.", "unet.base_model.model.", "")  # fmt: skip
MIDDLES = ("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "mid_block.resnets.0.conv1", "conv_in",
           "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out", "input_blocks_1_1_norm",
           "text_model_encoder_layers_0_mlp_fc1", "text_model.encoder.layers.0.self_attn.to_q", "unet:0", "x",
           "")  # fmt: skip
ENDS = (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight", ".alpha", ".scale", ".dora_scale", ".hada_w1_a",
        ".hada_w1_b", ".lokr_w1", ".lokr_w2_a", ".oft_blocks", ".oft_diag", ".weight", ".on_input", ".a1.weight",
        ".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_A.weight", ".lora_B.default.weight", ".lora_B.bias",
        ".lora_magnitude_vector", "_lora.up.weight", ".lora.down.weight", ".lora_linear_layer.up.weight", ".delta",
        ":up", ":down", ".bias_values", "", ".")  # fmt: skip
NAMES = st.builds("".join, st.tuples(st.sampled_from(HEADS), st.sampled_from(MIDDLES), st.sampled_from(ENDS)))
SHAPES = st.sampled_from(
    [(), (1,), (2,), (10,), (10, 2), (2, 10), (10, 2, 1, 1), (2, 4, 3, 3), (0,), (1, 10), (2, 2, 3)]
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int8, torch.float64])
FILES = st.dictionaries(NAMES.filter(bool), st.tuples(SHAPES, DTYPES), max_size=8)

MODEL = recognise(Outline("sd15", narrow(shapes("sd15"))))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "to_q", "(", "LORA", "unet.r"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["to_q", "(", "x"]), inner, max_size=3),
    max_leaves=5,
)
FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "peft_type", "use_rslora", "init_lora_weights")
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)


@EXAMPLES
@given(FILES)
def test_any_names_and_shapes(tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({key: torch.ones(shape).to(dtype) for key, (shape, dtype) in tensors.items()}, path)
        try:
            with open_adapter(path) as adapter:
                named = [info.name for entry in adapter.entries.values() for info in entry.parts.values()]
                assert sorted([*named, *adapter.unknown, *adapter.embeddings]) == sorted(tensors)
                nearest(adapter)
            with open_lora(path, MODEL) as lora:
                for entry, target in lora.resolution.targets:
                    change = lora.load(entry).change(torch.ones(target.module.weight.shape))
                    assert change.shape == target.module.weight.shape
        except HypermergeError as error:
            assert error.what


@EXAMPLES
@given(CONFIGS, st.booleans())
def test_any_configuration(config, in_header):
    with tempfile.TemporaryDirectory() as folder:
        name = "unet.mid_block.resnets.0.conv1" if in_header else "base_model.model.mid_block.resnets.0.conv1"
        tensors = {f"{name}.lora_A.weight": torch.ones(8, 40, 3, 3), f"{name}.lora_B.weight": torch.ones(40, 8, 1, 1)}
        header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
        path = Path(folder)
        save_file(tensors, path / "adapter_model.safetensors", header if in_header else None)
        if not in_header:
            (path / peft.CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
        try:
            with open_lora(path / "adapter_model.safetensors" if in_header else path, MODEL) as lora:
                ((entry, _),) = lora.resolution.targets
                assert isinstance(lora.load(entry).scale, float)
        except HypermergeError as error:
            assert error.what


PATHS = ("proj_out", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.10.proj_out", "x_embedder",
         "transformer_blocks.1.attn.to_q", "transformer_blocks.11.attn.to_q", "transformer_blocks.1.attn.to_out.0",
         "conv_in", "mid_block.attentions.0.proj_out")  # fmt: skip
NUMBERS = st.tuples(st.integers(1, 4), st.sampled_from([0.5, 1.0, 2.0, 3.0]))


@EXAMPLES
@given(st.dictionaries(st.sampled_from(PATHS), NUMBERS, min_size=1))
def test_a_configuration_of_ours_says_what_it_was_made_of(modules):
    read = peft.from_values(json.loads(json.dumps(peft.config(modules))), "it")
    assert {path: (read.rank_of(path), read.alpha_of(path)) for path in modules} == modules
