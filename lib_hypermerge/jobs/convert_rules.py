"""What can be converted into what, and the words of every refusal."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ..adapters.adapter import flat
from ..adapters.dora import Dora
from ..adapters.full import DIFF
from ..adapters.lora import DOWN, MID
from ..algebra import dora
from ..errors import FormatError, LayoutError, SpecError
from ..layouts.module import LORA_KINDS, Module
from .adapter_inputs import idle_warning
from .convert_spec import DIFFUSERS, KEEP, KOHYA, PEFT, ConvertSpec
from .convert_units import AXIS, CARRY, NEVER_RUN, PLAIN, Out, Source, Unit, is_absent
from .outputs import left_behind

if TYPE_CHECKING:
    from .convert_plan import AdapterPlan

_TITLES = {KOHYA: "kohya's dialect", DIFFUSERS: "diffusers' dialect", PEFT: "PEFT"}
_AXES = {"output": dora.OUTPUT, "input": dora.INPUT}
# what was left out, in words
_SAID = {
    "norms": "{count} norms", "biases": "biases of {count} modules", "embeddings": "{count} changes of embeddings",
    NEVER_RUN: "{count} modules of text layer 23, which diffusers' SD2 text encoder does not have and AUTOMATIC1111 "
    "never runs",
    "without a layer": "{count} modules that have no layer in {model}",
    "no part of any module": "{count} tensors that are part of no module",
}  # fmt: skip


def units_of(plan: AdapterPlan, module: Module, sources: list[Source], outs: list[Out]) -> list[Unit]:
    """The unit of a layer; none where the result cannot say it, which is noted in plan.left_out."""
    spec = plan.spec
    if not outs:
        unknown = NEVER_RUN if is_absent(plan.model.architecture.id, module) else f"no name in {_TITLES[spec.to]}"
        _leave_out(plan, "norms" if all(_rest(s, module) == "norms" for s in sources) else unknown, sources)
        return []
    if spec.to != KOHYA:
        for source in sources:
            if _rest(source, module):
                _leave_out(plan, _rest(source, module), [source])
            elif source.entry.parts.keys() & {"diff_b", "lora_up.bias"}:
                _leave_out(plan, "biases", [source])
        sources = [source for source in sources if not _rest(source, module)]
    if not sources:
        return []
    how = CARRY
    if spec.family != KEEP and not any(_is_carried(source, module) for source in sources):
        how = PLAIN
    elif spec.dora_axis != KEEP and any(turns(source, spec) for source in sources):
        how = AXIS
    return [Unit(module, tuple(sources), tuple(outs), how)]


def _leave_out(plan: AdapterPlan, what: str, sources: list[Source]) -> None:
    plan.left_out.setdefault(what, []).extend(source.entry.key for source in sources)


def _rest(source: Source, module: Module) -> str:
    """norms, embeddings or biases, where a module changes nothing else; "" for a layer's matrix."""
    if source.family.family == "norm" or len(source.shape) < 2:
        return "norms"
    if module.kind not in LORA_KINDS:
        return "embeddings"
    return "biases" if source.family.family == "full" and DIFF not in source.entry.parts else ""


def _is_carried(source: Source, module: Module) -> bool:
    """Whether kohya's files hold it as it is beside plain LoRAs; they have no words for shifts of a norm."""
    return bool(_rest(source, module)) and source.family.family != "svdiff"


def axis_of(source: Source) -> int | None:
    """Where a DoRA's magnitudes stand; None for every other family."""
    if not issubclass(source.family, Dora):
        return None
    return cast(type[Dora], source.family).axis(source.entry.shapes, source.shape)


def turns(source: Source, spec: ConvertSpec) -> bool:
    """Whether a DoRA's magnitudes stand along the other axis than is asked for."""
    axis = axis_of(source)
    return axis is not None and axis != _AXES[spec.dora_axis]


def is_plain(source: Source) -> bool:
    """A LoRA of two factors, with magnitudes or without."""
    return source.family.family in ("lora", "dora") and MID not in source.entry.parts


