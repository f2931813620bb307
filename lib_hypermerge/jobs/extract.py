"""Extract: a LoRA or the like from a fine-tuned checkpoint and its base, layer by layer, never building a model."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator

import torch

from ..adapters import lora
from ..adapters.svdiff import DELTA
from ..algebra.lowrank import check_range
from ..errors import NumericalError, UnchangedError
from ..files.dtypes import OUTPUT_DTYPES, torch_dtype
from ..files.metadata import lora_metadata, with_hashes
from ..files.writer import SafetensorsWriter, Written
from ..layouts.module import CONV, Module
from . import extract_header, extract_rests, extract_size
from .devices import resolve_device, whole_float32
from .extract_families import LYCORIS, Comparison, compare
from .extract_fits import FamilyWork, kept
from .extract_layers import LayerResult, LayerWork
from .extract_measure import Measures
from .extract_plan import ExtractPlan, make_plan, shifts_name
from .extract_rests import Rests
from .extract_spec import BEST, LORA, RIVALS, SVDIFF, ExtractSpec
from .host import Context, Host
from .pairing import Pair
from .report import Output, Report
from .workers import map_in_order, plan_workers

__all__ = ["ExtractSpec", "make_plan", "run"]


def run(plan: ExtractPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, UnchangedError, OutputError, InputChangedError."""
    with whole_float32():
        return _Extraction(plan, host, context).run()


