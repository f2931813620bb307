"""One verb's panel: its controls, a forecast, Run and Interrupt, progress, and the result."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import gradio as gr

from ..errors import HypermergeError, MissingError
from ..jobs.runner import Job, Runner, forecast
from ..jobs.spec import CHECKPOINT, FLAG, LORA, LORAS, NAME_LISTS, OUTPUT, PREVIEW, PROMPT, has_preview
from ..jobs.verbs import Verb
from . import html
from .compat import on, update
from .following import Following
from .results import error_html, plan_html
from .styles import StyleControls, offers_styles
from .trial import TrialControls, offers_trial
from .widgets import MODELS, Control, Lists, control, element_id, keep_out_of_config, lists_of, values_of

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_HASH = re.compile(r" \[[0-9a-fA-F]+\]$")


class Panel:
    """Builds the controls inside the current gr.Blocks and wires them to a runner."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self.controls: dict[str, Control] = {}
        self._build()
        self._wire()

    # --- what it looks like -----------------------------------------------------------------------

    def _build(self) -> None:
        params, defaults, lists = self.verb.spec.params(), self.verb.spec.defaults(), self._lists()

        def add(field: str) -> None:
            self.controls[field] = control(self.verb.id, field, params[field], defaults[field], lists)

        if has_preview(self.verb.spec):  # a button of its own
            self.controls[PREVIEW] = Control(params.pop(PREVIEW), [], lambda values: False)
        for field in [f for f, p in params.items() if p.paths_only]:
            self.controls[field] = Control(params.pop(field), [], lambda values: None)
        shown = [f for f, p in params.items() if not p.advanced]
        models = [f for f in shown if params[f].kind in MODELS and params[f].kind != LORAS]
        rest = [f for f in shown if params[f].kind not in (*MODELS, PROMPT)]
        advanced = [f for f, p in params.items() if p.advanced]
        styles = offers_styles(self.verb, self.runner)
        with gr.Column(elem_id=self._id("panel"), elem_classes=["hypermerge-offers-styles"] if styles else []):
            gr.HTML(f"<p>{self.verb.help}</p>")
            # a list of files has a row of its own, for many names stand in it
            for number, (_, row) in enumerate(itertools.groupby(models, lambda f: params[f].kind in NAME_LISTS)):
                with gr.Row():
                    for field in row:
                        add(field)
                    if number == 0:
                        self.refresh = gr.Button("🔄", elem_id=self._id("refresh"), elem_classes=["tool"])
            for field in shown:
                if params[field].kind in (PROMPT, LORAS):
                    add(field)
            self._add_rows(rest, params, add)
            if advanced:
                with gr.Accordion("Advanced", open=False, elem_id=self._id("advanced")):
                    self._add_rows(advanced, params, add)
            self.forecast = gr.HTML("", elem_id=self._id("plan"))
            with gr.Row():
                self.run = gr.Button(self.verb.title, variant="primary", elem_id=self._id("run"))
                self.preview = gr.Button("Preview", elem_id=self._id("preview")) if PREVIEW in self.controls else None
                self.trial = TrialControls(self.verb, self.runner) if offers_trial(self.verb, self.runner) else None
                self.interrupt = gr.Button("Interrupt", elem_id=self._id("interrupt"))
            if self.trial:
                self.trial.add_note()
            with gr.Column(
                elem_id=self._id("progress_box"), elem_classes=["progress-container", "hypermerge-progress"]
            ):
                gr.HTML("", elem_id=self._id("progress"))
            self.styles = StyleControls(self.verb, self.runner) if styles else None
            self.following = Following(self.verb, self.runner)
            # the last name for the result that was filled in; what was asked about the present choice, and the answer
            self.suggested = gr.Textbox(visible=False, elem_id=self._id("suggested"))
            self.asked = gr.Textbox(visible=False, elem_id=self._id("asked"))
            self.answer = gr.Textbox(visible=False, elem_id=self._id("answer"))
            hidden = (self.suggested, self.asked, self.answer)
            for component in (*hidden, self.refresh, self.run, self.preview, self.interrupt):
                if component is not None:
                    keep_out_of_config(component)

    def _add_rows(self, fields: list[str], params: dict[str, Any], add: Callable[[str], None]) -> None:
        for chunk in _rows(fields, params):
            with gr.Row():
                for field in chunk:
                    add(field)

    def _id(self, field: str) -> str:
        return element_id(self.verb.id, field)

    @property
    def components(self) -> list[Any]:
        """All that holds a parameter, in the order of the spec."""
        return [c for field in self.verb.spec.params() for c in self.controls[field].components]

    @property
    def pickers(self) -> list[tuple[Any, str]]:
        """The dropdowns of models, with the kind of list that each shows."""
        return [picker for field in self.verb.spec.params() for picker in self.controls[field].pickers]

    # --- what it does -----------------------------------------------------------------------------

    def _wire(self) -> None:
        dropdowns, following = [component for component, _ in self.pickers], self.following
        following.wire()
        self._on_job(self.run.click, self.verb)
        if self.preview:
            self._on_job(self.preview.click, self.verb, preview=True)
        if self.trial:
            self.trial.wire(self._on_job, following.over.click)
        if self.styles:
            self.styles.wire(following.task)
        task = f"() => [hypermergeJobs.task({self.verb.id!r})]"
        on(self.interrupt.click, following.interrupt, [following.task], js=task)
        on(self.refresh.click, self._refresh, dropdowns, dropdowns)
        for held in self.controls.values():
            if held.wire is not None:
                held.wire(self.controls, self.runner.host)
            for component in held.components:  # a name that is being typed is not to be filled in
                self._on_change(component.change, self._plan if held.param.kind == OUTPUT else self._plan_and_name)
        self._on_change(following.over.click, self._name_alone)  # the one that it had is taken now

    def _on_change(self, event: Callable[..., Any], answer: Callable[..., Any]) -> None:
        """What would happen now, and a name for it. The page asks one question at a time, and decides about the
        name, because somebody may have typed meanwhile."""
        verb, inputs = self.verb.id, [self.asked, *self.components]
        asked = on(
            event, answer, inputs, [self.answer],
            js=f"(...values) => hypermerge.ask({verb!r}, values, {len(inputs)})",
        )  # fmt: skip
        out = next((c.components[0] for c in self.controls.values() if c.param.kind == OUTPUT), None)
        shown = [self.forecast] if out is None else [self.forecast, out, self.suggested]
        js = f"(...values) => hypermerge.answered({verb!r}, values, {len(shown) + 1})"
        on(asked.then, None, [self.answer, *shown], shown, js=js)

    def _on_job(self, event: Callable[..., Any], verb: Verb, preview: bool = False, bare: bool = False) -> None:
        """An event that runs a job with the page watching it, and shows its result here. bare: without parameters."""
        self.following.start(
            event, lambda task, *raw: self._submit(verb, task, *raw, preview=preview), [] if bare else self.components
        )

    def _submit(self, verb: Verb, task: str, *raw: Any, preview: bool = False) -> Job:
        values = self._values(raw) if raw else {}
        if verb is not self.verb or preview:  # tried in memory, taken back, or a preview: there will be no file
            self._name_if_unnamed(values)
        if preview:
            values[PREVIEW] = True
        return self.runner.submit(verb, values, task)

    def on_load(self, blocks: gr.Blocks) -> None:
        """When the page is opened: fresh lists, and the last job, in case its page was closed.

        One that is not over yet is followed as if it had been started here.
        """
        dropdowns, following = [component for component, _ in self.pickers], self.following
        outputs = [*dropdowns, following.result, following.news]
        loaded = on(blocks.load, self._loaded, dropdowns, outputs)
        following.when_loaded(loaded)
        if self.trial:
            self.trial.show_after(loaded.then)

    def _values(self, raw: Sequence[Any]) -> dict[str, Any]:
        return values_of(self.verb.spec, self.controls, raw)

    def _plan_and_name(self, asked: str, *raw: Any) -> Any:
        return _answer(asked, lambda: {"plan": self._forecast(*raw), "name": self._fresh_name(*raw)})

    def _plan(self, asked: str, *raw: Any) -> Any:
        return _answer(asked, lambda: {"plan": self._forecast(*raw)})

    def _name_alone(self, asked: str, *raw: Any) -> Any:
        return _answer(asked, lambda: {"name": self._fresh_name(*raw)})

    def _name_if_unnamed(self, values: dict[str, Any]) -> None:
        for field in values:
            if self.verb.spec.params()[field].kind == OUTPUT:
                values[field] = values[field] or "unnamed"

    def _fresh_name(self, *raw: Any) -> str:
        """The verb's idea of a name, numbered so that no model has it yet; empty if there is none."""
        if not hasattr(self.verb.spec, "suggest_name"):
            return ""
        try:
            values = {f: _plain(value, self.verb.spec.params()[f].kind) for f, value in self._values(raw).items()}
            stem = name = getattr(self.verb.spec, "suggest_name")(values)  # noqa: B009 - not every spec has one
            number = 1
            while name and self._is_taken(name):
                number += 1
                name = getattr(self.verb.spec, "numbered", "{}-{}").format(stem, number)
        except (HypermergeError, OSError):  # a model's name need not do as ours, or its folder is not there
            return ""
        return name

    def _is_taken(self, name: str) -> bool:
        host = self.runner.host
        lora = host.lora_output(name)
        return any(path.exists() for path in (lora, lora.with_suffix(""), host.checkpoint_output(name)))

    def _forecast(self, *raw: Any) -> str:
        """What would happen; quiet until every model that the job needs is chosen."""
        try:
            values = self._values(raw)
            params, required = self.verb.spec.params(), self.verb.spec.schema()["required"]
            models = [f for f, p in params.items() if p.kind in MODELS]
            choosing = [f for f, p in params.items() if p.kind in MODELS or p.chooses]
            if not all(values[f] for f in models if f in required) or not any(values[f] for f in choosing):
                return ""
            lists = [f for f in models if params[f].kind in NAME_LISTS and f in required]
            if any(len(values[f]) < params[f].fewest for f in lists):
                return ""
            self._name_if_unnamed(values)
            return self._offers(values) + self._planned(values)
        except HypermergeError as error:
            return error_html(error)

    def _planned(self, values: dict[str, Any]) -> str:
        try:
            return plan_html(forecast(self.verb, self.verb.spec.from_json(values), self.runner.host))
        except MissingError:
            return ""
        except HypermergeError as error:
            return error_html(error)

    def _offers(self, values: dict[str, Any]) -> str:
        """What could stand in text fields, where the verb knows that from what is chosen already."""
        offers = getattr(self.verb.load(), "offers", lambda values, host: {})(values, self.runner.host)
        params = self.verb.spec.params()
        return "".join(html.offers(self._id(field), params[field].label, texts) for field, texts in offers.items())

    def _lists(self) -> Lists:
        return lists_of(self.runner.host.checkpoints(), self.runner.host.loras())

    def _names(self, chosen: Sequence[Any]) -> list[Any]:
        """Dropdown updates; a choice whose title has changed (a hash was added) follows its file."""
        lists, updates = self._lists(), []
        for (_, kind), value in zip(self.pickers, chosen, strict=True):
            names = lists[kind]
            several = isinstance(value, list)
            lost = [name for name in (value if several else [value]) if name and name not in names]
            if not lost:  # leave the value alone: somebody may be choosing one at this moment
                updates.append(update(choices=names))
                continue
            now = {name: self._name_now(name, lists) for name in lost}
            if several:
                kept: Any = [now.get(name, name) for name in value if now.get(name, name)]
            else:
                kept = now[value]
            updates.append(update(choices=names, value=kept))
        return updates if len(updates) != 1 else updates[0]

    def _name_now(self, name: str, lists: Lists) -> str | None:
        """What the host calls today the file that it once called so; None if that is gone."""
        host = self.runner.host
        for kind, resolve in ((CHECKPOINT, host.resolve_checkpoint), (LORA, host.resolve_lora)):
            try:
                path = resolve(name)
                return next((other for other in lists[kind] if resolve(other) == path), None)
            except HypermergeError:
                continue
        return None

    def _refresh(self, *chosen: Any) -> Any:
        self.runner.host.refresh()
        return self._names(chosen)

    def _loaded(self, *chosen: Any) -> list[Any]:
        names = self._names(chosen)
        return [*(names if isinstance(names, list) else [names]), *self.following.last()]


def _answer(asked: str, facts: Callable[[], dict[str, str]]) -> Any:
    """JSON for the page's script; nothing if it has a newer question already."""
    return json.dumps({"asked": asked, **facts()}) if asked else update()


def _plain(value: Any, kind: str) -> Any:
    """A model's name as if it was its file's: without a hash, with a suffix."""
    if kind == LORAS:
        return [{**lora, "lora": _plain(lora["lora"], LORA)} for lora in value or ()]
    if kind not in MODELS or not isinstance(value, str) or not value:
        return value
    name = _HASH.sub("", value)
    return name if PurePath(name).suffix.lower() in _SUFFIXES else f"{name}.safetensors"


def _rows(fields: list[str], params: dict[str, Any]) -> list[list[str]]:
    """Three controls a row; names stand alone, switches together at the end."""
    plain = [f for f in fields if params[f].kind not in (FLAG, OUTPUT)]
    flags = [f for f in fields if params[f].kind == FLAG]
    rows = [[f] for f in fields if params[f].kind == OUTPUT]
    rows += [plain[i : i + 3] for i in range(0, len(plain), 3)]
    return rows + ([flags] if flags else [])
