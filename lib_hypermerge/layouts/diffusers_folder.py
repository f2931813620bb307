"""A model as diffusers saves it, seen as the single file it would be: so every job takes it unchanged.

A pipeline is a folder with model_index.json and a folder per component, whose weights are one file or shards,
.safetensors or .bin, possibly in variants (`.fp16.`). https://huggingface.co/docs/diffusers/using-diffusers/loading
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError, LayoutError
from ..files.opening import open_tensors
from ..files.source import TensorFile
from ..files.virtual import Piece, VirtualFile
from .detect import ARCHITECTURES
from .dialects import diffusers_keys as keys
from .dialects import diffusers_transformers_keys as transformers
from .dialects.diffusers import COMPONENTS
from .dialects.spots import Spot, Tensors
from .module import Architecture

PIPELINE = "model_index.json"
_DENOISERS = ("unet", "transformer")
_FOLDERS = (*_DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_CLASSES = {
    "UNet2DConditionModel": "unet", "FluxTransformer2DModel": "transformer", "SD3Transformer2DModel": "transformer",
}  # fmt: skip
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[A-Za-z_]\w*))?"
    r"\.(?P<kind>safetensors|bin)(?:\.index(?:\.(?P<late>\w+))?\.json)?"
)
_VARIANTS = ("", "fp16", "bf16")  # preferred in this order; others after them

_SPELLERS = {"flux": transformers.flux, "sd3": transformers.sd3}  # of other denoisers: a UNet
_SDXL_MARK = "model.diffusion_model.label_emb.0.0.weight"


def is_folder(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, or a denoiser saved alone."""
    return path.is_dir() and ((path / PIPELINE).is_file() or bool(_components(path)) or _class_of(path) in _CLASSES)


def open_folder(path: Path) -> VirtualFile:
    """All weights of a pipeline's (or a lone denoiser's) folder under single-file names.

    Raises FormatError (something missing or broken) or LayoutError (another kind of model).
    """
    folders = _components(path)
    if not folders and (kind := _CLASSES.get(_class_of(path))):
        folders = {kind: path}
    if not any(name in folders for name in _DENOISERS):
        raise FormatError(
            f"{path.name} holds neither a unet nor a transformer.", "It has parts of a model only.",
            "Download the whole folder.",
        )  # fmt: skip
    files: dict[str, TensorFile] = {}
    try:
        for name, folder in folders.items():
            files[name] = open_tensors(_weights(folder))
        whole = _present(path, files)
        _mark(whole, _json(path / "scheduler" / "scheduler_config.json"))
        return whole
    except BaseException:
        for file in files.values():
            file.close()
        raise


def is_denoiser(tensors: Tensors) -> bool:
    """Whether a file holds a denoiser under diffusers' own names."""
    return _architecture(tensors) is not None


def present_file(file: TensorFile) -> VirtualFile:
    """A lone denoiser's file under single-file names."""
    return _present(file.path, {_DENOISERS[0]: file})


# --- finding the files ----------------------------------------------------------------------------------------


def _class_of(folder: Path) -> str:
    return str(_json(folder / "config.json").get("_class_name", ""))


def _json(path: Path) -> dict:
    """A configuration; empty if there is none or it is broken: the weights tell as well."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _components(path: Path) -> dict[str, Path]:
    """The components' folders; those that model_index.json sets to null are left out even if they are there."""
    index = _json(path / PIPELINE)
    absent = [name for name, value in index.items() if isinstance(value, list) and None in value]
    found = {name: path / name for name in _FOLDERS if name not in absent and (path / name).is_dir()}
    has_index = bool(index) or any((path / name / "config.json").is_file() for name in _DENOISERS)
    return found if has_index else {}


def _weights(folder: Path) -> Path:
    """The file or index to open: .safetensors before .bin, no variant before fp16. FormatError if there is none."""
    choices = []
    for entry in folder.iterdir():
        match = _WEIGHTS.fullmatch(entry.name)
        if match and entry.is_file():
            variant = match["variant"] or match["late"] or ""
            rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
            choices.append((match["kind"] == "bin", rank, entry.name.endswith(".json"), entry.name))
    if not choices:
        raise FormatError(
            f"{folder.parent.name}/{folder.name} holds no weights.", "There is no .safetensors or .bin file in it.",
            "Download the whole folder.",
        )  # fmt: skip
    return folder / min(choices)[-1]


# --- naming the tensors ---------------------------------------------------------------------------------------


