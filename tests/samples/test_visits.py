"""The online form against the method on arrays, at every step."""

import json

import numpy as np
import pytest

from logalign import revisits
from logalign.samples.visits import HIGHEST, LOST, NOTHING_CAME_BACK, Visits, hashes_of


def batches(passes, *, samples=300, size=10, seed=0, start=0):
    """Steps of shuffled passes: step, hashes, losses."""
    generator = np.random.default_rng(seed)
    hashes = np.array(hashes_of(range(start, start + samples)))
    step = 0
    for _ in range(passes):
        for batch in generator.permutation(samples).reshape(-1, size):
            yield step, hashes[batch], 3 - 0.01 * step + 0.1 * generator.standard_normal(size)
            step += 1


def test_online_is_offline_at_every_step(recorded):
    hashes = np.array(hashes_of(range(recorded.samples.max() + 1)))
    tracked = np.sort(hashes)[:150]
    visits, seen = Visits(tracked=150), np.zeros(len(recorded.steps), dtype=bool)
    chosen = np.isin(hashes[recorded.samples], tracked)
    decided, before = 0, 0
    for step in range(recorded.steps[-1] + 1):
        now = recorded.steps == step
        visits.add(step, hashes[recorded.samples[now]], recorded.losses[now])
        seen |= now
        found = visits.at(step)
        length, passes = visits.steps_per_pass, visits.passes(step)
        if found.drift is None:
            continue
        decided += 1
        # Of the first pass some samples have been dropped again as others with lower hashes came.
        known = seen & chosen
        complete = int(passes + 1 / length + 1e-9)
        times = passes + (recorded.steps[known] - step) / length
        expected = revisits(recorded.samples[known], times, recorded.losses[known], now=complete - 1 / length)
        assert complete >= 2
        assert passes == pytest.approx(step / recorded.steps_per_pass, abs=0.05)
        assert length == pytest.approx(recorded.steps_per_pass, rel=0.05)
        # It is made once, with the end of the pass where it was thought to be then.
        if complete > max(3, before):
            assert found.pairs == expected.pairs
            assert (found.drift, found.drift_error, found.gain, found.gain_error) == pytest.approx(
                (expected.drift, expected.drift_error, expected.gain, expected.gain_error), abs=1e-9
            )
        before = complete
    assert decided > 0.6 * recorded.steps[-1]


def test_the_tracked_samples_are_those_with_the_lowest_hashes():
    visits = Visits(tracked=50)
    for step, hashes, losses in batches(2):
        visits.add(step, hashes, losses)
    assert visits.known == 50
    assert visits.threshold == sorted(hashes_of(range(300)))[49]


def test_memory_is_bounded_and_state_is_json():
    visits = Visits(tracked=40)
    sizes = []
    for step, hashes, losses in batches(40):
        visits.add(step, hashes, losses)
        visits.at(step)
        if step % 300 == 299:
            sizes.append(len(json.dumps(visits.state(), allow_nan=False)))
    assert max(sizes) < 1.3 * min(sizes)


@pytest.mark.parametrize("at", [7, 45, 100, 137])
def test_going_on_from_a_state_gives_the_same(at):
    whole, resumed = Visits(tracked=80), Visits(tracked=80)
    for step, hashes, losses in batches(8):
        if step == 20:
            losses = np.where(np.arange(10) < 3, np.nan, losses)
        whole.add(step, hashes, losses)
        resumed.add(step, hashes, losses)
        if step == at:
            resumed = Visits.from_state(json.loads(json.dumps(resumed.state(), allow_nan=False)))
        assert resumed.at(step) == whole.at(step)
        assert resumed.passes(step) == whole.passes(step)


def test_a_sample_that_comes_twice_in_a_step_is_one_visit():
    once, twice = Visits(tracked=400), Visits(tracked=400)
    for step, hashes, losses in batches(5):
        once.add(step, hashes, losses)
        twice.add(step, np.concatenate([hashes, hashes[:4]]), np.concatenate([losses - 0.5, losses[:4] + 0.5]))
    assert once.at(149).pairs == twice.at(149).pairs
    assert once.passes(149) == twice.passes(149)


def test_nothing_came_back():
    visits = Visits(tracked=50)
    for step in range(100):
        visits.add(step, hashes_of(range(10 * step, 10 * step + 10)), np.ones(10))
    assert visits.at(99).reason == NOTHING_CAME_BACK
    assert visits.passes(99) is None
    assert visits.known == 50


def test_a_set_of_samples_that_changes_is_followed():
    visits = Visits(tracked=100)
    for step, hashes, losses in batches(5):
        visits.add(step, hashes, losses)
    assert visits.at(149).drift is not None
    for step, hashes, losses in batches(3, seed=1, start=1000):
        visits.add(150 + step, hashes, losses)
        found = visits.at(150 + step)
        # To the clock the last pass over the one set and the first over the other are one pass of 60 steps.
        assert found.drift is None or abs(found.drift + 0.01 * visits.steps_per_pass) < 4 * found.drift_error
    for step, hashes, losses in batches(8, seed=2, start=1000):
        visits.add(240 + step, hashes, losses)
    assert visits.at(479).drift == pytest.approx(-0.3, abs=0.2)
    assert visits.known == 100


def test_samples_that_stop_coming():
    visits = Visits(tracked=100)
    for step, hashes, losses in batches(4):
        visits.add(step, hashes, losses)
    assert visits.at(119 + 3 * 30).reason == LOST
    assert visits.passes(119 + 3 * 30) is None


def test_losses_that_are_not_finite_are_in_no_pair():
    visits = Visits(tracked=400)
    for step, hashes, losses in batches(4):
        visits.add(step, hashes, np.where(np.arange(10) == 0, [np.nan, np.inf][step % 2], losses))
    found = visits.at(119)
    assert found.drift == pytest.approx(-0.3, abs=0.1)
    assert found.pairs < 300


def test_hashes_of_ids():
    assert len(set(hashes_of(range(10_000)))) == 10_000
    assert hashes_of([3]) == hashes_of([np.int64(3)]) != hashes_of(["3"])
    assert all(0 <= each <= HIGHEST for each in hashes_of(["a", -1, 2**70, ("shard", 4)]))
