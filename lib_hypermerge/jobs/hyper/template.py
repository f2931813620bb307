"""Which of the models the hyper-model is laid out after, and what it lacks to be loaded."""

from __future__ import annotations

from collections.abc import Sequence

from ...layouts.module import Model

_OPTIONAL = {"sd3": ("te3",)}  # WebUIs load Stable Diffusion 3 without T5


def most_complete(models: Sequence[Model]) -> Model:
    """The one with most components, with a VAE, with most layers; the first of equals.

    Only those of the first one's kind count: that others are there is refused later, in the order of the models.
    """
    return max((model for model in models if models[0].is_kind_of(model)), key=_completeness)


def _completeness(model: Model) -> tuple[int, bool, int, int]:
    parts = [own for own in model.components.values() if own]
    return len(parts), bool(model.vae), sum(map(len, parts)), len(model.vae)


def lacking(model: Model) -> list[str]:
    """The parts that a WebUI needs of such a checkpoint and that it does not have, in words."""
    architecture = model.architecture
    optional = _OPTIONAL.get(architecture.id, ())
    out = [
        table.title
        for table in architecture.components
        if table.id not in optional and not model.components.get(table.id)
    ]
    return out + ([] if model.vae else ["VAE"])
