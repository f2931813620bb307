"""What a LoRA file says of itself, so that WebUIs list it at once, under its name, in the right group.

Keys: kohya-ss/sd-scripts (`ss_*`, `sshs_*`) and the Stability ModelSpec (`modelspec.*`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .. import __version__


@dataclass(frozen=True)
class BaseModel:
    """How metadata names an architecture."""

    base_version: str  # ss_base_model_version
    architecture: str  # modelspec.architecture, without the /lora
    resolution: int
    is_v2: bool = False
    implementation: str = "https://github.com/Stability-AI/generative-models"


def lora_metadata(
    *,
    name: str,
    base: BaseModel,
    base_file: str,
    ranks: dict[str, int],
    conv_ranks: dict[str, int],
    recipe: dict,
    lycoris: dict[str, str] | None = None,
) -> dict[str, str]:
    """Header texts of a LoRA file, without the two hashes.

    name: the file's stem, which becomes the alias in prompts.  ranks, conv_ranks: rank per LoRA
    module of linear and of 3×3 layers.  recipe: how the file was made; becomes `hypermerge`.  lycoris: the arguments
    by which LyCORIS would make such a network; without them it is kohya's.
    No date: equal inputs give equal files.
    """
    linear, conv = set(ranks.values()), set(conv_ranks.values())
    all_ranks = linear | conv
    uniform = len(all_ranks) == 1
    mixed_by_kind = len(linear) == 1 and len(conv) == 1
    network_args: dict[str, object] = dict(lycoris or {})
    if conv:
        conv_dim = str(max(conv)) if len(conv) == 1 else "Dynamic"
        network_args |= {"conv_dim": conv_dim, "conv_alpha": conv_dim}
    dim = str(max(linear or conv)) if uniform or mixed_by_kind or len(linear) == 1 else "Dynamic"
    return {
        "ss_output_name": name,
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": dim,
        "ss_network_args": json.dumps(network_args),
        "ss_base_model_version": base.base_version,
        "ss_v2": str(base.is_v2),
        "ss_sd_model_name": base_file,
        "ss_training_comment": "extracted by Hypermerge",
        "ss_session_id": "0",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation,
        "modelspec.title": name,
        "modelspec.resolution": f"{base.resolution}x{base.resolution}",
        "hypermerge": json.dumps({"version": __version__, **recipe}, ensure_ascii=False),
    }


def with_hashes(metadata: dict[str, str], data_sha256: str, legacy_hash: str) -> dict[str, str]:
    """Add the hashes WebUIs identify a LoRA by (both over the file as it is on disk); an empty one is left out."""
    hashes = {"sshs_model_hash": data_sha256, "sshs_legacy_hash": legacy_hash}
    return metadata | {name: digest for name, digest in hashes.items() if digest}
