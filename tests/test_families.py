"""One contract for all families of adapters: their change is the one that the definition gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families_naive import CASES, CONV1, CONV3, LINEAR, NORM, Case, dora, magnitudes

from lib_hypermerge.adapters import families
from lib_hypermerge.adapters.adapter import Adapter
from lib_hypermerge.errors import FormatError

EXACT, SINGLE = 1e-12, 3e-5
PLACES = [(name, shape) for name, case in CASES.items() for shape in case.shapes]
STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}


def rng(*seed: object) -> np.random.Generator:
    return np.random.default_rng(list(repr(seed).encode()))


def made(name: str, shape: tuple[int, ...]) -> tuple[Case, dict[str, np.ndarray], np.ndarray]:
    case, source = CASES[name], rng(name, shape)
    return case, case.make(source, shape), source.standard_normal(shape)


def tensors(parts: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Whole numbers keep their type, as indices do in a file."""
    out = {}
    for name, array in parts.items():
        tensor = torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)
        out[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return out


def shapes_of(parts: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in parts.items()}


def close(change: torch.Tensor, W: np.ndarray, tuned: np.ndarray, tolerance: float) -> bool:
    """‖change − (W' − W)‖ within a share of what was computed with."""
    return np.linalg.norm(change.double().numpy() - (tuned - W)) <= tolerance * (
        np.linalg.norm(tuned) + np.linalg.norm(W)
    )


@pytest.mark.parametrize(("name", "shape"), PLACES)
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_change_is_the_definitions(name, shape, alpha, dtype):
    case, parts, W = made(name, shape)
    weight = torch.from_numpy(W).to(dtype)
    stored = tensors(parts)
    kept = {part: tensor.clone() for part, tensor in stored.items()}
    change = families.build(stored, alpha).change(weight)
    assert (change.shape, change.dtype) == (weight.shape, dtype)
    tuned = case.tuned(parts, W, alpha)
    assert np.linalg.norm(tuned - W) > 1e-3 * np.linalg.norm(W)  # there is something to see
    assert close(change, W, tuned, EXACT if dtype == torch.float64 else SINGLE)
    assert torch.equal(weight, torch.from_numpy(W).to(dtype))
    assert all(torch.equal(tensor, kept[part]) for part, tensor in stored.items())


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_files_of_any_number_format(name, shape, dtype):
    case, parts, W = made(name, shape)
    stored = tensors(parts, STORED[dtype])
    rounded = {part: tensor.double().numpy() for part, tensor in stored.items()}
    rounded |= {part: array for part, array in parts.items() if array.dtype.kind == "i"}
    change = families.build(stored, 2.0).change(torch.from_numpy(W).float())
    assert change.dtype == torch.float32
    assert close(change, W, case.tuned(rounded, W, 2.0), SINGLE)


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_what_a_file_shows_before_its_tensors_are_read(name, shape):
    case, parts, _ = made(name, shape)
    shapes = shapes_of(parts)
    family = families.family_of(shapes)
    assert family.family == case.family
    assert family.rank(shapes) == case.rank
    assert family.fits(shapes, shape)
    assert all(isinstance(note, str) and note for note in family.notes(shapes))
    if case.family == "svdiff" or name.startswith("ia3"):  # one side alone is known
        misfits = [tuple(size + 1 for size in shape)] if len(shape) > 1 else []
    else:
        misfits = [(shape[0] + 1, *shape[1:])]
        if len(shape) > 1 and case.family != "oft":  # which turns rows of any length
            misfits += [(shape[0], shape[1] + 1, *shape[2:]), *([LINEAR, CONV1] if shape == CONV3 else [])]
    assert [misfit for misfit in [*misfits, (24, 5)] if family.fits(shapes, misfit)] == []


@pytest.mark.parametrize("name", ["lora", "loha", "lokr-whole-factored", "glora", "full", "oft", "svdiff"])
def test_a_linear_layer_may_be_stored_as_a_1x1_convolution_and_the_reverse(name):
    for stored, layer in ((LINEAR, CONV1), (CONV1, LINEAR)):
        case, parts, W = made(name, stored)
        adapter = families.build(tensors(parts), 2.0)
        assert adapter.fits(adapter.shapes, layer)
        change = adapter.change(torch.from_numpy(W.reshape(layer)))
        assert change.shape == layer
        assert close(change.reshape(stored), W, case.tuned(parts, W, 2.0), EXACT)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr-factored-factored"])
def test_a_convolutions_factors_may_be_stored_flattened(name):
    case, parts, W = made(name, CONV3)
    flattened = {part: array.reshape(len(array), -1) for part, array in parts.items()}
    adapter = families.build(tensors(flattened), 2.0)
    assert adapter.fits(adapter.shapes, CONV3)
    assert close(adapter.change(torch.from_numpy(W)), W, case.tuned(parts, W, 2.0), EXACT)


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_the_factored_form_is_the_same_change(name, shape):
    case, parts, W = made(name, shape)
    adapter = families.build(tensors(parts), 2.0)
    low = adapter.low_rank(torch.float64)
    if case.family not in ("lora", "loha", "lokr"):
        assert low is None
        return
    short = min(shape[0], int(np.prod(shape[1:])))
    if low is None:
        assert case.family != "lora"
        assert np.linalg.matrix_rank((case.tuned(parts, W, 2.0) - W).reshape(len(W), -1)) == short
        return
    assert low.rank == low.up.shape[1] == low.down.shape[0] < short
    change = (low.scale * low.up @ low.down).reshape(shape)
    assert close(change, W, case.tuned(parts, W, 2.0), EXACT)
    single = families.build(tensors(parts, torch.float16), 2.0).low_rank()
    assert single is not None and single.rank == low.rank
    assert {single.up.dtype, single.down.dtype} <= {torch.float16, torch.float32}


def test_factored_forms_exist_where_they_should():
    with_form = {
        (name, shape) for name, shape in PLACES if families.build(tensors(made(name, shape)[1])).low_rank() is not None
    }
    assert {name for name, shape in with_form if shape == LINEAR} == {
        "lora", "loha", "lokr-whole-factored", "lokr-factored-factored",
    }  # fmt: skip
    # (3, 2)⊗(4, 36) has rank 2·4 = 8 below the short side 12
    assert ("lokr-whole-whole", CONV3) in with_form and ("loha-tucker", CONV3) in with_form


OPTIONAL = {"alpha", "rescale", "b_norm", "lora_mid.weight"}


@pytest.mark.parametrize(("name", "shape"), [(name, case.shapes[0]) for name, case in CASES.items()])
def test_half_a_module_is_an_error(name, shape):
    _, parts, _ = made(name, shape)
    shapes = shapes_of(parts)
    if len(shapes) == 1:
        return
    for missing in shapes.keys() - OPTIONAL - ({"lokr_t2"} if "lokr_t2" in shapes else set()):
        rest = {part: size for part, size in shapes.items() if part != missing}
        with pytest.raises(FormatError) as error:
            families.family_of(rest)
        assert missing in error.value.what or name.startswith(("oft", "ia3")) or missing in error.value.why


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_parts_that_contradict_each_other(name, shape):
    """Each part one longer along each axis: refused at once, or it fits this layer no more."""
    _, parts, _ = made(name, shape)
    shapes = shapes_of(parts)
    for part, size in shapes.items():
        for axis in range(len(size)):
            wrong = shapes | {part: tuple(s + (d == axis) for d, s in enumerate(size))}
            try:
                family = families.family_of(wrong)
            except FormatError as error:
                assert "fit" in error.what and "damaged" in error.hint
            else:
                assert not family.fits(wrong, shape), (part, axis)


def test_parts_of_no_family():
    with pytest.raises(FormatError, match="lora_sideways"):
        families.build({"lora_sideways": torch.zeros(2)})
    assert families.find(["weight"]) is None
    with pytest.raises(FormatError):
        families.build({"dora_scale": torch.ones(4, 1)})


def test_parts_of_two_families():
    for name, more in (("lora", "diff"), ("lokr-whole-whole", "lokr_t1"), ("glora", "bm.weight")):
        _, parts, _ = made(name, LINEAR)
        with pytest.raises(FormatError, match=more):
            families.build(tensors(parts | {more: np.ones((12, 8))}))


class TestScale:
    """alpha / rank, unless the file says otherwise."""

    @staticmethod
    def change(beside: float | None = None, **more: torch.Tensor) -> torch.Tensor:
        _, parts, W = made("lora", LINEAR)
        return families.build(tensors(parts) | more, beside).change(torch.from_numpy(W))

    def test_no_alpha_means_one(self):
        assert torch.equal(self.change(), self.change(3.0))

    def test_alpha_zero_means_no_change(self):
        assert not self.change(0.0).any()
        assert not self.change(alpha=torch.tensor(0.0)).any()

    def test_the_files_alpha_goes_before_the_configurations(self):
        assert torch.equal(self.change(1.0, alpha=torch.tensor(6.0)), self.change(6.0))
        assert torch.equal(self.change(alpha=torch.tensor([6.0], dtype=torch.float16)), self.change(6.0))

    def test_scale_goes_before_alpha(self):
        torch.testing.assert_close(self.change(6.0, scale=torch.tensor(0.5)), 0.5 * self.change())

    @pytest.mark.parametrize("alpha", [0.0, None])
    def test_an_unbounded_turn(self, alpha):
        """LyCORIS writes alpha 0 where the turn is not bounded; there it is no factor."""
        case, parts, W = made("oft", LINEAR)
        adapter = families.build(tensors(parts), alpha)
        assert close(adapter.change(torch.from_numpy(W)), W, case.tuned(parts, W, None), EXACT)

    def test_a_bounded_turn(self):
        case, parts, W = made("oft", LINEAR)
        adapter = families.build(tensors(parts), 1e-3)
        bounded = case.tuned(parts, W, 1e-3)
        assert close(adapter.change(torch.from_numpy(W)), W, bounded, EXACT)
        assert np.linalg.norm(bounded - W) < 0.1 * np.linalg.norm(case.tuned(parts, W, None) - W)


class TestBias:
    """diff_b beside any family, PEFT's lora_up.bias, and a norm's shift."""

    @pytest.mark.parametrize(("name", "shape"), [p for p in PLACES if p[1] != NORM])
    def test_a_bias_beside_any_family(self, name, shape):
        case, parts, W = made(name, shape)
        bias = rng("bias").standard_normal(shape[0])
        adapter = families.build(tensors(parts | {"diff_b": bias}), 2.0)
        assert (adapter.family, adapter.fits(adapter.shapes, shape)) == (case.family, True)
        change = adapter.bias_change()
        assert change is not None and np.array_equal(change.numpy(), bias)
        assert close(adapter.change(torch.from_numpy(W)), W, case.tuned(parts, W, 2.0), EXACT)
        assert not adapter.fits(adapter.shapes | {"diff_b": (shape[0] + 1,)}, shape)
        assert any("bias" in note for note in adapter.notes(adapter.shapes)) or name == "full"

    def test_a_bias_alone(self):
        adapter = families.build({"diff_b": torch.ones(12)})
        assert adapter.fits(adapter.shapes, CONV3) and not adapter.fits(adapter.shapes, (13, 8))
        assert not adapter.change(torch.randn(CONV3)).any()

    def test_none(self):
        for name in ("lora", "full", "loha"):
            assert families.build(tensors(made(name, LINEAR)[1])).bias_change() is None

    def test_a_norms_shift(self):
        _, parts, _ = made("norm", NORM)
        shift = families.build(tensors(parts)).bias_change()
        assert shift is not None and np.array_equal(shift.numpy(), parts["b_norm"])
        alone = families.build({"w_norm": torch.ones(12)})
        assert alone.bias_change() is None and alone.notes(alone.shapes)

    def test_a_bias_of_the_up_layer_is_scaled_like_its_weight(self):
        _, parts, _ = made("lora", LINEAR)
        own, more = rng("own").standard_normal(12), rng("more").standard_normal(12)
        change = families.build(tensors(parts | {"lora_up.bias": more}), 6.0).bias_change()
        np.testing.assert_allclose(change.numpy(), 2 * more)
        change = families.build(tensors(parts | {"lora_up.bias": more, "diff_b": own}), 6.0).bias_change()
        np.testing.assert_allclose(change.numpy(), own + 2 * more)
        for stored in STORED.values():
            made_of = families.build(tensors(parts | {"lora_up.bias": more}, stored), 1.0).bias_change()
            assert made_of.dtype == torch.float32
        with pytest.raises(FormatError):
            families.build(tensors(parts | {"lora_up.bias": more[:5]}))


class TestDora:
    """Magnitudes on any family, along either axis."""

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize(("name", "shape"), [p for p in PLACES if p[1] != NORM])
    def test_the_change_is_the_definitions(self, name, shape, axis):
        case, parts, W = made(name, shape)
        m = magnitudes(rng("m"), shape, axis)
        adapter = families.build(tensors(parts | {"dora_scale": m}), 2.0)
        assert adapter.family == ("dora" if case.family == "lora" else f"dora+{case.family}")
        assert adapter.fits(adapter.shapes, shape) and adapter.rank(adapter.shapes) == case.rank
        weight = torch.from_numpy(W)
        tuned = dora(case.tuned(parts, W, 2.0), m, axis)
        assert close(adapter.change(weight), W, tuned, EXACT)
        assert torch.equal(weight, torch.from_numpy(W))
        assert close(adapter.change(weight.float()), W, tuned, SINGLE)
        assert adapter.low_rank() is None and adapter.needs_weight
        assert any("AUTOMATIC1111" in note and "magnitudes" in note for note in adapter.notes(adapter.shapes)) == (
            axis == 0
        )

    @pytest.mark.parametrize(("shape", "stored"), [(LINEAR, (12,)), (CONV3, (1, 12, 1, 1))])
    def test_pefts_magnitudes_are_per_output_row(self, shape, stored):
        case, parts, W = made("lora", shape)
        m = magnitudes(rng("m"), shape, 0)
        adapter = families.build(tensors(parts | {"lora_magnitude_vector": m.reshape(stored)}), 2.0)
        assert adapter.fits(adapter.shapes, shape)
        assert close(adapter.change(torch.from_numpy(W)), W, dora(case.tuned(parts, W, 2.0), m, 0), EXACT)

    def test_a_square_layer_goes_by_the_shape(self):
        W = rng("square").standard_normal((8, 8))
        parts = {"diff": rng("d").standard_normal((8, 8))}
        for axis, stored in ((0, (8, 1)), (1, (1, 8)), (0, (8,))):
            m = magnitudes(rng("m"), (8, 8), axis)
            adapter = families.build(tensors(parts | {"dora_scale": m.reshape(stored)}))
            assert close(adapter.change(torch.from_numpy(W)), W, dora(W + parts["diff"], m, axis), EXACT)

    def test_magnitudes_of_another_size(self):
        _, parts, _ = made("lora", LINEAR)
        for stored in ((13, 1), (1, 9), (12, 8), (3,), (1,), ()):
            shapes = shapes_of(parts) | {"dora_scale": stored}
            assert not families.family_of(shapes).fits(shapes, LINEAR)

    def test_rows_of_zeros_stay(self):
        adapter = families.build({"diff": torch.zeros(4, 3), "dora_scale": torch.ones(4, 1)})
        weight = torch.tensor([[0.0, 0, 0], [3, 0, 4], [1, 0, 0], [0, 2, 0]])
        made = weight + adapter.change(weight)
        torch.testing.assert_close(made, torch.tensor([[0.0, 0, 0], [0.6, 0, 0.8], [1, 0, 0], [0, 1, 0]]))

    def test_a_bias_goes_along(self):
        adapter = families.build({"diff": torch.zeros(4, 3), "dora_scale": torch.ones(4, 1), "diff_b": torch.ones(4)})
        change = adapter.bias_change()
        assert change is not None and change.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_the_change_scales_with_a_strength_outside(name, shape):
    """A host sets W + s·change(W): change itself knows no strength, and depends on W only where it says so."""
    case, parts, W = made(name, shape)
    adapter = families.build(tensors(parts), 2.0)
    first, second = adapter.change(torch.from_numpy(W)), adapter.change(torch.from_numpy(2 * W + 1))
    assert torch.equal(first, second) == (not adapter.needs_weight)


def test_every_family_has_its_case():
    assert {family.family for family in families.FAMILIES} == {case.family for case in CASES.values()}
    assert all(issubclass(family, Adapter) and family.title for family in families.FAMILIES)


def test_values_of_a_sparse_rest_beyond_the_layer():
    _, parts, W = made("lora-sparse", LINEAR)
    adapter = families.build(tensors(parts | {"bias_size": np.array([12, 9], np.int16)}))
    with pytest.raises(FormatError, match="bias_size"):
        adapter.change(torch.from_numpy(W))


def test_ia3_for_the_other_side():
    adapter = families.build({"weight": torch.ones(8), "on_input": torch.tensor(0)})
    with pytest.raises(FormatError, match="the layer"):
        adapter.change(torch.ones(LINEAR))
