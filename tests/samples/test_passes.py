"""How passes over the data are counted: from samples that come back, and from what users pass as the epoch."""

import json

import numpy as np
import pytest

from logalign.samples.passes import GivenEpochs, PassClock


def clock_of(order, *, size, known):
    clock, found = PassClock(), []
    for step, batch in enumerate(np.reshape(order[: len(order) // size * size], (-1, size))):
        for sample in batch:
            clock.visit(step, int(sample), known=known)
        found.append(clock.passes(step))
    return clock, found


@pytest.mark.parametrize(("samples", "size"), [(200, 10), (200, 40), (200, 200), (200, 100), (64, 1), (7, 1)])
def test_shuffled_passes_are_counted(samples, size):
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(samples) for _ in range(12)])
    clock, found = clock_of(order, size=size, known=samples)
    per = samples / size
    assert clock.steps_per_pass == pytest.approx(per, rel=0.02, abs=0.6)
    for step, passes in enumerate(found):
        if step > 1.3 * per:
            assert passes == pytest.approx(step / per, abs=0.06 + 0.6 / per)


def test_the_same_order_in_every_pass_is_counted():
    _, found = clock_of(np.tile(np.arange(200), 6), size=10, known=200)
    assert found[119] == pytest.approx(119 / 20, abs=0.05)


def test_few_samples_of_many_tell_the_length_of_a_pass():
    """64 of 6,400 samples are tracked: a pass is known to about one part in 64."""
    generator, clock = np.random.default_rng(0), PassClock()
    for number in range(6):
        for place, sample in enumerate(generator.permutation(6400)):
            if sample < 64:
                clock.visit(number * 640 + place // 10, int(sample), known=64)
    assert clock.steps_per_pass == pytest.approx(640, rel=0.04)
    assert clock.passes(6 * 640) == pytest.approx(6, abs=0.05)


def test_samples_drawn_with_replacement_are_counted_by_their_visits():
    order = np.random.default_rng(0).integers(0, 200, 200 * 30)
    clock, found = clock_of(order, size=10, known=200)
    assert clock.steps_per_pass == pytest.approx(20, rel=0.25)
    assert found[-1] == pytest.approx(30, rel=0.12)


def test_a_pass_that_leaves_out_the_last_batch_is_one_pass():
    generator = np.random.default_rng(0)
    order = np.concatenate([generator.permutation(210)[:200] for _ in range(10)])
    _, found = clock_of(order, size=10, known=210)
    assert found[199] == pytest.approx(199 / 20, abs=0.1)


def test_some_rows_that_are_the_same_do_not_end_a_pass():
    generator = np.random.default_rng(0)
    order = np.concatenate([np.minimum(generator.permutation(200), 185) for _ in range(10)])  # 15 of one kind
    _, found = clock_of(order, size=10, known=186)
    assert found[199] == pytest.approx(199 / 20, abs=0.3)


def test_passes_are_not_known_before_the_end_of_the_first_nor_once_nothing_comes_back():
    generator = np.random.default_rng(0)
    clock, found = clock_of(np.concatenate([generator.permutation(200) for _ in range(3)]), size=10, known=200)
    assert found[:20] == [None] * 20
    assert clock.passes(60 + 19) == pytest.approx(4, abs=0.1)
    assert clock.passes(60 + 41) is None


def test_counting_goes_on_from_where_it_was():
    clock = PassClock(origin=500, before=7.5)
    generator = np.random.default_rng(0)
    for step in range(60):
        if step % 20 == 0:
            order = generator.permutation(200)
        for sample in order[step % 20 * 10 :][:10]:
            clock.visit(500 + step, int(sample), known=200)
    assert clock.passes(560) == pytest.approx(10.5, abs=0.05)
    again = PassClock.from_state(json.loads(json.dumps(clock.state())))
    assert again.passes(600) == clock.passes(600)


def epochs_of(values, *, every=1):
    """What is understood of epochs passed at steps 0, every, 2 every and so on; and the last oddity."""
    given = GivenEpochs()
    return [given.passes(every * i, value) for i, value in enumerate(values)], given.oddity


def test_a_fraction_is_taken_as_it_is():
    values = [i / 40 for i in range(200)]
    found, oddity = epochs_of(values)
    assert found == pytest.approx(values)
    assert oddity is None


def test_a_whole_number_is_filled_in_from_the_pass_before():
    found, oddity = epochs_of([i // 40 for i in range(200)])
    assert found[:40] == [0.0] * 40
    assert found[40:] == pytest.approx([i / 40 for i in range(40, 200)], abs=1e-6)
    assert oddity is None


def test_a_count_from_one_begins_at_nothing():
    found, oddity = epochs_of([1 + i // 40 for i in range(200)], every=10)
    assert found[0] == 0.0
    assert found[199] == pytest.approx(199 / 40)
    assert oddity is None


def test_a_fraction_that_starts_anew_counts_on():
    found, oddity = epochs_of([i % 40 / 40 for i in range(200)])
    assert found == pytest.approx([i / 40 for i in range(200)])
    assert oddity is None


def test_a_fraction_that_starts_anew_between_readings_far_apart():
    """Eleven of forty steps between readings, then a gap of three passes: the pace tells how many went by."""
    steps = [*range(0, 120, 11), *range(250, 360, 11)]
    given = GivenEpochs()
    found = [given.passes(step, step % 40 / 40) for step in steps]
    assert found == pytest.approx([step / 40 for step in steps])
    assert given.oddity is None


def test_a_step_a_pass_is_as_it_is():
    found, oddity = epochs_of(range(0, 1500, 10), every=10)
    assert found == pytest.approx(list(range(0, 1500, 10)))
    assert oddity is None


def test_a_step_back_is_told_and_counted_on():
    """A resume with twice the batch size, where the epoch is the step over the new number of steps a pass."""
    values = [i / 40 for i in range(200)] + [100 / 40 + i / 20 for i in range(100)]
    found, oddity = epochs_of(values)
    assert (np.diff(found) >= 0).all()
    assert found[200] == pytest.approx(200 / 40)
    assert found[-1] == pytest.approx(5 + 99 / 20, abs=0.1)
    assert oddity is not None
    assert "found 2.5 at step 200 after 4.975 at step 199" in oddity


def test_a_jump_is_told_and_counted_on():
    values = [i / 40 for i in range(200)] + [10 + i / 40 for i in range(100)]
    found, oddity = epochs_of(values)
    assert found[-1] == pytest.approx(299 / 40)
    assert "found 10 at step 200" in oddity


def test_a_pace_that_stays_is_no_jump_for_long():
    values = [i / 100 for i in range(100)] + [1 + i * 0.6 for i in range(50)]
    found, _ = epochs_of(values)
    assert found[-1] - found[110] == pytest.approx(values[-1] - values[110])


def test_nothing_is_understood_of_nothing():
    given = GivenEpochs()
    assert given.passes(0, None) is None
    assert given.passes(1, float("nan")) is None
    assert given.passes(2, 0.5) == 0.5
    assert given.passes(3, None) is None


def test_state_is_json_and_goes_on():
    for values in ([i // 40 for i in range(200)], [i % 40 / 40 for i in range(200)]):
        whole, resumed = GivenEpochs(), GivenEpochs()
        for step, value in enumerate(values):
            expected = whole.passes(step, value)
            assert resumed.passes(step, value) == expected
            if step == 77:
                resumed = GivenEpochs.from_state(json.loads(json.dumps(resumed.state(), allow_nan=False)))


def test_going_back_keeps_how_numbers_are_meant():
    given = GivenEpochs()
    for step in range(100):
        given.passes(step, step % 40 / 40)
    given.resume(1.75)
    assert given.passes(71, 31 / 40) == pytest.approx(71 / 40)
    assert given.passes(81, 1 / 40) == pytest.approx(81 / 40)
