"""The files of a hyper-merge while they are written: hyper-model, LoRAs, container, recipe; they appear together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from ...adapters import full, lora
from ...files.checkpoint_writer import CheckpointWriter
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.metadata import lora_metadata, with_hashes
from ...files.together import publish_together
from ...files.unnamed import TextWriter, UnnamedFile, Written
from ...files.writer import SafetensorsWriter, header_bytes
from ...layouts.module import CONV, Module
from ..outputs import RECIPE, STALE, parent
from .container import Stated, container_metadata, header_reserve, module_tensors
from .finish import Box
from .plan import HyperPlan
from .recipe import Recipe

_SLACK = 2048  # bytes of header for what is measured last
_WIDEST = 10**11  # an offset that no file reaches


class Files:
    """Use as a context: leaving it before publish() removes every trace. ranks: of the LoRAs, as planned.

    draft: the recipe as far as it is known before the last pass; the hyper-model's header has it.
    """

    def __init__(self, plan: HyperPlan, ranks: Sequence[int], draft: Recipe):
        self.plan, self._stack = plan, contextlib.ExitStack()
        self.model: CheckpointWriter | None = None
        self.container: SafetensorsWriter | None = None
        self.loras: list[SafetensorsWriter] = []
        self._ranks: list[dict[str, int]] = [{} for _ in draft.loras]
        self._conv_ranks: list[dict[str, int]] = [{} for _ in draft.loras]
        overwrite = plan.spec.overwrite
        try:
            for path in (plan.model_output, plan.loras[0]):
                path.parent.mkdir(parents=True, exist_ok=True)
            if plan.writes_model:
                metadata = _model_metadata(plan, draft)
                self.model = self._stack.enter_context(
                    CheckpointWriter(plan.model_output, plan.tensors, metadata, overwrite)
                )
            if plan.writes_loras:
                for i, path in enumerate(plan.loras[: len(draft.loras)]):
                    reserve = _lora_header(plan, draft, i)
                    self.loras.append(self._stack.enter_context(SafetensorsWriter(path, reserve, overwrite)))
            if plan.writes_container:
                names = [f"{layer.module.name}" for layer in plan.inputs.layers]
                reserve = header_reserve(names, _container_metadata(plan, draft)) + _SLACK + 64 * plan.models
                self.container = self._stack.enter_context(SafetensorsWriter(plan.container_output, reserve, overwrite))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def add(self, i: int, module: Module, factors: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """LoRA i's module. None: nothing, but for the parts of fused layers, which A1111 applies all or none."""
        assert module.name is not None and module.weight is not None
        if factors is None:
            if not module.fused:
                return
            n, k = module.matrix_shape
            dtype = _dtype(self.plan)
            factors = torch.zeros(n, 1, dtype=dtype), torch.zeros(1, k, dtype=dtype)
        for name, tensor in lora.tensors(module.name, *factors, module.weight.shape):
            self.loras[i].add(name, tensor)
        (self._conv_ranks if module.kind == CONV else self._ranks)[i][module.name] = len(factors[1])

    def add_whole(self, i: int, module: Module, change: torch.Tensor) -> None:
        """LoRA i's module as one matrix."""
        assert module.name is not None and module.weight is not None
        self.loras[i].add(f"{module.name}.{full.DIFF}", change.reshape(module.weight.shape))
        self._ranks[i][module.name] = min(module.matrix_shape)

    def add_box(self, module: Module, box: Box | None) -> None:
        """The container's module. None: nothing, but for the parts of fused layers, which A1111 applies all or none."""
        assert self.container is not None and module.name is not None and module.weight is not None
        if box is None:
            if not module.fused:
                return
            (n, k), dtype, M = module.matrix_shape, _dtype(self.plan), self.plan.models
            up, down, cores = (torch.zeros(shape, dtype=dtype) for shape in ((n, 1), (1, k), (M, 1, 1)))
            box = Box(up, down, cores, torch.zeros(M, dtype=torch.float64))
        for name, tensor in module_tensors(module.name, box.up, box.down, box.cores, module.weight.shape):
            self.container.add(name, tensor)

    def publish(self, recipe: Recipe, more: Sequence[UnnamedFile], journal: Path | None) -> list[Written]:
        """Seal everything and give the files their names: hyper-model, LoRAs, container, `more`, recipe."""
        files: list[UnnamedFile] = []
        if self.model is not None:
            self.model.seal()
            files.append(self.model)
        for i, writer in enumerate(self.loras):
            metadata = _lora_metadata(self.plan, recipe, i, self._ranks[i], self._conv_ranks[i])
            writer.seal(lambda data, legacy, own=metadata: with_hashes(own, data, legacy))  # noqa: B023
            files.append(writer)
        if self.container is not None:
            metadata = _container_metadata(self.plan, recipe)
            self.container.seal(lambda *_: metadata)
            files.append(self.container)
        text = json.dumps(recipe.to_json(), ensure_ascii=False, indent=1)
        with TextWriter(self.plan.recipe_output, text, overwrite=self.plan.spec.overwrite) as last:
            last.seal()
            return publish_together([*files, *more, last], journal)


