"""Which LoRAs are meant, and what the results are called."""

from __future__ import annotations

from pathlib import Path

from ...errors import MissingError, SpecError
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
        if not many and name == spec.pattern:
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


def outputs(spec: ResizeSpec, found: dict[str, Path], host: Host) -> dict[str, list[Path]]:
    """Per LoRA where each rung's result goes. SpecError if two results would have one name, or a name is none."""
    if len(found) > 1 and NAME not in spec.out:
        raise SpecError(
            f"{len(found)} LoRAs cannot all become {spec.out!r}.",
            hint=f"Put {NAME} into the name, such as {NAME}-small.",
        )
    template = spec.out
    if RANK not in template and len(spec.rungs) > 1:
        template = f"{template.removesuffix('.safetensors')}-{RANK}"
    made = {
        name: [host.lora_output(template.replace(NAME, _stem(path)).replace(RANK, _rung(spec, rank)))
               for rank in spec.rungs]
        for name, path in found.items()
    }  # fmt: skip
    places: dict[Path, str] = {}
    for name, paths in made.items():
        for path in paths:
            if path in places:
                raise SpecError(
                    f"{places[path]} and {name} would both become {path.name}.", hint="Resize them one by one."
                )
            places[path] = name
    return made


def _stem(path: Path) -> str:
    return path.stem if path.suffix.lower() in (".safetensors", ".pt", ".bin", ".ckpt", ".pth") else path.name


def _rung(spec: ResizeSpec, rank: int) -> str:
    if spec.rank_rule == FIXED:
        return str(rank)
    return f"{spec.rank_target:g}MiB" if spec.rank_rule == "size" else f"{spec.rank_rule}{spec.rank_target:g}"
