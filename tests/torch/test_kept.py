"""Hashes and losses from one reading to the next: nothing is lost on the way but what is too much."""

import json
import math

import numpy as np
import pytest
import torch

from logalign.torch.kept import COLUMNS, MOST, PIECES, Kept, unpack
from logalign.torch.rows import HIGHEST

CPU = torch.device("cpu")


def hashes(*values):
    return torch.tensor(values, dtype=torch.int64)


def test_all_come_back_by_step():
    kept = Kept()
    kept.add(10, hashes(5, HIGHEST), torch.tensor([1.5, math.nan]))
    kept.add(10, hashes(2**42 + 3), torch.tensor([0.25]))
    kept.add(13, hashes(0, 2**21, 2**21 - 1), torch.tensor([3.0, 4.0, 5.0]))
    found = unpack(kept.take(CPU, first=10).numpy(), first=10)
    assert [visit.step for visit in found] == [10, 13]
    assert found[0].hashes.tolist() == [5, HIGHEST, 2**42 + 3]
    np.testing.assert_array_equal(found[0].losses, [1.5, math.nan, 0.25])
    assert found[1].hashes.tolist() == [0, 2**21, 2**21 - 1]
    assert found[1].losses.tolist() == [3.0, 4.0, 5.0]
    assert unpack(kept.take(CPU, first=14).numpy(), first=14) == []


def test_a_hash_survives_float32():
    """As it is sent where a device has no float64."""
    generator = np.random.default_rng(0)
    values = torch.from_numpy(generator.integers(0, HIGHEST, 1000))
    kept = Kept()
    kept.add(0, values, torch.zeros(1000))
    packed = kept.take(CPU, first=0).float().numpy()
    assert unpack(packed, first=0)[0].hashes.tolist() == values.tolist()


@pytest.mark.parametrize("count", [3, 8])
def test_a_fixed_number_is_filled_up_or_cut_from_above(count):
    kept = Kept()
    kept.add(0, hashes(9, 1, 7, 3, 5), torch.tensor([0.9, 0.1, 0.7, 0.3, 0.5]))
    packed = kept.take(CPU, first=0, count=count)
    assert packed.shape == (count, COLUMNS)
    found = unpack(packed.numpy(), first=0)[0]
    assert sorted(found.hashes.tolist()) == [1, 3, 5, 7, 9][: min(count, 5)]
    assert found.losses.tolist() == pytest.approx([each / 10 for each in found.hashes])


def test_those_that_are_not_tracked_go_first():
    kept = Kept()
    kept.threshold = 4
    kept.add(0, hashes(9, 1, 7, 3, 5), torch.zeros(5))
    kept.add(1, hashes(2, 8), torch.zeros(2))
    found = unpack(kept.take(CPU, first=0, count=3).numpy(), first=0)
    assert [(visit.step, sorted(visit.hashes.tolist())) for visit in found] == [(0, [1, 3]), (1, [2])]


def test_memory_is_bounded_however_long_it_takes():
    kept = Kept()
    generator = torch.Generator().manual_seed(0)
    for step in range(4 * PIECES):
        kept.add(step, torch.randint(HIGHEST, (100,), generator=generator), torch.zeros(100))
        assert len(kept._pieces) <= PIECES + 1
    found = unpack(kept.take(CPU, first=0).numpy(), first=0)
    assert sum(visit.hashes.size for visit in found) == MOST


def test_state_is_json_and_stays():
    kept, other = Kept(), Kept()
    kept.add(3, hashes(5, 6), torch.tensor([1.5, math.inf]))
    state = json.loads(json.dumps(kept.state(), allow_nan=False))
    other.load(state)
    assert state == [[3, 5, 1.5], [3, 6, None]]
    for each in (kept, other):
        (visit,) = unpack(each.take(CPU, first=0).numpy(), first=0)
        assert (visit.step, visit.hashes.tolist(), visit.losses[0]) == (3, [5, 6], 1.5)
        assert not math.isfinite(visit.losses[1])
    assert Kept().state() == []
