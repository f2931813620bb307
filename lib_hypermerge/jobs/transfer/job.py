"""Transfer: blocks paired, layers compared, and every LoRA's changes carried from one base to the other."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...errors import HypermergeError, OutputError, UnchangedError
from ...files.unnamed import Written
from ...words import counts, two_digits
from ..devices import whole_float32
from ..host import Context, Host
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from .layers import COPIED, MAPPED, NO_LAYER, Carried, LayerWork
from .matching import Matcher
from .measure import WRITTEN, Measures, ratio, root
from .pairing import GUESS
from .plan import Layout, TransferPlan
from .planning import changes_nothing, make_plan, none_left
from .relation import UNRELATED, refuse_strangers, sample_first
from .spec import CROSS, LORA_X, TransferSpec
from .writing import Files

__all__ = ["TransferSpec", "make_plan", "run"]

_LOSSY = 0.5  # of the energy: keeping less is worth a note


def run(plan: TransferPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, LayoutError (unrelated models), UnchangedError (nothing is left),
    NumericalError, OutputError, InputChangedError; of a batch, what concerns one LoRA alone stands in the report."""
    with whole_float32():
        return _Transfer(plan, host, context).run()


class _Transfer:
    def __init__(self, plan: TransferPlan, host: Host, context: Context):
        self.plan, self.spec, self.context = plan, plan.spec, context
        self.workers, self.threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
        self.work, self.measures = LayerWork(plan), Measures(len(plan.loras))
        self.warnings = list(plan.warnings)
        self.files: Files | None = None
        self.failed: dict[int, HypermergeError] = {}  # by the LoRA's number, besides those of the plan
        choice, layers = plan.choice_numel, sum(task.numel for task in plan.layout.tasks)
        self._all, self._done = max(1, choice + layers), 0

    def run(self) -> Report:
        self.context.progress(0.0, "reading")
        matcher = Matcher(self.plan, self._map, self._did)
        layout = self.plan.lay_out(matcher.choose)
        with contextlib.ExitStack() as stack:
            self.files = None if self.spec.preview else stack.enter_context(Files(self.plan, layout))
            for carried in self._map(self.work.carry, sample_first(layout.tasks)):
                self._take(carried)
                refuse_strangers(self.plan, self.measures.known, complete=False)
            self._lose(layout)
            for model in (self.plan.source, self.plan.target):
                model.file.check_unchanged()
            if self.alive:
                refuse_strangers(self.plan, self.measures.known, complete=True)
            for i in self.alive:
                self._finish(i)
            if not self.alive:
                raise none_left(self._failures, "could")
            self.context.progress(0.99, "saving")
            written = [] if self.files is None else self.files.publish(self.alive)
        return self._report(written, matcher.told)

    @property
    def alive(self) -> list[int]:
        """The LoRAs that nothing is wrong with."""
        return [i for i in range(len(self.plan.loras)) if i not in self.failed]

    @property
    def _failures(self) -> dict[str, HypermergeError]:
        return self.plan.failed | {self.plan.loras[i].path.name: error for i, error in self.failed.items()}

    def _fail(self, number: int, error: HypermergeError) -> None:
        """Of a batch: the others go on."""
        if number not in self.failed:
            self.failed[number] = error
            self.measures.drop(number)
            if self.files is not None:
                self.files.drop(number)

    def _map(self, function, items) -> Iterator[Any]:
        return map_in_order(function, items, self.workers, self.threads, self.context.check)

    def _take(self, carried: Carried) -> None:
        for i, error in carried.failed.items():
            self._fail(i, error)
        self.measures.add(carried, self.failed)
        target = carried.task.partner.target
        for i, moved in carried.moved.items():
            if self.files is not None and i not in self.failed and moved.action in WRITTEN and moved.tensors:
                entry, _ = carried.task.uses[i][0]
                is_lora = moved.action != COPIED or "lora_down.weight" in moved.tensors
                family = "lora" if is_lora else self.plan.loras[i].families[entry.key].family
                self.files.add(i, target, moved.tensors, family)
        self._did(carried.task.numel, f"{target.component} {target.path}")

    def _did(self, numbers: int, text: str) -> None:
        self._done += numbers
        self.context.progress(0.97 * min(1.0, self._done / self._all), text)

    def _lose(self, layout: Layout) -> None:
        """What has no layer in the target is measured too, so that the report can tell how much that is."""
        lost = [(i, key, uses) for i in self.alive for key, uses in layout.lost[i].items()]
        found = self._map(lambda item: self.work.lose(item[0], item[2]), lost)
        for (i, key, _), moved in zip(lost, found, strict=True):
            if isinstance(moved, HypermergeError):
                self._fail(i, moved)
            elif i not in self.failed:
                self.measures.loras[i].lose(key.split(".", 1)[0], moved)

    # --- the end of one LoRA ----------------------------------------------------------------------

    def _finish(self, number: int) -> None:
        try:
            self.plan.loras[number].file.file.check_unchanged()
            self._refuse(number)
            if self.files is not None:
                self.files.finish(number, self._facts(number))
        except OutputError:
            raise
        except HypermergeError as error:
            if not self.plan.is_batch:
                raise
            self._fail(number, error)

    def _refuse(self, number: int) -> None:
        """UnchangedError for a result without a layer."""
        lora = self.measures.loras[number]
        if lora.is_zero:
            raise changes_nothing(self.plan.loras[number])
        if not lora.modules:
            why = ", ".join(f"{count} {why}" for why, count in lora.actions.items())
            raise UnchangedError(
                f"Nothing would be left in {self.plan.outputs[number].name}.", f"All modules are left out: {why}.",
                "Lower the least similarity, choose the method cross for other sizes, or force it.",
            )  # fmt: skip

    # --- what came out ----------------------------------------------------------------------------

    def _facts(self, number: int) -> dict[str, Any]:
        of = self.measures.of_lora(number)
        similarity = self.measures.similarity
        facts = {"similarity": similarity, "retained": of["retained"], "arrived": of["arrived"]}
        return {key: round(value, 6) for key, value in facts.items() if value is not None}

    def _report(self, written: list[Written], choices: list[dict[str, Any]]) -> Report:
        spec, measures = self.spec, self.measures
        loras = []
        for i in self.alive:
            names = {"name": self.plan.loras[i].path.name, "output": self.plan.outputs[i].name}
            loras.append(names | measures.of_lora(i))
        self._warn(loras)
        skipped: Counter[str] = Counter()
        actions: Counter[str] = Counter()
        for lora in loras:
            actions.update(lora["actions"])
            skipped.update(lora["skipped_because"])
        details = {
            "architecture": self.plan.target.title, "source": self.plan.source.file.path.name,
            "target": self.plan.target.file.path.name, "method": spec.method, "basis_energy": spec.energy,
            "threshold": spec.threshold, "forced": spec.force, "preview": spec.preview,
            "similarity": measures.similarity, "layers_compared": len(measures.known),
            "layers_equal": sum(layer["equal"] for layer in measures.layers),
            "actions": dict(actions), "skipped_because": dict(skipped),
            "paired": dict(Counter(layer["paired_by"] for layer in measures.layers)), "choices": choices,
            "components": measures.components(), "loras": loras,
            "failed": [{"name": name, "error": error.to_json()} for name, error in self._failures.items()],
            "layers": sorted(measures.layers, key=lambda one: (one["component"] != "unet", one["component"],
                                                               one["block"], one["layer"])),
            "device": "cpu",
        }  # fmt: skip
        if len(written) == 1:
            details["prompt"] = f"<lora:{written[0].path.stem}:1>"
        sums = [lora.total for lora in measures.loras]
        error = root(ratio(sum(s.error2 for s in sums), sum(s.energy for s in sums)))
        computed = sum(count for action, count in actions.items() if action != COPIED) or any(s.error2 for s in sums)
        return Report(
            "transfer", [Output(str(w.path), w.bytes, w.sha256) for w in written],
            error if computed else None, sum(actions.values()), sum(skipped.values()),
            skipped[NO_LAYER], self.warnings, time.perf_counter() - self.plan.begun, details,
            exit_code=1 if details["failed"] else 0,
        )  # fmt: skip

    def _warn(self, loras: list[dict[str, Any]]) -> None:
        similarity = self.measures.similarity
        if self.spec.force and (similarity is None or similarity < UNRELATED):
            told = "Nothing tells whether the two bases are related."
            if similarity is not None:
                told = f"The similarity of the two bases is {two_digits(similarity)}, which is that of strangers."
            self.warnings.append(f"Forced. {told}")
        for lora, own in zip(loras, (self.measures.loras[i] for i in self.alive), strict=True):
            retained = lora["retained"]
            if self.spec.method in (LORA_X, CROSS) and retained is not None and retained < _LOSSY:
                instead = "" if lora["actions"].get(MAPPED) else " Copying or prolora would keep it."
                self.warnings.append(
                    f"{lora['name']}: {100 * retained:.0f} % of the change (squared) were kept; the rest lies outside "
                    f"the leading directions.{instead}"
                )
            if own.became_plain:
                self.warnings.append(
                    f"{lora['name']}: {counts(own.became_plain)} modules became plain LoRAs of rank up to "
                    f"{own.largest_rank}, of what they change in the source; the largest rank (--rank) limits that."
                )
            if own.lost_biases:
                self.warnings.append(f"{lora['name']}: {own.lost_biases} changes of biases have no place; left out.")
        guessed = sum(layer["paired_by"] == GUESS for layer in self.measures.layers)
        if guessed:
            self.warnings.append(f"{guessed} layers were paired by their order alone: sizes let nothing be compared.")
        mapped = sum(lora["actions"].get(MAPPED, 0) for lora in loras)
        if mapped:
            self.warnings.append(
                f"{mapped} modules went from one size to another, direction by direction: a guess that no measure "
                "confirms. Look at the pictures."
            )