def keeps_factors(source: Source, spec: ConvertSpec) -> bool:
    """Whether a module that is to be a plain LoRA is one already, and small enough."""
    if source.family.family != "lora" or MID in source.entry.parts or spec.energy is not None:
        return False
    return spec.rank is None or source.entry.shapes[DOWN][0] <= spec.rank


def rank_of(source: Source, how: str, spec: ConvertSpec) -> int | None:
    """The rank that a computed module will have at most: 0 if it is carried over, None if only its size limits it."""
    if how == CARRY or (how == PLAIN and keeps_factors(source, spec)):
        return 0
    limit = min(flat(source.shape))
    own = source.family.rank(source.entry.shapes) if how == AXIS else exact_rank(source)
    wanted = spec.rank or own
    return min(limit, wanted, own) if how == PLAIN and own and wanted else min(limit, wanted) if wanted else None


def exact_rank(source: Source) -> int | None:
    """The rank at which a module is a LoRA exactly; None where its family is not of low rank."""
    tensors = {part: torch.empty(shape, device="meta") for part, shape in source.entry.shapes.items()}
    low = source.family(tensors, 1.0).low_rank()
    return None if low is None else low.rank


# --- refusals -------------------------------------------------------------------------------------------------------


def refuse_swallowing(output: Path, source: Path) -> None:
    """SpecError if the output is a folder in which the input lies: replacing it would delete the input."""
    try:
        inside = output.is_dir() and output.resolve() in source.resolve().parents
    except OSError:
        inside = False
    if inside:
        raise SpecError(f"The LoRA lies within {output.name}, which would be replaced.", hint="Choose another name.")


def check(plan: AdapterPlan) -> None:
    """Raises SpecError or LayoutError for what cannot be converted as asked, and gathers the warnings."""
    _check_names(plan)
    _check_families(plan)
    _check_seams(plan)
    if plan.spec.family != KEEP:
        _check_plain(plan)
    if plan.spec.dora_axis != KEEP:
        _check_axis(plan)
    if plan.spec.to != KOHYA:
        _check_magnitudes(plan)
    if not plan.units and not plan.verbatim:
        shown = "; ".join(f"{len(keys)} {what}" for what, keys in plan.left_out.items())
        raise LayoutError(
            f"{plan.lora.path.name} has nothing that {_TITLES[plan.spec.to]} can say.", f"It holds {shown}.",
            "Choose kohya's dialect.",
        )  # fmt: skip
    _warn(plan)


def _check_names(plan: AdapterPlan) -> None:
    names = Counter([out.name for unit in plan.units for out in unit.outs] + [entry.key for entry in plan.verbatim])
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise FormatError(
            f"Two modules of {plan.lora.path.name} would both be called {twice[0]}.", "Its names contradict each other."
        )


def _of(plan: AdapterPlan, *how: str) -> list[Source]:
    return [source for unit in plan.units if unit.how in how for source in unit.sources]


def _listed(sources: list[Source]) -> str:
    titles = Counter(source.family.title for source in sources)
    return " and ".join(f"{count} {title} modules" for title, count in titles.most_common())


def _check_families(plan: AdapterPlan) -> None:
    """Families that the dialect has no words for."""
    kept = _of(plan, CARRY, AXIS)
    if plan.spec.to == KOHYA:
        foreign = [s for s in kept if "svdiff" in s.family.family]
    else:
        foreign = [s for s in kept if not is_plain(s)]
    if foreign:
        more = " and the checkpoint that they belong to" if any(s.family.needs_weight for s in foreign) else ""
        raise SpecError(
            f"{_TITLES[plan.spec.to]} has no words for {_listed(foreign)}.",
            f"One is {foreign[0].entry.key}.",
            f"Choose the family lora{more}: that makes plain LoRAs of them.",
        )


