"""Which LoRAs are meant, and what the results are called."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import HypermergeError, MissingError, SpecError
from ..host import Host
from .spec import FIXED, NAME, RANK, ResizeSpec

MOST_FILES = 200  # of results: each is held open until all are complete


def find(spec: ResizeSpec, host: Host) -> dict[str, Path]:
    """Name → path of every LoRA that was named, or that a folder or pattern takes in; each once, in order.

    Raises SpecError if a pattern takes in none.
    """
    found: dict[str, Path] = {}
    for name in (*spec.loras, *([spec.pattern] if spec.pattern else ())):
        many = host.find_loras(name)
        if not many and (name == spec.pattern or "*" in name or "?" in name):
            raise MissingError(
                f"No LoRA matches {name!r}.", hint="Give a folder of the list, or a pattern such as people/*."
            )
        found |= many or {name: host.resolve_lora(name)}
    if len(found) * len(spec.rungs) > MOST_FILES:
        raise SpecError(
            f"{len(found)} LoRAs and {len(spec.rungs)} ranks would make {len(found) * len(spec.rungs)} files.",
            f"At most {MOST_FILES} are made at once, as all of them appear together.",
            "Do it in parts.",
        )
    return found


def outputs(
    spec: ResizeSpec, found: dict[str, Path], host: Host, failed: dict[str, HypermergeError]
) -> dict[str, list[Path]]:
    """Per LoRA where each rung's result goes. SpecError if the template makes no names.

    failed: gets the LoRAs of a batch of which the name is none for a file, or that of another's result.
    """
    strange = [word for word in re.findall(r"\{.*?\}", spec.out) if word not in (NAME, RANK)]
    if strange:
        raise SpecError(f"{strange[0]} stands for nothing in a name.", hint=f"There are {NAME} and {RANK}.")
    if len(found) > 1 and NAME not in spec.out:
        raise SpecError(
            f"{len(found)} LoRAs cannot all become {spec.out!r}.",
            hint=f"Put {NAME} into the name, such as {NAME}-small.",
        )
    template = spec.out
    if RANK not in template and len(spec.rungs) > 1:
        template = f"{template.removesuffix('.safetensors')}-{RANK}"
    made: dict[str, list[Path]] = {}
    places: dict[Path, str] = {}
    for name, path in found.items():
        try:
            own = [host.lora_output(template.replace(NAME, _stem(path)).replace(RANK, _rung(spec, rank)))
                   for rank in spec.rungs]  # fmt: skip
            other = next((places[place] for place in own if place in places), None)
            if other is not None:
                raise SpecError(f"{other} and {name} would both become {own[0].name}.", hint="Resize it alone.")
        except SpecError as error:
            if len(found) == 1:
                raise
            failed[name] = error
            continue
        made[name] = own
        places |= dict.fromkeys(own, name)
    return made


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in (".safetensors", ".pt", ".bin", ".ckpt", ".pth") else path.name


def _rung(spec: ResizeSpec, rank: int) -> str:
    if spec.rank_rule == FIXED:
        return str(rank)
    return f"{spec.rank_target:g}MiB" if spec.rank_rule == "size" else f"{spec.rank_rule}{spec.rank_target:g}"
