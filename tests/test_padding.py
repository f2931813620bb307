"""Higher ranks without a change: every old number stays, the product and the scale are the same to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_hypermerge.algebra.padding import pad, scaled_alpha

QUICK = settings(derandomize=True, deadline=None, max_examples=60)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def lora(n: int, inputs: tuple[int, ...], r: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    up = torch.from_numpy(rng.standard_normal((n, r) + (1,) * (len(inputs) - 1))).to(dtype)
    return up, torch.from_numpy(rng.standard_normal((r, *inputs))).to(dtype)


def change(up: torch.Tensor, down: torch.Tensor) -> np.ndarray:
    """up·down in float64, term by term, so that the order of the sum is the same for every rank."""
    B, A = up.flatten(1).double().numpy(), down.flatten(1).double().numpy()
    out = np.zeros((len(B), A.shape[1]))
    for i in range(len(A)):
        out += B[:, i : i + 1] * A[i]
    return out


@QUICK
@given(
    st.integers(1, 12), st.sampled_from([(7,), (30,), (3, 1, 1), (2, 3, 3), (1, 3, 3)]), st.integers(1, 12),
    st.integers(0, 30), st.sampled_from(DTYPES), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_change_is_the_same_to_the_last_bit(n, inputs, r, more, dtype, seed):
    up, down = lora(n, inputs, r, dtype, seed)
    before = up.clone(), down.clone()
    new_up, new_down, alpha = pad(up, down, None, r + more, seed)
    assert alpha is None and (new_up.dtype, new_down.dtype) == (dtype, dtype)
    assert new_up.shape == (n, r + more, *up.shape[2:]) and new_down.shape == (r + more, *inputs)
    assert torch.equal(new_up[:, :r], before[0]) and torch.equal(new_down[:r], before[1])
    assert torch.equal(up, before[0]) and torch.equal(down, before[1]) and not new_up[:, r:].any()
    assert change(new_up, new_down).tobytes() == (change(up, down) + 0.0).tobytes()  # + 0: of −0 no sign is left
    # the new rows, at 64 bits or as rounded
    rows, old = new_down[r:].flatten(1).double().numpy(), down.flatten(1).double().numpy()
    k, room = rows.shape[1], max(0, min(more, rows.shape[1] - r))
    tolerance = 4 * k**0.5 * torch.finfo(dtype).eps
    np.testing.assert_allclose(rows[:room] @ rows[:room].T, np.eye(room), atol=tolerance)
    assert not rows[room:].any()
    assert np.abs(rows @ old.T).max(initial=0) <= tolerance * np.linalg.norm(old, axis=1).max()


def test_rows_that_say_the_same_leave_room_for_more():
    up, down = lora(5, (8,), 6, torch.float32, 0)
    down[3:] = down[:3]
    down[5] = 0
    _, wide, _ = pad(up, down, None, 20)
    rows = wide[6:].double()
    assert (rows.norm(dim=1) > 0.5).tolist() == [True] * 5 + [False] * 9  # 3 of 8 directions were taken
    np.testing.assert_allclose(rows[:5] @ rows[:5].mT, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(rows[:5] @ down.double().mT, 0, atol=1e-5)
    assert pad(up, torch.zeros(6, 8), None, 20)[1][6:].count_nonzero(1).gt(0).sum() == 8


def test_a_seed_says_all():
    up, down = lora(5, (40,), 6, torch.float16, 0)
    first, again, other = (pad(up, down, None, 9, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first[6:], other[6:])


# --- alpha ------------------------------------------------------------------------------------------------------------

ALPHAS = (1.0, 3.0, 7.0, 0.3, 32.0)


def dividends(quotient: float, rank: int) -> list[float]:
    """Every float64 that divided by rank could give the quotient: there are few about their product."""
    near = [quotient * rank]
    for end in (-np.inf, np.inf):
        number = near[0]
        for _ in range(8):
            number = float(np.nextafter(number, end))
            near.append(number)
    return [number for number in near if number / rank == quotient]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_over_rank_stays_where_any_number_can_make_it_stay(alpha, dtype):
    given_alpha = torch.tensor(alpha, dtype=dtype)
    exact = total = 0
    for r in range(1, 301):
        for rank in {r, r + 1, 2 * r, r + 17, 320, 384, 777} - set(range(r)):
            new = scaled_alpha(given_alpha, r, rank)
            before, after = given_alpha.item() / r, new.item() / rank
            total += 1
            exact += after == before
            assert new.shape == () and new.dtype in DTYPES
            if after != before:
                assert not dividends(before, rank) and new.dtype == torch.float64
                assert abs(after - before) <= np.spacing(before)
                assert np.float32(after) == np.float32(before)
    assert exact > 0.75 * total


@pytest.mark.parametrize(
    ("alpha", "dtype", "r", "rank", "expected", "holds"),
    [
        (16.0, torch.bfloat16, 16, 64, 64.0, torch.bfloat16),
        (257.0, torch.float16, 257, 514, 514.0, torch.float16),
        (128.0, torch.bfloat16, 128, 257, 257.0, torch.float16),  # bfloat16 has no 257
        (4096.0, torch.float16, 4096, 4097, 4097.0, torch.float32),  # nor float16 4097
        (32.0, torch.float32, 32, 40, 40.0, torch.float32),
        (1.0, torch.float16, 4, 6, 1.5, torch.float16),
        (0.0, torch.float16, 4, 6, 0.0, torch.float16),
        (-8.0, torch.float16, 8, 12, -12.0, torch.float16),
    ],
)
def test_the_smallest_format_that_will_do(alpha, dtype, r, rank, expected, holds):
    new = scaled_alpha(torch.tensor([alpha], dtype=dtype), r, rank)
    assert (new.tolist(), new.dtype) == ([expected], holds)


def test_the_nearest_of_a_format_alone_would_not_do():
    """fp32 at the nearest, as it is commonly written, moves the scale."""
    alpha = torch.tensor(1.0)
    assert torch.tensor(1 / 3 * 7).item() / 7 != alpha.item() / 3
    assert scaled_alpha(alpha, 3, 7).item() / 7 == alpha.item() / 3


def test_alpha_goes_with_the_factors():
    up, down = lora(5, (40,), 6, torch.float16, 0)
    alpha = torch.tensor(3.0, dtype=torch.float16)
    assert pad(up, down, alpha, 8)[2] == torch.tensor(4.0, dtype=torch.float16)
    same = pad(up, down, alpha, 6)
    assert torch.equal(same[0], up) and torch.equal(same[1], down) and same[2] == alpha
    assert scaled_alpha(torch.tensor(float("nan")), 2, 4).isnan()
