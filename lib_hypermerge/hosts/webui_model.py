"""The model in a WebUI's memory: where a checkpoint's tensors are in it, and how a prompt's LoRAs are taken off."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import LayoutError, SpecError
from ..files.source import TensorInfo
from ..jobs.host import ModelInMemory, Part, Spot

# what checkpoints call their text encoders' parts, and what the model does; the host renames these too
_RENAMED = (
    (r"^cond_stage_model\.transformer\.(?=(embeddings|encoder|final_layer_norm)\.)",
     "cond_stage_model.transformer.text_model."),
    (r"^conditioner\.embedders\.0\.", "cond_stage_model."),
)  # fmt: skip
# kohya's names of text encoders → Forge's; SD1 has a clip_l, SD2 a clip_h
_ENCODERS = {"te": ("clip_l", "clip_h"), "te1": ("clip_l",), "te2": ("clip_g",)}
_COPIES = {"weight": "fp16_weight", "bias": "fp16_bias"}  # kept beside a parameter of 8 bits


def model_in_memory() -> ModelInMemory:
    """Of the host. SpecError if there is none, or none that can be changed."""
    from modules import sd_models

    model = getattr(getattr(sd_models, "model_data", None), "sd_model", None)
    info = getattr(model, "sd_checkpoint_info", None)
    if model is None or info is None:
        raise SpecError(
            "The WebUI has no model in memory.", "None was loaded yet, or it was unloaded.", "Generate an image first."
        )
    _refuse_engines()
    parts = getattr(model, "forge_objects", None)
    if parts is None and hasattr(model, "named_modules"):
        return PlainModel(model, Path(info.filename))
    if hasattr(getattr(getattr(parts, "unet", None), "model", None), "lora_loader"):
        return ForgeModel(model, Path(info.filename))
    raise SpecError(
        "This WebUI keeps its model in a way that cannot be changed in memory.",
        hint="Merge into a file and load that.",
    )


def _refuse_engines() -> None:
    try:
        from modules import sd_unet
    except ImportError:
        return
    if getattr(sd_unet, "current_unet", None) is not None:
        raise SpecError(
            "The WebUI generates with a compiled UNet, not with the model in memory.",
            hint="Set SD Unet to None in the settings.",
        )


class _Model:
    """What both kinds of models have in common. The model itself belongs to the host."""

    def __init__(self, model: Any, checkpoint: Path):
        self._model, self.checkpoint = weakref.ref(model), checkpoint
        self._known: dict[str, tuple[weakref.ref, str]] | None = None

    def is_of(self, model: object) -> bool:
        return self._model() is model

    @property
    def model(self) -> Any:
        model = self._model()
        if model is None:
            raise SpecError("The model is not in memory any more.")
        return model

    def forget_results(self) -> None:
        """The host keeps the conditionings of the last prompts, which came from the text encoders as they were."""
        from modules import processing

        for name in ("StableDiffusionProcessing", "StableDiffusionProcessingTxt2Img"):
            owner = getattr(processing, name, None)
            for cache in ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc"):
                if cache in vars(owner or object):
                    setattr(owner, cache, [None, None])


class PlainModel(_Model):
    """AUTOMATIC1111's: torch modules that are named as in the checkpoint, but for wrappers around text encoders."""

    def is_there(self) -> bool:
        model = self._model()
        return model is not None and not any(parameter.is_meta for parameter in model.parameters())

    def spots(self, tensors: Mapping[TensorInfo, list[Part]]) -> dict[str, list[Spot]]:
        known, found = self._places(), {}
        for info in tensors:
            key = next((key for key in _spellings(info.name) if key in known), None)
            if key is None or tuple(getattr(*known[key]).shape) != info.shape:
                raise _nowhere(info.name)
            found[info.name] = [Spot(key, 0, info.shape[0])]
        return found

    def settle(self) -> None:
        """The Lora extension keeps a copy of each layer that it has changed, and remembers with what."""
        try:
            import networks
        except ImportError:
            return
        for module in self.model.modules():
            backups = [getattr(module, f"network_{kind}_backup", None) for kind in ("weights", "bias")]
            if any(backup is not None for backup in backups):
                networks.network_restore_weights_from_backup(module)
                networks.network_reset_cached_weight(module)

    def tensors(self, parameter: str) -> list[Any]:
        module, name = self._places()[parameter]
        copy = getattr(module, _COPIES.get(name, ""), None)
        return [getattr(module, name), *([] if copy is None else [copy])]

    def _places(self) -> dict[str, tuple[Any, str]]:
        """Name in the checkpoint → (module, attribute)."""
        if self._known is None:
            self._known = {}
            for path, module in self.model.named_modules():
                for name, _ in module.named_parameters(recurse=False):
                    parts = [part for part in (*path.split("."), name) if part not in ("", "wrapped")]
                    self._known[".".join(parts)] = weakref.ref(module), name
        return {key: (module(), name) for key, (module, name) in self._known.items()}


