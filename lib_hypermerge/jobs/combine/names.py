"""Which files the LoRAs of a request are: chosen from a list, or by the names that a prompt has for them.

A name in a prompt is one of the host's list, or a file's without folder and suffix, or the alias that a file gives
itself (`ss_output_name`), in this order, as in AUTOMATIC1111 (extensions-builtin/Lora/networks.py). Free of torch.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

from ...errors import HypermergeError, SpecError
from ...files.opening import CHECKPOINT_SUFFIXES, open_tensors
from ..host import Host
from ..spec import WeightedLora
from . import prompt as prompts
from .prompt import Read
from .spec import CombineSpec

_ALL = "*"
_NEAR = 3  # suggestions


@dataclass(frozen=True)
class Wanted:
    """A LoRA file with its weights. dyn: only so many of its directions."""

    path: Path
    item: WeightedLora
    dyn: int | None = None


def wanted(spec: CombineSpec, host: Host) -> tuple[list[Wanted], list[str]]:
    """What a request names, the chosen ones first, and notes on its prompt.

    SpecError if a name means no file, or two mean the same.
    """
    if spec.lora_dir is not None:
        _check_folder(spec.lora_dir, host)
    found = [Wanted(host.resolve_lora(item.lora), item) for item in spec.loras]
    notes: list[str] = []
    if spec.prompt is not None:
        read, files = in_prompt(spec.prompt, host, spec.lora_dir)
        found += [
            Wanted(path, mention.weighted(name), mention.dyn)
            for mention, (name, path) in zip(read.loras, files, strict=True)
        ]
        notes += read.notes
    _refuse_twice(found)
    return found, notes


def in_prompt(prompt: str, host: Host, folder: str | None = None) -> tuple[Read, list[tuple[str, Path]]]:
    """A prompt's LoRAs, and of each the name in the list and the file. SpecError names all that are not there.

    folder: where to look on the command line, where the host has no list; None for the present one.
    """
    read = prompts.read(prompt)
    files = host.find_loras(_ALL if host.loras() else folder or ".")
    found = {mention.name: _find(mention.name, files, host) for mention in read.loras}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise _unknown(missing, files, folder)
    return read, [file for mention in read.loras if (file := found[mention.name]) is not None]


def stem(name: str) -> str:
    """A LoRA's name in a prompt, from that of its file: dots may be part of a folder's."""
    path = PurePath(name)
    return path.stem if path.suffix.lower() in CHECKPOINT_SUFFIXES else path.name


def told_apart(paths: Sequence[Path]) -> list[str]:
    """Names of files; of those that have one name as many folders with it as tell them apart."""
    parts = [path.absolute().parts for path in paths]
    out = []
    for own in parts:
        others = [other for other in parts if other != own]
        count = next((n for n in range(1, len(own)) if all(other[-n:] != own[-n:] for other in others)), len(own))
        out.append(PurePath(*own[-count:]).as_posix())
    return out


def _check_folder(folder: str, host: Host) -> None:
    """SpecError where the host has a list of its own, which is what the folder is for, or if there is no such."""
    try:
        path = None if host.loras() else host.resolve_lora(folder)
    except SpecError:  # a host with a list that is empty; whether there is such a folder is nobody's business there
        path = None
    if path is None:
        raise SpecError(
            "'lora_dir' is of use on the command line alone.", "Here LoRAs are found in the list that there is.",
            "Leave it out.",
        )  # fmt: skip
    if not path.is_dir() and not host.find_loras(folder):
        raise SpecError(f"There is no folder {folder}.", "LoRAs were to be looked for in it.", "Check its name.")


def _refuse_twice(found: Sequence[Wanted]) -> None:
    """As in a prompt; families that depend on a weight are not twice as strong when they are applied twice."""
    files: dict[str, list[Wanted]] = {}
    for want in found:
        files.setdefault(os.path.realpath(want.path), []).append(want)
    for own in files.values():
        if len(own) > 1:
            weights = " and ".join(f"{want.item.weight:g}" for want in own)
            raise SpecError(
                f"{own[0].path.name} is named {len(own)} times.", f"Its weights are {weights}.",
                "Name it once, with the weight that is meant: for a sum, that of both together.",
            )  # fmt: skip


def _find(name: str, files: dict[str, Path], host: Host) -> tuple[str, Path] | None:
    if name in files:
        return name, files[name]
    found = [(listed, path) for listed, path in files.items() if stem(path.name) == name]
    if not found:
        found = _known_to(host, name, files)
    if not found:
        found = [(listed, path) for listed, path in files.items() if _alias(path) == name]
    if len(found) > 1:
        raise SpecError(
            f"{len(found)} LoRAs are called {name!r}.", f"They are {', '.join(sorted(listed for listed, _ in found))}.",
            "Name their files instead, or rename one.",
        )  # fmt: skip
    return found[0] if found else None


def _known_to(host: Host, name: str, files: dict[str, Path]) -> list[tuple[str, Path]]:
    """What a host that has a list of LoRAs makes of a name that is not in it: a WebUI knows aliases."""
    if not host.loras():
        return []
    try:
        meant = host.resolve_lora(name)
    except SpecError:
        return []
    return [(listed, path) for listed, path in files.items() if path == meant][:1]


def _alias(path: Path) -> str | None:
    """What a file calls itself; None if it does not, or cannot be read."""
    try:
        now = path.stat()
    except OSError:
        return None
    return _stored_alias(path, now.st_mtime_ns, now.st_size) if path.suffix.lower() == ".safetensors" else None


@lru_cache(maxsize=1 << 14)
def _stored_alias(path: Path, changed: int, size: int) -> str | None:
    """changed, size: of the file as it is now; a list of many is asked again at every key that is pressed."""
    try:
        with open_tensors(path) as file:
            return file.metadata.get("ss_output_name")
    except HypermergeError:
        return None


def _unknown(missing: Sequence[str], files: dict[str, Path], folder: str | None) -> SpecError:
    stems = sorted({stem(path.name) for path in files.values()})
    near = [n for name in missing for n in difflib.get_close_matches(name, stems, _NEAR)]
    shown = ", ".join(repr(name) for name in missing)
    where = f"in {folder}" if folder else f"among {len(stems)}"
    return SpecError(
        f"There is no LoRA called {shown}.", f"It was looked for {where}, by file name and by alias.",
        f"Did you mean {', '.join(dict.fromkeys(near))}?" if near else "Check the name, or the folder of LoRAs.",
    )  # fmt: skip