class _Extraction:
    def __init__(self, plan: ExtractPlan, host: Host, context: Context):
        self.plan, self.spec, self.context = plan, plan.spec, context
        self.device = resolve_device(plan.spec.device, host.device())
        self.dtype = torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])
        self.workers, self.threads = plan_workers(host.threads(), self.device, plan.bytes_per_worker)
        self.work = LayerWork(plan, self.device, self.dtype)
        self.families = FamilyWork(self.work)
        self.family = plan.spec.family
        self.sample: Comparison | None = None  # by which the family was chosen
        self.measures = Measures(plan.itemsize)
        self.warnings = list(plan.warnings)
        self.ranks: dict[str, int] = {}
        self.conv_ranks: dict[str, int] = {}
        self.identical = 0
        self.nonfinite: list[str] = []
        passes = 2 if plan.spec.rank_rule == "size" or plan.spec.family == BEST else 1
        self._all = passes * sum(_numel(p) for p in plan.layers) + 1
        self._done = 0

    def run(self) -> Report:
        self.context.progress(0.0, "comparing")
        rests = extract_rests.look_at(self.plan.pairing, self.spec, self.work.difference, self._map)
        self.nonfinite += rests.nonfinite
        vae_differs = self._vae_differs()
        if self.spec.family == BEST:
            self._choose_family()
        self.written = Comparison(len(self.plan.layers), (LORA, self.family))
        spectra, chosen = self._allot(rests) if self.spec.rank_rule == "size" else (None, None)
        with SafetensorsWriter(self.plan.output, self._header_reserve(rests, chosen), self.spec.overwrite) as writer:
            self._write_layers(writer, chosen, spectra)
            self._refuse_if_nonfinite()
            modules = self.ranks.keys() | self.conv_ranks.keys()
            extract_rests.write(rests, writer, self.work.difference, self.dtype, modules)
            if not modules and not rests.written:
                raise self._unchanged(rests)
            self._check_inputs()
            self.context.progress(1.0, "saving")
            written = writer.commit(lambda data, legacy: with_hashes(self._metadata(), data, legacy))
        return self._report(written, rests, vae_differs)

    # --- layers -----------------------------------------------------------------------------------

    def _map(self, function, items) -> Iterator:
        return map_in_order(function, items, self.workers, self.threads, self.context.check)

    def _map_layers(self, function, pairs: list[Pair]) -> Generator[LayerResult, None, None]:
        """As _map over pairs, telling the progress."""
        for result in self._map(function, pairs):
            self._done += _numel(result.pair)
            module = result.pair.tuned
            done = min(self._done / self._all, 0.99)  # a size can need more than was foreseen
            self.context.progress(done, f"{module.component} {module.block} {module.path}")
            yield result

    def _choose_family(self) -> None:
        """Measure all families on some layers, and go on with the best."""
        self.sample, nonfinite = compare(self.plan, self.families, self._map_layers)
        if nonfinite and not self.spec.skip_nonfinite:
            self.nonfinite += nonfinite
            self._refuse_if_nonfinite()
        self.family = self.sample.best
        self._all = self._done + sum(_numel(p) for p in self.plan.layers) + 1

    def _allot(self, rests: Rests) -> tuple[dict[str, LayerResult], dict[str, int]]:
        found, nonfinite = extract_size.spectra(self.plan, self.work, self._map_layers)
        self.nonfinite += nonfinite
        self._refuse_if_nonfinite()
        self.nonfinite = list(rests.nonfinite)  # the second pass meets the layers' again
        fused = {p.tuned.fused for p in self.plan.layers if p.key in found and p.tuned.fused}
        zeros = [p for p in self.plan.layers if p.tuned.fused in fused and p.key not in found]
        overhead = 8 + self._header_reserve(rests, {key: 9999 for key in found}) + 8 + 4 * (len(found) + len(zeros))
        overhead += sum(lora.tensor_bytes(1, *p.tuned.matrix_shape, self.plan.itemsize) for p in zeros)
        overhead += sum(math.prod(shape) * self.plan.itemsize for _, shape in extract_rests.tensor_names(rests))
        return found, extract_size.allot(self.plan, self.work, self._map_layers, found, overhead)

    def _write_layers(
        self, writer: SafetensorsWriter, chosen: dict[str, int] | None, spectra: dict[str, LayerResult] | None
    ) -> None:
        def extract(pair: Pair) -> LayerResult:
            if self.family == SVDIFF:
                return self.work.shifts(pair)
            if self.family in RIVALS:
                return self.families.fits(pair, (self.family,))
            return self.work.extract(pair, None if chosen is None else chosen.get(pair.key, 1))

        fused: dict[str, list[tuple[Pair, bool]]] = {}
        for result in self._map_layers(extract, self.plan.layers):
            module = result.pair.tuned
            if result.shifts is not None:
                self._write_shifts(writer, module, result.shifts)
                self.measures.add(result, result)
            elif result.fits is not None:
                self._write_fit(writer, result)
            elif result.factors is not None:
                self._write(writer, module, result.factors.up, result.factors.down)
                self.measures.add(result, spectra[result.pair.key] if spectra else result)
            elif result.status == "identical":
                self.identical += 1
            else:
                self.nonfinite.append(result.pair.key)
            if module.fused and self.family != SVDIFF:
                key = f"{module.component}.{module.fused}"
                fused.setdefault(key, []).append((result.pair, result.status == "written"))
        for group in fused.values():  # A1111 applies q, k, v and out of a fused attention all or none
            if any(written for _, written in group):
                for pair, written in group:
                    if not written:
                        n, k = pair.tuned.matrix_shape
                        self._write(writer, pair.tuned, torch.zeros(n, 1), torch.zeros(1, k))

    def _write(self, writer: SafetensorsWriter, module: Module, up: torch.Tensor, down: torch.Tensor) -> None:
        assert module.name is not None and module.weight is not None
        for name, tensor in lora.tensors(module.name, up.to(self.dtype), down.to(self.dtype), module.weight.shape):
            writer.add(name, tensor)
        (self.conv_ranks if module.kind == CONV else self.ranks)[module.name] = down.shape[0]

    def _write_fit(self, writer: SafetensorsWriter, result: LayerResult) -> None:
        """In the file's family where that is closer than a LoRA of its size, else as a LoRA."""
        assert result.fits is not None
        fit, module = kept(result.fits, self.family), result.pair.tuned
        assert module.name is not None
        for name, tensor in fit.tensors:
            writer.add(name, tensor)
        rank = self.plan.fixed_rank(result.pair) if fit.rank is None else fit.rank
        (self.conv_ranks if module.kind == CONV else self.ranks)[module.name] = rank
        self.measures.add_fit(result, fit)
        self.written.add(result)

    def _write_shifts(self, writer: SafetensorsWriter, module: Module, shifts: torch.Tensor) -> None:
        check_range(shifts, self.dtype)
        name = shifts_name(self.plan, module)
        assert name is not None
        writer.add(f"{name}.{DELTA}", shifts)
        self.ranks[name] = len(shifts)

    def _vae_differs(self) -> bool:
        same = self._map(lambda pair: self.work.difference.equal(*pair), self.plan.pairing.vae)
        return not all(list(same))

    # --- refusals ---------------------------------------------------------------------------------

    def _check_inputs(self) -> None:
        for file in (self.plan.base.file, self.plan.tuned.file):
            file.check_unchanged()

    def _refuse_if_nonfinite(self) -> None:
        if self.nonfinite and not self.spec.skip_nonfinite:
            self._check_inputs()
            shown = ", ".join(self.nonfinite[:5]) + (", …" if len(self.nonfinite) > 5 else "")
            raise NumericalError(
                f"{len(self.nonfinite)} tensors hold NaN or Inf (or overflow): {shown}.",
                "One of the checkpoints is damaged.",
                "Get a sound copy, or ask for such layers to be skipped.",
            )

    def _unchanged(self, rests: Rests) -> UnchangedError:
        if not rests.changed:
            return UnchangedError(
                "Base and fine-tune are identical in the chosen components.",
                hint="Nothing was written. Choose two models.",
            )
        could = rests.not_asked_for["norms"] and self.family != SVDIFF
        return UnchangedError(
            f"Only {len(rests.changed)} tensors outside LoRA layers differ.",
            "All layers that a LoRA reaches are identical in both files.",
            "Include the normalisation layers." if could else "Use the fine-tuned checkpoint itself.",
        )

    # --- metadata and report ----------------------------------------------------------------------

    def _parents(self) -> dict[str, dict]:
        return {role: {"name": model.file.path.name, "bytes": model.file.size}
                for role, model in (("base", self.plan.base), ("tuned", self.plan.tuned))}  # fmt: skip

    def _metadata(self) -> dict[str, str]:
        spec = {k: v for k, v in self.spec.to_json().items() if k not in ("base", "tuned", "out", "overwrite")}
        recipe = {
            "job": "extract", "parameters": spec, "parents": self._parents(),
            "relative_error": round(self.measures.relative_error, 6),
        }  # fmt: skip
        if self.sample:
            recipe["family"] = self.family
        metadata = lora_metadata(
            name=self.plan.output.stem, base=self.plan.base.base, base_file=self.plan.base.file.path.name,
            ranks=self.ranks, conv_ranks=self.conv_ranks, recipe=recipe,
            lycoris=LYCORIS[self.family] if self._kinds().get(self.family) and self.family in RIVALS else None,
        )  # fmt: skip
        if self.family == SVDIFF:  # no network that a WebUI knows, and without dimensions
            metadata = {k: v for k, v in metadata.items() if not k.startswith(("ss_network", "modelspec."))}
        return metadata

    def _families(self) -> dict:
        compared = self.sample or (self.written if self.family in RIVALS else None)
        return compared.to_json() if compared else {"families": [], "families_measured": None}

    def _kinds(self) -> dict[str, int]:
        """How many layers are in the file by family."""
        count = sum(self.measures.methods.values())
        own = self.written.sums[self.family].wins if self.family in RIVALS else count
        return {family: layers for family, layers in ((self.family, own), (LORA, count - own)) if layers}

    def _header_reserve(self, rests: Rests, chosen: dict[str, int] | None) -> int:
        return extract_header.reserve(self.plan, self.family, rests, chosen, self._metadata())

    def _report(self, written: Written, rests: Rests, vae_differs: bool) -> Report:
        m, spec = self.measures, self.spec
        if vae_differs:
            self.warnings.append("The VAE differs too; no LoRA carries it: choose the fine-tune's VAE when generating.")
        if m.fell_back:
            self.warnings.append(f"{m.fell_back} layers were computed on the CPU: the device ran out of memory.")
        if self.nonfinite:
            self.warnings.append(f"{len(self.nonfinite)} tensors with NaN or Inf were skipped.")
        if spec.rank_rule == "size" and written.bytes < 0.98 * (spec.rank_target or 0) * 2**20:
            self.warnings.append("Every layer has all the rank it can use: the file stays below the target size.")
        if self.family in RIVALS and self.family not in self._kinds():
            self.warnings.append("No layer is closer in that family than as a LoRA of its size: the file is a LoRA.")
        whole = m.energy + rests.energy
        out_of_reach = rests.out_of_reach if self.family != SVDIFF else [rest.label for rest in rests.left]
        skipped = {"identical": self.identical, "excluded": len(self.plan.left_out), "nonfinite": len(self.nonfinite)}
        details = {
            "architecture": self.plan.tuned.title,
            "relative_error_with_uncarried": math.sqrt((m.error2 + rests.energy_left) / whole),
            "uncarried_share": rests.energy_left / whole,
            "unreachable_tensors": out_of_reach[:50],
            "not_asked_for": rests.not_asked_for if self.family != SVDIFF else {},
            "skipped_because": skipped,
            "ignored": self.plan.tuned.ignored,
            "vae_differs": vae_differs,
            "components": m.by_component(),
            "family": self.family,
            "family_layers": self._kinds(),
            "gain": self.written.sums[self.family].gain if self.family in RIVALS else None,
            **self._families(),
            "ranks": {str(rank): count for rank, count in sorted(m.ranks.items())},
            "methods": dict(m.methods),
            "curve": m.curve(),
            "device": self.device,
            "threads": self.workers * self.threads,
            "prompt": None if self.family == SVDIFF else f"<lora:{self.plan.output.stem}:1>",
        }  # fmt: skip
        seconds = time.perf_counter() - self.plan.begun
        return Report(
            "extract", [Output(str(written.path), written.bytes, written.sha256)], m.relative_error,
            sum(m.methods.values()), sum(skipped.values()), len(out_of_reach), self.warnings, seconds, details,
        )  # fmt: skip


def _numel(pair: Pair) -> int:
    return pair.tuned.weight.numel if pair.tuned.weight else 0
