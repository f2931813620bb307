"""What a converted LoRA says of itself: all that its source said, under its own name, with its own making."""

from __future__ import annotations

import json
import re
from typing import Any

from ..files.metadata import lora_metadata
from ..layouts.dialects.peft import DIFFUSERS_METADATA
from .convert_plan import AdapterPlan
from .convert_spec import KEEP, KOHYA
from .convert_units import REFIT
from .outputs import RECIPE, STALE, recipe

_OF_THE_NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args")
_NUMBERED = re.compile(r"(unet|text_encoder)(:\d+:rank)?")


def lora_texts(
    plan: AdapterPlan, ranks: dict[str, int], conv_ranks: dict[str, int], alphas: dict[str, float] | None = None,
    **more: Any,
) -> dict[str, str]:  # fmt: skip
    """The header's texts, without hashes; no date, so that equal inputs give equal files.

    ranks, conv_ranks: of the LoRA modules.  alphas: of the same, where they are not the ranks.  more: goes into the
    recipe.
    """
    lora = plan.lora.file.file
    kept = {key: text for key, text in lora.metadata.items() if key not in STALE and not _is_foreign(key, text)}
    parents = {"lora": lora} | ({"checkpoint": plan.model.file} if plan.has_weights else {})
    own = {RECIPE: recipe(plan.asked or plan.spec, parents, without=("loras", "pattern"), **more)}
    if plan.spec.to != KOHYA:
        return {"format": "pt"} | kept | own
    name = plan.output.stem
    base_file = plan.model.file.path.name if plan.has_weights else ""
    usual = lora_metadata(
        name=name, base=plan.model.base, base_file=base_file, ranks=ranks, conv_ranks=conv_ranks, recipe={}
    )
    if alphas:
        usual |= _alphas(usual, [alphas[name] for name in ranks], [alphas[name] for name in conv_ranks])
    usual["ss_training_comment"] = f"{plan.made} by Hypermerge"
    is_plain = plan.spec.family != KEEP and not any(unit.how == REFIT for unit in plan.units)
    if set(plan.lora.counts) - {"lora", "norm"} and not is_plain:
        usual["ss_network_module"] = "lycoris.kohya"
    if not base_file:
        del usual["ss_sd_model_name"]
    if not ranks and not conv_ranks:
        for key in _OF_THE_NETWORK[1:]:
            usual.pop(key, None)
    kept.pop("format", None)
    if plan.spec.family != KEEP:
        kept = {key: text for key, text in kept.items() if key not in _OF_THE_NETWORK}
    return usual | kept | {"ss_output_name": name, "modelspec.title": name} | own


def _alphas(usual: dict[str, str], linear: list[float], conv: list[float]) -> dict[str, str]:
    """What trainers that go on with the file take for its alphas."""

    def told(values: list[float]) -> str:
        return f"{values[0]:g}" if len(set(values)) == 1 else "Dynamic"

    args = json.loads(usual["ss_network_args"])
    if "conv_alpha" in args:
        args["conv_alpha"] = told(conv)
    return {"ss_network_alpha": told(linear or conv), "ss_network_args": json.dumps(args)}


def _is_foreign(key: str, text: str) -> bool:
    """What would be wrong beside other names: alphas by diffusers' names, cloneofsimo's tables of numbered layers."""
    return key == DIFFUSERS_METADATA or text == "<embed>" or _NUMBERED.fullmatch(key) is not None