def _architecture(tensors: Tensors) -> Architecture | None:
    """By the denoiser's tensors."""
    if "down_blocks.0.resnets.0.conv1.weight" in tensors and "conv_out.weight" in tensors:  # a ControlNet has none
        if "add_embedding.linear_1.weight" in tensors:
            name = "sdxl"
        else:
            axes = {len(info.shape) for key, info in tensors.items() if key.endswith("attentions.0.proj_in.weight")}
            name = "sd2" if axes == {2} else "sd1"
    elif "transformer_blocks.0.attn.add_q_proj.weight" in tensors:
        name = "flux" if "single_transformer_blocks.0.proj_mlp.weight" in tensors else "sd3"
    else:
        return None
    return next(architecture for architecture in ARCHITECTURES if architecture.id == name)


def _present(path: Path, files: dict[str, TensorFile]) -> VirtualFile:
    denoiser = next(name for name in _DENOISERS if name in files)
    architecture = _architecture(files[denoiser].tensors)
    if architecture is None:
        raise LayoutError(
            f"{path.name} is no Stable Diffusion or Flux.1 model.", f"Its {denoiser} is of another kind.",
            "Choose a model of a kind that is supported.",
        )  # fmt: skip
    places: dict[str, tuple[str, Callable[[Tensors], dict[str, Spot]]]] = {
        denoiser: (architecture.components[0].prefixes[0], _SPELLERS.get(architecture.id, keys.unet)),
        "vae": (architecture.vae_prefixes[0], keys.vae),
    }
    for table in architecture.components[1:]:
        speller = keys.open_clip if "resblocks" in table.probe else _same_names
        places[COMPONENTS[architecture.id][table.id]] = (table.prefixes[0], speller)
    whole = VirtualFile(path, files.values())
    for name, file in files.items():
        prefix, speller = places.get(name, (f"{name}.", _same_names))
        _add(whole, name, file, prefix, speller(file.tensors))
    return whole


def _mark(whole: VirtualFile, scheduler: dict) -> None:
    """What a pipeline's scheduler says of its training, as ComfyUI and Forge read it from an SDXL file."""
    if _SDXL_MARK in whole.tensors and scheduler.get("prediction_type") == "v_prediction":
        whole.add_empty("v_pred")
        if scheduler.get("rescale_betas_zero_snr"):
            whole.add_empty("ztsnr")


def _same_names(tensors: Tensors) -> dict[str, Spot]:
    """Single files keep Hugging Face's names of CLIP and T5; prefixes end with `text_model.` where these begin so."""
    return {name: Spot(name.removeprefix("text_model.")) for name in tensors if name != "text_projection.weight"}


def _add(whole: VirtualFile, component: str, file: TensorFile, prefix: str, spots: dict[str, Spot]) -> None:
    """Add a component's tensors; what has no place in a single file keeps its name behind the component's."""
    found: dict[str, dict[int, tuple[Spot, Piece]]] = {}
    for name, info in file.tensors.items():
        spot = spots.get(name)
        if spot is None:
            spot, key = Spot(name), _elsewhere(component, prefix, name)
        else:
            key = prefix + spot.key
        parts = found.setdefault(key, {})
        if spot.part in parts:
            raise FormatError(
                f"{whole.path.name}: {parts[spot.part][1].info.name} and {name} of the {component} mean the same."
            )
        parts[spot.part] = spot, Piece(file, info)
    for key, parts in found.items():
        spot = next(iter(parts.values()))[0]
        if len(parts) != spot.parts:
            held = ", ".join(piece.info.name for _, piece in parts.values())
            raise FormatError(
                f"{whole.path.name}: a layer of the {component} is incomplete.",
                f"{held}: {spot.parts} parts belong together, {len(parts)} are there.", "Download it again.",
            )  # fmt: skip
        _place(whole, key, spot, [parts[index][1] for index in sorted(parts)])


def _elsewhere(component: str, prefix: str, name: str) -> str:
    if name == "text_projection.weight" and prefix.endswith("text_model."):
        return prefix.removesuffix("text_model.") + name
    return f"{component}.{name}"


def _place(whole: VirtualFile, key: str, spot: Spot, pieces: list[Piece]) -> None:
    first = pieces[0].info
    if spot.turned and len(first.shape) == 2:
        whole.add_transposed(key, pieces[0])
    elif spot.swapped:
        half = first.shape[0] // 2
        whole.add(key, [pieces[0].rows(half, first.shape[0]), pieces[0].rows(0, half)])
    else:
        missing = spot.axes - len(first.shape)
        whole.add(key, pieces, (*first.shape, *(1,) * missing) if missing > 0 else None)
