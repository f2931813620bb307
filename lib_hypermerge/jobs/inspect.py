"""Inspect: what model files are and hold, from their headers at once, from their numbers where asked."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..errors import REQUEST_IS_WRONG
from ..layouts.adapter_file import AdapterFile
from ..layouts.module import Model
from . import inspect_duplicates
from .host import Context, Host
from .inspect_checkpoint import checkpoint_facts
from .inspect_common import metadata_facts, sendable
from .inspect_hosts import checkpoint_hosts
from .inspect_other import Other, counted_as, other_facts
from .inspect_plan import InspectPlan, Item, make_plan
from .inspect_spec import InspectSpec
from .report import Report

if TYPE_CHECKING:
    from .inspect_adapter import Seen

__all__ = ["InspectSpec", "make_plan", "run"]


def run(plan: InspectPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, FormatError (a file breaks off) or InputChangedError."""
    return _Inspection(plan, host, context).run()


class _Inspection:
    def __init__(self, plan: InspectPlan, host: Host, context: Context):
        self.plan, self.spec, self.host, self.context = plan, plan.spec, host, context
        self.warnings: list[str] = []
        self.seen: dict[int, Seen] = {}  # by place in plan.items
        self.book = inspect_duplicates.HashBook(self._read)
        self._all, self._done, self._text = max(1, plan.bytes_to_read), 0.0, "reading"

    def run(self) -> Report:
        self.context.progress(0.0, "reading headers")
        files = [self._facts(index, item) for index, item in enumerate(self.plan.items)]
        details: dict[str, Any] = {"files": files, "similarity": self._similarity(), "device": "cpu"}
        if self.spec.duplicates:
            details |= self._duplicates()
        details["told_equal"] = self._told_equal(files)
        failed = [item for item in self.plan.items if item.error is not None]
        details["failed"] = len(failed)
        self._warn_of_aliases(files)
        for item in self.plan.items:
            if item.content is not None and self.plan.bytes_to_read:
                item.content.file.check_unchanged()
        self.context.progress(1.0, "done")
        return Report(
            "inspect", modules=sum(file.get("modules") or 0 for file in files), warnings=sendable(self.warnings),
            seconds=time.perf_counter() - self.plan.begun, details=sendable(details),
            exit_code=REQUEST_IS_WRONG if failed else 0,
        )  # fmt: skip

    # --- one file ---------------------------------------------------------------------------------

    def _facts(self, index: int, item: Item) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": item.name, "path": str(item.path) if item.path else None}
        if item.content is None:
            assert item.error is not None
            return facts | {"kind": "unreadable", "error": item.error.to_json()}
        self._text = item.content.file.path.name
        facts |= {"bytes": item.bytes, "format": _format(item), **metadata_facts(item.content.file.metadata)}
        if isinstance(item.content, Model):
            facts |= checkpoint_facts(item.content)
            facts["hosts"] = checkpoint_hosts(item.content, item.path or item.content.file.path, facts["markers"])
            if self.spec.measures:
                facts["values"] = self._values(item.content)
        elif isinstance(item.content, Other):
            facts |= other_facts(item.content)
            if self.spec.measures:
                facts["values"] = self._values(item.content)
        else:
            facts |= self._adapter_facts(index, item.content)
        if self.spec.hashes:
            facts["hashes"] = self._hashes(item)
        return facts

    def _values(self, content: Model | Other) -> dict[str, Any]:
        from .inspect_values import components_of, measure_values  # brings torch, which headers need not wait for

        file = content.file
        owner = components_of(content) if isinstance(content, Model) else counted_as(content)
        on_bytes = self._shares(file.size, lambda: file.size)
        return measure_values(file, owner, self.host.threads(), on_bytes, self.context.check)

    def _adapter_facts(self, index: int, file: AdapterFile) -> dict[str, Any]:
        from . import inspect_adapter  # brings torch, which a checkpoint's header need not wait for

        seen = self.seen[index] = inspect_adapter.see(file, self.plan.base)
        facts = inspect_adapter.adapter_facts(seen)
        if self.spec.measures:
            from .inspect_measure import measure

            on_module = self._shares(file.file.size, lambda: len(seen.pieces))
            facts["measured"] = measure(seen, self.spec.spectra, self.host.threads(), on_module, self.context.check)
        return facts

    def _hashes(self, item: Item) -> dict[str, Any] | None:
        if item.path is None or not item.path.is_file() or item.content is None:
            return None
        hashes = self.book.of(item.path)
        stored = item.content.file.metadata.get("sshs_model_hash")
        if stored and stored != hashes.data_sha256:
            self.warnings.append(
                f"{item.path.name}: the hash stored in it is not that of its data; pasted prompts find another file."
            )
        return {
            "sha256": hashes.sha256, "autov2": hashes.autov2, "data_sha256": hashes.data_sha256,
            "autov3": hashes.autov3, "legacy": hashes.legacy, "stored": stored,
            "stored_is_right": None if not stored else stored == hashes.data_sha256,
        }  # fmt: skip

    # --- several files ----------------------------------------------------------------------------

    def _similarity(self) -> list[dict[str, Any]]:
        """A matrix for the LoRAs of each architecture, and one for checkpoints of each kind."""
        if not self.plan.compares:
            return []
        groups: dict[str, list[int]] = {}
        for index, seen in self.seen.items():
            if seen.architecture is not None:
                groups.setdefault(seen.architecture, []).append(index)
        out = [self._of_adapters(indices) for indices in groups.values() if len(indices) > 1]
        return out + [self._of_checkpoints(indices) for indices in self._kinds() if len(indices) > 1]

    def _of_adapters(self, indices: list[int]) -> dict[str, Any]:
        from .inspect_similarity import similarity

        self._text = "comparing LoRAs"
        files = [self.seen[index] for index in indices]
        on_layer = self._shares(sum(seen.file.file.size for seen in files), lambda: 1)
        found = similarity(files, self.host.threads(), lambda done, of: on_layer(done / of), self.context.check)
        if found["left_out"]:
            why = ", ".join(f"{count} × {reason}" for reason, count in found["left_out"].items())
            self.warnings.append(f"Not in the comparison: {why}.")
        return {"kind": "adapters", "of": "changes", "files": indices, "title": files[0].title, **found}

    def _kinds(self) -> list[list[int]]:
        """Checkpoints with the same layers, so that a difference means something."""
        kinds: list[list[int]] = []
        models = {i: item.content for i, item in enumerate(self.plan.items) if isinstance(item.content, Model)}
        for index, model in models.items():
            own = next((kind for kind in kinds if models[kind[0]].is_kind_of(model)), None)
            if own is None:
                kinds.append([index])
            else:
                own.append(index)
        return kinds

    def _of_checkpoints(self, indices: list[int]) -> dict[str, Any]:
        from .inspect_weights import matrices, products

        self._text = "comparing checkpoints"
        models = [m for index in indices if isinstance(m := self.plan.items[index].content, Model)]
        base = self.plan.base if self.plan.base is not None and self.plan.base.is_kind_of(models[0]) else None
        full = self.spec.similarity == "full"
        size = sum(model.file.size if full else min(model.file.size, 256 << 20) for model in models)
        on_values = self._shares(size, lambda: 1)
        found = products(
            models, base, full, self.host.threads(), lambda done, of: on_values(done / of), self.context.check
        )
        if found.nonfinite:
            self.warnings.append(f"{found.nonfinite} values of the checkpoints are NaN or Inf; they were left out.")
        return {
            "kind": "checkpoints", "of": "weights" if base is None else "changes", "files": indices,
            "title": models[0].title, "base": None if base is None else base.file.path.name,
            "values": found.values, "all_values": found.all_values, **matrices(found),
        }  # fmt: skip

    def _duplicates(self) -> dict[str, Any]:
        self._text = "looking for duplicates"
        names = inspect_duplicates.listed(self.host)
        given = [item.path for item in self.plan.items if item.path is not None]
        pairs = inspect_duplicates.candidates(given, names)
        found = inspect_duplicates.duplicates(pairs, names, self.book)
        return {"duplicates": found, "looked_at": len({*given, *names})}

    def _told_equal(self, files: list[dict[str, Any]]) -> list[dict[str, str]]:
        """Pairs that name the same hash in their metadata; no proof, but free."""
        told = [(file["name"], file.get("metadata", {}).get("sshs_model_hash")) for file in files]
        return [{"file": a, "equals": b} for (a, x), (b, y) in combinations(told, 2) if x and x == y]

    def _warn_of_aliases(self, files: list[dict[str, Any]]) -> None:
        """WebUIs stop listing a name that two files give themselves."""
        names: dict[str, list[str]] = {}
        for file in files:
            if file.get("alias"):
                names.setdefault(file["alias"].lower(), []).append(file["name"])
        for alias, owners in names.items():
            if len(set(owners)) > 1:
                self.warnings.append(
                    f"{' and '.join(owners)} both call themselves {alias!r} in prompts: a WebUI then takes file names."
                )

    # --- progress ---------------------------------------------------------------------------------

    def _shares(self, size: int, of: Callable[[], int]) -> Callable[[float], None]:
        """A function that is told how far a piece of work worth so many bytes is."""
        before = self._done

        def tell(done: float) -> None:
            self._done = before + size * done / max(1, of())
            self._tell()

        return tell

    def _read(self, count: int) -> None:
        self._done += count
        self._tell()

    def _tell(self) -> None:
        self.context.progress(min(self._done / self._all, 0.99), self._text)


def _format(item: Item) -> str:
    if item.path is not None and item.path.is_dir():
        return "folder"
    assert item.content is not None
    return type(item.content.file).__name__.removesuffix("File").lower()