def _check_seams(plan: AdapterPlan) -> None:
    """Layers that one side fuses and the other keeps apart: only what lies row by row can be cut or joined."""
    for unit in plan.units:
        turned = any(source.swapped != out.swapped for source in unit.sources for out in unit.outs)
        if unit.is_one_to_one and not turned:
            continue
        for source in unit.sources:
            by_rows = unit.how == PLAIN or source.family.family == "full" or is_plain(source)
            sides = unit.how == AXIS and plan.spec.dora_axis == "input"
            if not by_rows or sides or (unit.how != PLAIN and axis_of(source) == dora.INPUT):
                raise SpecError(
                    f"{source.entry.key}, a {source.family.title} module, is of a layer that {_TITLES[plan.spec.to]} "
                    "divides otherwise.",
                    "Such a module can be neither cut nor joined.",
                    "Choose the family lora.",
                )


def _check_plain(plan: AdapterPlan) -> None:
    sources = _of(plan, PLAIN)
    blind = [source for source in sources if source.family.needs_weight]
    if blind and not plan.has_weights:
        raise SpecError(
            f"The change of {_listed(blind)} depends on the checkpoint's weights.",
            f"One is {blind[0].entry.key}.",
            "Name the checkpoint that the LoRA was trained on.",
        )
    if plan.spec.rank is None and plan.spec.energy is None:
        full = [source for source in sources if exact_rank(source) is None]
        if full:
            raise SpecError(
                f"The change of {_listed(full)} is not of low rank.", f"One is {full[0].entry.key}.",
                "Give a rank, or the energy to retain.",
            )  # fmt: skip


def _check_axis(plan: AdapterPlan) -> None:
    spec = plan.spec
    if not any(axis_of(source) is not None for unit in plan.units for source in unit.sources):
        raise SpecError(f"{plan.lora.path.name} has no DoRA magnitudes.", hint="Leave the axis out.")
    turned = _of(plan, AXIS)
    if turned and not plan.has_weights:
        raise SpecError(
            f"Magnitudes over {spec.dora_axis} channels follow from the checkpoint's weights.",
            f"{len(turned)} modules have theirs along the other axis.",
            "Name the checkpoint that the DoRA was trained on.",
        )


def _check_magnitudes(plan: AdapterPlan) -> None:
    """PEFT gives every module of a component magnitudes, or none, and over output rows alone."""
    by_component: dict[str, list[Source]] = defaultdict(list)
    for unit in plan.units:
        if unit.how != PLAIN:
            by_component[unit.module.component] += unit.sources
    for component, sources in by_component.items():
        axes = Counter(axis_of(source) for source in sources)
        if axes[dora.INPUT] and plan.spec.dora_axis != "output":
            raise SpecError(
                f"{axes[dora.INPUT]} modules are DoRA over input channels.",
                f"{_TITLES[plan.spec.to]} knows only magnitudes of output rows.",
                "Name the checkpoint, and choose the output axis or the family lora.",
            )
        if len(axes) > 1 and None in axes:
            raise SpecError(
                f"Of the modules of {component}, {axes[None]} are plain LoRAs and {len(sources) - axes[None]} DoRAs.",
                f"{_TITLES[plan.spec.to]} would take all of them for DoRAs.",
                "Name the checkpoint, and choose the family lora.",
            )


def _warn(plan: AdapterPlan) -> None:
    name = plan.lora.path.name
    plan.warnings += [f"{name}: {note}" for note in plan.lora.file.notes]
    plan.warnings += left_behind(plan.lora.file.file) + idle_warning(plan.lora)
    for what, keys in plan.left_out.items():
        said = _SAID.get(what, f"{{count}} modules that have {what}").format(count=len(keys), model=plan.model.title)
        plan.warnings.append(f"Left out: {said}, such as {keys[0]}.")
    if plan.verbatim:
        plan.warnings.append(
            f"{len(plan.verbatim)} modules have no layer in {plan.model.title}, such as {plan.verbatim[0].key}; they "
            "were carried over as they are."
        )
    if plan.embeddings and plan.spec.to == DIFFUSERS:
        plan.warnings.append(
            f"Left out: {len(plan.embeddings)} tensors of bundled embeddings, which a LoRA file of diffusers "
            "cannot hold."
        )
    if plan.spec.to == KOHYA:
        notes = Counter(n for s in _of(plan, CARRY) for n in s.family.notes(s.entry.shapes))
        plan.warnings += [f"{count} modules: {note}" for note, count in notes.most_common()]
