"""What the combined LoRA says of itself: what all of its parents say alike, and how it was made."""

from __future__ import annotations

import json
from typing import Any

from ... import __version__
from ...files.metadata import lora_metadata
from ...layouts.resolve import said_architecture
from ..outputs import RECIPE, parent
from .plan import CombinePlan
from .work import WHOLE

# of the base model: worth keeping where all parents that say it say the same
_OF_THE_BASE = (
    "ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_name",
    "ss_clip_skip", "ss_zero_terminal_snr", "modelspec.architecture", "modelspec.implementation",
    "modelspec.prediction_type", "modelspec.resolution", "modelspec.encoder_layer",
)  # fmt: skip
_OF_THE_NETWORK = ("ss_network_dim", "ss_network_alpha", "ss_network_args")


def texts(
    plan: CombinePlan, ranks: dict[str, int], conv_ranks: dict[str, int], kinds: dict[str, int], **measured: Any
) -> dict[str, str]:
    """The header's texts, without hashes; no date, so that equal inputs give equal files.

    ranks, conv_ranks: by the modules' names.  kinds: how many layers were made how.  measured: goes into the recipe.
    """
    base_file = plan.model.file.path.name if plan.has_weights else ""
    usual = lora_metadata(
        name=plan.output.stem, base=plan.model.base, base_file=base_file, ranks=ranks, conv_ranks=conv_ranks, recipe={}
    )
    usual["ss_training_comment"] = "combined by Hypermerge"
    if kinds.get(WHOLE):
        usual["ss_network_module"] = "lycoris.kohya"
    if not base_file:
        del usual["ss_sd_model_name"]
    if not ranks and not conv_ranks:
        for key in _OF_THE_NETWORK:
            del usual[key]
    merged = ", ".join(lora.path.name for lora in plan.loras)
    return {"format": "pt"} | usual | _of_parents(plan) | {
        "modelspec.merged_from": merged, RECIPE: _recipe(plan, measured),
    }  # fmt: skip


def _of_parents(plan: CombinePlan) -> dict[str, str]:
    """Nothing where a parent says that it is of another architecture than its layers are."""
    said = [lora.file.metadata for lora in plan.loras]
    if any(said_architecture(own) not in (None, plan.model.architecture.id) for own in said):
        return {}
    found = {key: {own[key] for own in said if key in own} for key in _OF_THE_BASE}
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _recipe(plan: CombinePlan, measured: dict[str, Any]) -> str:
    """Names only: where somebody's files lie is nobody else's business."""
    own = plan.spec.to_json()
    for key in ("prompt", "loras", "lora_dir", "out", "checkpoint", "preview", "overwrite"):
        del own[key]
    parents = []
    for index, lora in enumerate(plan.loras):
        told = {key: plan.lora_json(index)[key] for key in ("weight", "te_weight", "blocks", "dyn")}
        told = {key: value for key, value in told.items() if value not in ("", None)}
        parents.append({"role": "lora", **parent(lora.file.file), **told})
    if plan.has_weights:
        parents.append({"role": "checkpoint", **parent(plan.model.file)})
    table = {
        "version": __version__, "job": "combine",
        "parameters": {key: value for key, value in own.items() if value is not None}, "parents": parents, **measured,
    }  # fmt: skip
    return json.dumps(table, ensure_ascii=False, separators=(",", ":"))