def parameters(plan: HyperPlan) -> dict[str, Any]:
    """Of the spec, for the recipe; names of files without their folders, which are nobody else's business."""
    own = plan.spec.to_json()
    for key in ("models", "name", "out_dir", "overwrite", "preview"):
        del own[key]
    for key in ("base", "rest_from", "vae_from"):
        own[key] = own[key] and PurePath(own[key]).name
    return {key: value for key, value in own.items() if value is not None}


def parents(plan: HyperPlan) -> dict[str, Any]:
    """The files that went in, by label."""
    found = {source.label: parent(source.file) for source in plan.inputs.sources}
    return found | ({"base": parent(plan.inputs.base.file)} if plan.inputs.base else {})


def _dtype(plan: HyperPlan) -> torch.dtype:
    return torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])


def _model_metadata(plan: HyperPlan, draft: Recipe) -> dict[str, str]:
    metadata = {key: text for key, text in plan.inputs.template.file.metadata.items() if key not in STALE}
    metadata.setdefault("format", "pt")
    if "modelspec.title" in metadata:
        metadata["modelspec.title"] = plan.model_output.stem
    metadata["modelspec.merged_from"] = ", ".join(source.path.name for source in plan.inputs.sources)
    metadata[RECIPE] = draft.text()
    return metadata


def _lora_metadata(
    plan: HyperPlan, recipe: Recipe, i: int, ranks: dict[str, int], conv: dict[str, int]
) -> dict[str, str]:
    stem = recipe.loras[i]
    own: dict[str, Any] = {
        "job": "hyper-lora", "hyper": recipe.hyper, "number": i + 1, "of": len(recipe.loras),
        "multipliers": {model: row[stem] for model, row in recipe.multipliers.items()},
    }  # fmt: skip
    if recipe.te_multipliers is not None:
        own["te_multipliers"] = {model: row[stem] for model, row in recipe.te_multipliers.items()}
    return lora_metadata(
        name=stem, base=plan.inputs.template.base, base_file=recipe.hyper, ranks=ranks, conv_ranks=conv, recipe=own
    )


def _entry(shape: Sequence[int]) -> dict[str, Any]:
    return {"dtype": "BF16", "shape": list(shape), "data_offsets": [_WIDEST, _WIDEST]}


def _lora_header(plan: HyperPlan, draft: Recipe, i: int) -> int:
    entries: dict[str, dict] = {}
    ranks = {}
    for layer in plan.inputs.layers:
        module = layer.module
        assert module.name is not None and module.weight is not None
        rank, shape = min(layer.shape), module.weight.shape
        entries[f"{module.name}.{lora.DOWN}"] = _entry((rank, *shape[1:]))
        entries[f"{module.name}.{lora.UP}"] = _entry((shape[0], rank, 1, 1))
        entries[f"{module.name}.alpha"] = _entry(())
        ranks[module.name] = rank
    metadata = with_hashes(_lora_metadata(plan, draft, i, ranks, ranks), "0" * 64, "0" * 8)
    return len(header_bytes(entries, metadata)) + _SLACK


def _container_metadata(plan: HyperPlan, recipe: Recipe) -> dict[str, str]:
    base = plan.inputs.template.base
    return container_metadata(Stated(tuple(plan.inputs.labels), recipe.hyper, base), recipe)