class ForgeModel(_Model):
    """Forge's: a UNet under the checkpoint's names, text encoders under those of transformers.

    Its loader of LoRAs swaps whole parameters for patched ones and keeps the originals until it is refreshed.
    """

    def is_there(self) -> bool:
        return self._model() is not None

    def _roots(self) -> dict[str, Any]:
        parts = getattr(self.model, "forge_objects_original", None) or self.model.forge_objects
        return {"unet": parts.unet.model, "clip": parts.clip.cond_stage_model}

    def spots(self, tensors: Mapping[TensorInfo, list[Part]]) -> dict[str, list[Spot]]:
        known = {
            f"{root}.{name}": tuple(parameter.shape)
            for root, model in self._roots().items()
            for name, parameter in model.named_parameters()
        }
        texts = {_text_name(key): key for key in known if key.startswith("clip.")}
        found = {}
        for info, parts in tensors.items():
            direct = "unet." + info.name.removeprefix("model.")
            if direct in known:
                spots = [Spot(direct, 0, info.shape[0])]
            else:
                named = [(part, name) for part in parts for name in _part_names(part) if name in texts]
                spots = [Spot(texts[name], part.start, part.stop) for part, name in named]
            rows = sum(spot.stop - spot.start for spot in spots)
            shapes = {(spot.stop - spot.start, *info.shape[1:]) == known[spot.parameter] for spot in spots}
            if rows != info.shape[0] or shapes != {True}:
                raise _nowhere(info.name)
            found[info.name] = spots
        return found

    def settle(self) -> None:
        for model in self._roots().values():
            loader = getattr(model, "lora_loader", None)
            if loader is not None:
                loader.refresh({}, force_refresh=True)

    def tensors(self, parameter: str) -> list[Any]:
        root, _, name = parameter.partition(".")
        return [self._roots()[root].get_parameter(name)]


def _spellings(name: str) -> Iterator[str]:
    yield name
    for pattern, replacement in _RENAMED:
        renamed = re.sub(pattern, replacement, name)
        if renamed != name:
            yield renamed


def _text_name(key: str) -> tuple[str, str, str]:
    """(clip_l, text_model_encoder_…, weight) of Forge's clip.clip_l.transformer.text_model.encoder.….weight."""
    _, encoder, *path, kind = key.split(".")
    return encoder, "_".join(part for part in path if part != "transformer"), kind


def _part_names(part: Part) -> list[tuple[str, str, str]]:
    """What the same may be called for a module of a checkpoint, from its name in kohya's files."""
    found = re.fullmatch(r"lora_(te\d?)_(.*)", part.module.name or "")
    encoders = _ENCODERS.get(found[1], ()) if found else ()
    return [(encoder, found[2], "bias" if part.bias else "weight") for encoder in encoders] if found else []


def _nowhere(name: str) -> LayoutError:
    return LayoutError(
        f"{name} is not in the model in memory, or stands there in another shape.",
        "The WebUI has changed the model, or keeps it in a compressed format.",
        "Merge into a file and load that.",
    )
