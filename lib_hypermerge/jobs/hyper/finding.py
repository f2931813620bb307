"""What belongs to a hyper-model: its recipe, the files of its LoRAs, its container, wherever they lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ...errors import FormatError, SpecError
from ...files.source import TensorFile
from ..host import Host
from ..outputs import RECIPE, read_recipe
from . import recipe as recipes
from .recipe import SUFFIX, Recipe

_SUFFIXES = ("", ".safetensors")
_LORA_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class Found:
    """A recipe and where it was found."""

    recipe: Recipe
    path: Path  # the .json, or the file whose metadata it is

    @property
    def folder(self) -> Path:
        return self.path.parent


def find_recipe(name: str | None, file: TensorFile | None, host: Host) -> Found:
    """The recipe of that name; without a name, the one in a model's metadata, or the one beside the model.

    Raises SpecError (there is none, or it cannot be read) or FormatError (the file holds no recipe).
    """
    if name is not None:
        path = find_file(name, file, host)
        return Found(recipes.read(path), path)
    if file is None:
        raise SpecError("A recipe is needed.", hint="Name the hyper-model, or its .hypermerge.json.")
    beside = file.path.with_name(file.path.stem + SUFFIX)
    own = None
    if read_recipe(file.metadata).get("job") == "hyper":
        own = recipes.parse(file.metadata[RECIPE], file.path.name)
    if beside.is_file():
        fuller = _read_beside(beside, own)
        if fuller is not None:
            return Found(fuller, beside if own is None else file.path)
    if own is not None:
        return Found(own, file.path)
    raise SpecError(
        f"{file.path.name} says of no LoRAs that belong to it.",
        f"Neither is there a recipe in its metadata, nor is {beside.name} beside it.",
        "Choose a hyper-model, or name the recipe or the LoRAs.",
    )


def _read_beside(path: Path, own: Recipe | None) -> Recipe | None:
    """The recipe beside a model: it knows what was measured after the model's header was written. None if it is not
    of the model that it lies beside."""
    try:
        found = recipes.read(path)
    except (SpecError, FormatError):
        if own is None:
            raise
        return None
    same = own is None or (own.loras, own.multipliers, own.te_multipliers) == (
        found.loras, found.multipliers, found.te_multipliers,
    )  # fmt: skip
    return found if same else None


def find_file(name: str, file: TensorFile | None, host: Host) -> Path:
    """A file that is no model: at its path where the host's names are paths, else in the folder of the model or of
    the host's checkpoints, by its plain name: a page must not reach others. SpecError if there is none.
    """
    place = host.checkpoint_output(name).parent / PurePath(name).name
    places = [place] if file is None else [place, file.path.parent / place.name]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        where = " nor ".join(dict.fromkeys(str(path.parent) for path in places))
        raise SpecError(f"There is no file {place.name}.", f"It is not in {where}.", "Check the name.")
    return found


def find_loras(stems: Sequence[str], host: Host, folders: Iterable[Path], named: Sequence[str] = ()) -> dict[str, Path]:
    """Stem → file of each LoRA: among those that were named, in the host's list, or in one of the folders.

    SpecError lists all that are missing.
    """
    folders = list(dict.fromkeys(folders))
    given = {path.stem: path for path in (host.resolve_lora(name) for name in named)}
    out: dict[str, Path] = {}
    for stem in stems:
        path = given.get(stem) or _listed(stem, host) or _beside(stem, folders)
        if path is not None:
            out[stem] = path
    missing = [stem for stem in dict.fromkeys(stems) if stem not in out]
    if missing:
        raise SpecError(
            f"{len(missing)} of {len(set(stems))} LoRAs are missing: {', '.join(missing)}.",
            f"They are not in the list of LoRAs, nor in {' or '.join(map(str, folders))}.",
            "Put them there, or name their files.",
        )
    return out


def _listed(stem: str, host: Host) -> Path | None:
    """In the host's list; by the stem alone where names have folders or suffixes."""
    names = host.loras()
    known = [stem + suffix for suffix in _SUFFIXES if stem + suffix in names]
    known += [name for name in names if PurePath(name).stem == stem and PurePath(name).suffix in _LORA_SUFFIXES]
    known += [name for name in names if PurePath(name).name == stem]
    return host.resolve_lora(known[0]) if known else None


def _beside(stem: str, folders: Iterable[Path]) -> Path | None:
    if "/" in stem or "\\" in stem or stem in ("", ".", ".."):  # metadata must not lead elsewhere
        return None
    paths = (folder / f"{stem}.safetensors" for folder in folders)
    return next((path for path in paths if path.is_file()), None)
