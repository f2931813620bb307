"""What an adapter file's header tells: what it was made for, of what families, and where its modules go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..adapters import dora
from ..adapters.adapter import Adapter
from ..adapters.families import ALPHA, SCALE, family_of
from ..errors import FormatError
from ..files.dtypes import FLOATS
from ..files.source import TensorInfo
from ..layouts.adapter_file import AdapterFile, Entry, Resolution, Target
from ..layouts.module import Model
from ..layouts.reference import Outline, reference_model, reference_models
from ..layouts.resolve import lay_over, nearest
from .inspect_checkpoint import dtype_counts
from .inspect_common import shown
from .inspect_hosts import CODES, DISAGREE, alias, host_facts

_EMBEDDING = "bundle_emb."


@dataclass(frozen=True)
class Piece:
    """A sound module of an adapter file and what it changes. target: None where no layer answers to it.

    fits: whether the layer of the model that it was laid over has the size of the change.
    """

    entry: Entry
    family: type[Adapter]
    target: Target | None
    fits: bool


@dataclass
class Seen:
    """An open adapter file, understood. model: what it was laid over, with numbers if it is a real checkpoint.

    share: of its modules, that the model has layers for.  broken: keys of modules of no family or with parts that
    disagree or with whole numbers for factors → why.  damage: tensors of the latter two → what hosts stumble over.
    """

    file: AdapterFile
    share: float
    model: Model | None
    resolution: Resolution
    pieces: list[Piece] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    damage: dict[str, str] = field(default_factory=dict)
    # members of the architecture that fit as well as the model
    others: list[Model] = field(default_factory=list)

    @property
    def architecture(self) -> str | None:
        return self.model.architecture.id if self.model else None

    @property
    def title(self) -> str:
        """Of all members of the architecture that it fits, unless the metadata names one."""
        if self.model is None:
            return "no model that is known here"
        models = [self.model, *self.others]
        said = self.file.metadata.get("modelspec.architecture", "").removesuffix("/lora")
        named = [model for model in models if model.base.architecture == said]
        return " or ".join(model.title for model in named or models)

    @property
    def has_numbers(self) -> bool:
        """Whether the weights of the model can be read."""
        return self.model is not None and not isinstance(self.model.file, Outline)

    @property
    def misfits(self) -> list[Piece]:
        """Modules that have not the size of their layer."""
        return [piece for piece in self.pieces if piece.target and not piece.fits]

    def component_of(self, piece: Piece) -> str:
        return piece.target.module.component if piece.target else "?"


def see(file: AdapterFile, base: Model | None) -> Seen:
    """Lay a file over the base, if that has as many of its layers as any, else over a model without numbers."""
    model, share = nearest(file)
    resolution = Resolution() if model is None else lay_over(file, model)
    if base is not None:
        on_base = lay_over(file, base)
        if on_base.targets and len(on_base.targets) >= len(resolution.targets):
            model, resolution = base, on_base
            share = len(resolution.targets) / len(file.entries)
    seen = Seen(file, share, model, resolution)
    seen.others = _others_like(seen)
    targets = {entry.key: target for entry, target in seen.resolution.targets}
    for entry in file.entries.values():
        try:
            family = family_of(entry.shapes)
        except FormatError as error:
            seen.broken[entry.key] = error.what
            if "do not fit together" in error.what:
                seen.damage |= {info.name: DISAGREE for info in entry.parts.values()}
            continue
        if codes := _codes(entry):
            seen.broken[entry.key] = f"{codes.name} is stored as {codes.dtype}: whole numbers are no factors."
            seen.damage |= {info.name: CODES for info in entry.parts.values()}
            continue
        target = targets.get(entry.key)
        fits = target is not None and family.fits(entry.shapes, shape_of(target))
        seen.pieces.append(Piece(entry, family, target, fits))
    return seen


def _others_like(seen: Seen) -> list[Model]:
    """Members of the architecture that as many modules fit: names and sizes do not tell them from the first."""
    if seen.model is None or seen.has_numbers:
        return []
    found = _fitting(seen.resolution)
    others = [model for model in reference_models(seen.model.architecture.id) if model is not seen.model]
    return [model for model in others if _fitting(lay_over(seen.file, model)) == found]


def _fitting(resolution: Resolution) -> tuple[int, int]:
    """How many modules have a layer, and how many of them have its size."""
    sizes = [
        up[0] == target.shape[0] and down[1:2] == target.shape[1:2]
        for entry, target in resolution.targets
        if (up := entry.shapes.get("lora_up.weight")) and (down := entry.shapes.get("lora_down.weight"))
    ]
    return len(resolution.targets), sum(sizes)


def _codes(entry: Entry) -> TensorInfo | None:
    """A matrix of whole numbers, which a quantisation leaves; not the indices of a sparse rest."""
    whole = (info for part, info in entry.parts.items() if info.dtype not in FLOATS and not part.startswith("bias_"))
    return next((info for info in whole if len(info.shape) > 1), None)


def shape_of(target: Target) -> tuple[int, ...]:
    """The size of the part of a layer that is changed."""
    assert target.module.weight is not None
    return (target.stop - target.start, *target.module.weight.shape[1:])


def adapter_facts(seen: Seen) -> dict[str, Any]:
    """JSON-ready. Of the data only the alphas are read, one number each."""
    file, path = seen.file, seen.file.file.path
    hosts = _hosts(seen)
    infos = [info for entry in file.entries.values() for info in entry.parts.values()]
    return {
        "kind": "adapter",
        "architecture": seen.architecture,
        "title": seen.title,
        "recognised_share": seen.share,
        "dialect": file.dialect,
        "modules": len(file.entries),
        "families": dict(Counter(piece.family.title for piece in seen.pieces).most_common()),
        **_numbers(seen),
        "dora": _dora(seen),
        "biases": sum("diff_b" in entry.parts or "lora_up.bias" in entry.parts for entry in file.entries.values()),
        "tensors": len(file.file.tensors),
        "parameters": sum(info.numel for info in infos),
        "bytes_of_modules": sum(info.nbytes for info in infos),
        "dtypes": dtype_counts(info for info in infos if info.shape),
        "components": _components(seen),
        "embeddings": _embeddings(file.embeddings),
        "unmatched": _list(seen.resolution.unmatched if seen.model else list(file.entries)),
        "absent": {component: _list(keys) for component, keys in seen.resolution.absent.items()},
        "unknown": _list(file.unknown),
        "misfits": _list([piece.entry.key for piece in seen.misfits]),
        "broken": {"count": len(seen.broken), "modules": dict(list(seen.broken.items())[:20])},
        "notes": [*file.notes, *_notes(seen)],
        "alias": alias(path, file.metadata),
        "prompt": f"<lora:{alias(path, file.metadata)}:1>" if any(h["modules"] for h in hosts.values()) else None,
        "hosts": hosts,
    }


def _list(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "names": shown(names)}


def _numbers(seen: Seen) -> dict[str, Any]:
    """How often each rank, alpha and scale occurs; by themselves, as JSON has only texts for keys."""
    ranks: Counter[int] = Counter()
    alphas: Counter[str] = Counter()
    scales: Counter[str] = Counter()
    for piece in seen.pieces:
        rank = piece.family.rank(piece.entry.shapes)
        alpha, scale = alpha_of(seen.file, piece.entry)
        if rank is not None:
            ranks[rank] += 1
            alphas["none" if alpha is None else f"{alpha:g}"] += 1
            if scale is None:
                scale = 1.0 if alpha is None or not rank else alpha / rank
            scales[f"{scale:.6g}"] += 1
    return {
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": _bounded(alphas),
        "scales": _bounded(scales),
    }


def _bounded(counts: Counter[str]) -> dict[str, int]:
    kept = dict(counts.most_common(20))
    rest = sum(counts.values()) - sum(kept.values())
    return kept | ({"others": rest} if rest else {})


def alpha_of(file: AdapterFile, entry: Entry) -> tuple[float | None, float | None]:
    """(alpha, scale) as the file or its configuration gives them."""
    alpha, scale = (
        file.file.number(entry.parts[part]) if part in entry.parts and entry.parts[part].numel == 1 else None
        for part in (ALPHA, SCALE)
    )
    return (entry.alpha if alpha is None else float(alpha)), (None if scale is None else float(scale))


def _dora(seen: Seen) -> dict[str, int]:
    """Modules by the axis that their magnitudes stand along."""
    axes: Counter[str] = Counter()
    for piece in seen.pieces:
        if issubclass(piece.family, dora.Dora):
            own = piece.entry.shapes.get(dora.SCALE, ())
            axes["input channels" if len(own) > 1 and own[0] == 1 else "output rows"] += 1
    return dict(axes)


def _components(seen: Seen) -> dict[str, Any]:
    """Modules and numbers by component and block, in the order of the network."""
    out: dict[str, Any] = {}
    if seen.model is None:
        return out
    pieces = [piece for piece in seen.pieces if piece.target]
    for component in seen.model.components:
        own = [piece for piece in pieces if seen.component_of(piece) == component]
        if own:
            blocks = Counter(piece.target.module.block for piece in own if piece.target)
            out[component] = {
                "title": titles_of(seen.model)[component],
                "modules": len(own),
                "parameters": sum(info.numel for piece in own for info in piece.entry.parts.values()),
                "blocks": {block: blocks[block] for block in blocks_of(seen.model, component) if block in blocks},
            }
    return out


def titles_of(model: Model) -> dict[str, str]:
    return {table.id: table.title for table in model.architecture.components}


def blocks_of(model: Model, component: str) -> list[str]:
    """The blocks of a component, in the order of the network."""
    order = {"TIME": 0, "LABEL": 1, "EMB": 2, "IN": 3, "MID": 4, "OUT": 5}
    found = dict.fromkeys(module.block for module in model.components[component].values())

    def place(block: str) -> tuple[int, str]:
        kind = block.rstrip("0123456789")
        return order.get(kind, 3) + (1 if block == "OUT" else 0), block

    return sorted(found, key=place)


def _embeddings(tensors: Mapping[str, TensorInfo]) -> dict[str, list[list[int]]]:
    """Bundled embeddings by name, each with the sizes of its tensors."""
    out: dict[str, list[list[int]]] = {}
    for key, info in tensors.items():
        name = key.removeprefix(_EMBEDDING).split(".")[0]
        out.setdefault(name, []).append(list(info.shape))
    return dict(list(out.items())[:50])


def _notes(seen: Seen) -> list[str]:
    """What programs are known to do otherwise, with the number of modules that it concerns."""
    notes = Counter(note for piece in seen.pieces for note in piece.family.notes(piece.entry.shapes))
    without_effect = sum(_changes_nothing(seen, piece) for piece in seen.pieces)
    first = [f"alpha is 0: they change nothing ({without_effect} modules)"] if without_effect else []
    return [*first, *(f"{note} ({count} modules)" for note, count in notes.most_common(10))]


def _changes_nothing(seen: Seen, piece: Piece) -> bool:
    """Whether the factor of a plain product is 0, and there is no change of a bias."""
    if piece.family.needs_weight or piece.family.rank(piece.entry.shapes) is None:
        return False
    alpha, scale = alpha_of(seen.file, piece.entry)
    return (alpha if scale is None else scale) == 0 and not {"diff_b", "lora_up.bias"} & piece.entry.parts.keys()


def _hosts(seen: Seen) -> dict[str, Any]:
    file = seen.file.file
    if seen.model is None or seen.architecture is None:
        return {}
    model = reference_model(seen.architecture) if seen.has_numbers else seen.model
    return host_facts(
        file.path,
        file.metadata,
        {name: info.shape for name, info in file.tensors.items()},
        {name: info.shape for name, info in model.file.tensors.items()},
        seen.architecture,
        {entry.key for entry, _ in seen.resolution.targets},
        _misfit_tensors(seen),
        seen.damage,
    )


def _misfit_tensors(seen: Seen) -> set[str]:
    """Of single modules; where most do not fit, the file is for a model of another width."""
    if 2 * len(seen.misfits) > len(seen.pieces):
        return set()
    return {info.name for piece in seen.misfits for info in piece.entry.parts.values()}
