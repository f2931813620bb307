"""Which files the LoRAs of a request are: chosen from a list, or by the names that a prompt has for them.

A name in a prompt is one of the host's list, or a file's without folder and suffix, or the alias that a file gives
itself (`ss_output_name`), in this order, as in AUTOMATIC1111 (extensions-builtin/Lora/networks.py). Free of torch.
"""

from __future__ import annotations

import difflib
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
    """What a request names, the chosen ones first, and notes on its prompt. SpecError if a name means no file."""
    found = [Wanted(host.resolve_lora(item.lora), item) for item in spec.loras]
    if spec.prompt is None:
        return found, []
    read, files = in_prompt(spec.prompt, host, spec.lora_dir)
    found += [
        Wanted(path, mention.weighted(name), mention.dyn)
        for mention, (name, path) in zip(read.loras, files, strict=True)
    ]
    return found, list(read.notes)


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
