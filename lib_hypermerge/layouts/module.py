"""A place in a network, and the tables that describe an architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..files.metadata import BaseModel
from ..files.source import TensorFile, TensorInfo

LAYER_GROUPS = ("attention", "feedforward", "projection", "resnet", "sampling", "embedding", "inout")

# kinds of module; a LoRA changes the first three, norm tensors the fourth, nothing the others
LINEAR, CONV1X1, CONV, NORM, EMBEDDING, PARAMETER = "linear", "conv1x1", "conv", "norm", "embedding", "parameter"
LORA_KINDS = frozenset((LINEAR, CONV1X1, CONV))


@dataclass(frozen=True)
class Module:
    """One layer of one component.

    path: where it is, without `.weight`.  group: one of LAYER_GROUPS, or "" for what no LoRA changes.
    name: its module name in a kohya file, None where no WebUI offers one.  part: the q, k or v slice of a
    fused weight.  fused: modules that A1111 applies only all together share this path.
    """

    component: str
    path: str
    kind: str
    block: str
    group: str
    name: str | None
    weight: TensorInfo | None
    bias: TensorInfo | None = None
    part: str | None = None
    fused: str | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(n, k) of the flattened weight."""
        assert self.weight is not None
        n = self.weight.shape[0]
        return n, self.weight.numel // n if n else 0


@dataclass(frozen=True)
class ComponentTable:
    """How one component (unet, te, te1 …) is spelled.

    prefixes: what may stand before a path, the usual first.  probe: a path every file of it has.
    rename: path → LoRA name or None.  describe: path → (block, group).
    """

    id: str
    title: str
    prefixes: tuple[str, ...]
    probe: str
    rename: Callable[[str], str | None]
    describe: Callable[[str], tuple[str, str]]
    norms_reachable: bool = True
    roots: tuple[str, ...] = ()  # first path segments, needed where the prefix may be empty


# a denoiser's path → its tensor, None if it has no such
Lookup = Callable[[str], TensorInfo | None]


@dataclass(frozen=True)
class Architecture:
    """A family of checkpoints; a new one is a new table.

    components: the denoiser first, then text encoders.  matches: whether a denoiser that has the probe of the
    first component is of this family.  variant: which member, "" for the usual.  bases, titles: of variants that
    have their own.  alike: variants whose layers have the same shapes, so that one can be the base of another.
    """

    id: str
    title: str
    base: BaseModel
    components: tuple[ComponentTable, ...]
    matches: Callable[[Lookup], bool]
    variant: Callable[[Lookup], str] = lambda find: ""
    bases: Mapping[str, BaseModel] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=dict)
    alike: frozenset[str] = frozenset()
    vae_prefixes: tuple[str, ...] = ("first_stage_model.",)


@dataclass
class Model:
    """An open checkpoint seen as modules."""

    architecture: Architecture
    variant: str  # "", "inpainting", "schnell", "3.5-large" …
    file: TensorFile
    components: dict[str, dict[str, Module]] = field(default_factory=dict)
    vae: dict[str, TensorInfo] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)  # what → how many tensors

    @property
    def title(self) -> str:
        usual = f"{self.architecture.title} {self.variant}".rstrip()
        return self.architecture.titles.get(self.variant, usual)

    @property
    def base(self) -> BaseModel:
        """How metadata names it."""
        return self.architecture.bases.get(self.variant, self.architecture.base)

    def is_kind_of(self, other: Model) -> bool:
        """Whether both have the same layers, so that a difference between them means something."""
        same = self.variant == other.variant or {self.variant, other.variant} <= self.architecture.alike
        return self.architecture is other.architecture and same
