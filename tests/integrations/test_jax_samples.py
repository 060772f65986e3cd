"""Drift in JAX trainings, against `revisits()` on the losses of all samples written down by hand."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from logalign import open_run, revisits
from logalign.errors import InputError, LogAlignWarning
from logalign.integrations.jax import Recorder
from logalign.jax import energies
from logalign.jax.rows import id_hashes, joined, row_words
from logalign.jax.samples import MOST_STEPS

TEXTS, BATCH, LENGTH, WORDS = 96, 8, 12, 30
STEPS_PER_PASS = TEXTS // BATCH
FIELDS = ("drift", "drift_error", "gain", "gain_error")


@pytest.fixture(scope="module")
def training():
    """A language model of one matrix trained on texts in six passes: of each step the sums, rows, ids and losses."""
    rng = np.random.default_rng(0)
    texts = rng.integers(1, WORDS, (TEXTS, LENGTH)).astype(np.int32)
    parameters = {
        name: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)
        for name, shape in (("table", (WORDS, 16)), ("head", (16, WORDS)))
    }

    def loss_of(parameters, text):
        hidden = parameters["table"][text[:-1]]
        logits = hidden @ parameters["head"]
        each = jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(LENGTH - 1), text[1:]]
        return each.mean(), hidden

    def mean_of(parameters, batch):
        losses, hidden = jax.vmap(loss_of, in_axes=(None, 0))(parameters, batch)
        return losses.mean(), (losses, energies(parameters["head"].T, hidden))

    @jax.jit
    def train_step(parameters, batch):
        (_, aux), gradients = jax.value_and_grad(mean_of, has_aux=True)(parameters, batch)
        return jax.tree.map(lambda w, g: w - 3.0 * g, parameters, gradients), *aux

    steps = []
    for _ in range(6):
        order = rng.permutation(TEXTS)
        for first in range(0, TEXTS, BATCH):
            ids = order[first : first + BATCH]
            parameters, losses, sums = train_step(parameters, texts[ids])
            steps.append((sums, texts[ids], ids, losses))
    return steps


def by_hand(steps, until):
    """Drift and gain at the last step of the last complete pass at a step, from the losses of all samples up to it."""
    ids = np.concatenate([np.asarray(ids) for _, _, ids, _ in steps[: until + 1]])
    losses = np.concatenate([np.asarray(losses, np.float64) for _, _, _, losses in steps[: until + 1]])
    times = np.repeat(np.arange(until + 1), BATCH) / STEPS_PER_PASS
    return revisits(ids, times, losses, now=(until + 1) // STEPS_PER_PASS - 1 / STEPS_PER_PASS)


def record(steps, samples=lambda rows, ids: ids, losses=lambda losses: losses, *, every=5, **options):
    with Recorder(every=every, **options) as recorder:
        for sums, rows, ids, each in steps:
            recorder.step(sums, losses=losses(each), samples=samples(rows, ids))
    return [readings.main for readings in recorder.readings]


def numbers(readings):
    """The fields as one array; other hashes add up pairs in another order."""
    return np.array(values(readings), dtype=np.float64)


def values(readings):
    return [[getattr(reading, name) for name in (*FIELDS, "revisited", "passes")] for reading in readings]


# Drift -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5, 70])
def test_drift_is_that_of_losses_written_down_by_hand(training, every):
    readings = record(training, every=every)
    assert len(readings) == math.ceil(len(training) / every)
    for reading in readings:
        truth = by_hand(training, reading.step)
        if reading.passes is None:
            assert reading.step <= STEPS_PER_PASS + 2  # once more than a few samples have come again
            assert reading.drift_reason == "no sample has come back so far"
            continue
        assert reading.passes == pytest.approx(reading.step / STEPS_PER_PASS, abs=1e-12)
        assert (reading.revisited, reading.drift_reason) == (truth.pairs, truth.reason)
        for name in FIELDS:
            assert getattr(reading, name) == pytest.approx(getattr(truth, name), abs=1e-5), (reading.step, name)
    assert readings[-1].drift is not None
    assert readings[-1].gain > 0.05


WAYS = {
    "ids as a list": lambda rows, ids: ids.tolist(),
    "ids as a list of JAX numbers": lambda rows, ids: list(jnp.asarray(ids)),
    "ids on the device": lambda rows, ids: jnp.asarray(ids),
    "ids as text": lambda rows, ids: [f"text {each}" for each in ids],
    "text in NumPy": lambda rows, ids: np.array([f"text {each}" for each in ids]),
    "rows on the host": lambda rows, ids: rows.astype(np.int64),
    "rows on the device": lambda rows, ids: jnp.asarray(rows),
    "rows of floating-point numbers": lambda rows, ids: jnp.asarray(rows, jnp.bfloat16) / 7,
    "images": lambda rows, ids: rows.reshape(BATCH, 3, 2, 2).astype(np.uint8),
    "torch": lambda rows, ids: pytest.importorskip("torch").tensor(ids),
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_and_ids_give_the_same_drift(training, way):
    truth = numbers(record(training))
    np.testing.assert_allclose(numbers(record(training, WAYS[way])), truth, rtol=0, atol=1e-9)
    assert math.isfinite(truth[-1, 0])


def test_rows_on_the_host_and_on_the_device_are_the_same_samples(training):
    on_host, on_device = (WAYS[f"rows on the {place}"] for place in ("host", "device"))
    assert values(record(training, on_host, revisits=72)) == values(record(training, on_device, revisits=72))


def test_losses_of_any_kind(training):
    truth = values(record(training))
    for losses in (np.asarray, lambda each: np.asarray(each).tolist(), list):
        assert values(record(training, losses=losses)) == truth


def test_padding_of_texts_changes_nothing(training):
    rng = np.random.default_rng(3)

    def padded(rows, ids):
        wide = np.zeros((BATCH, LENGTH + rng.integers(0, 9)), np.int32)
        before = rng.integers(0, wide.shape[1] - LENGTH + 1)
        wide[:, before : before + LENGTH] = rows
        return wide

    assert values(record(training, padded)) == values(record(training, lambda rows, ids: rows))


def test_rows_of_zeros_are_padding_of_the_batch(training):
    readings = record(
        training,
        samples=lambda rows, ids: np.concatenate([rows, np.zeros((3, LENGTH), np.int32)]),
        losses=lambda losses: jnp.concatenate([losses, jnp.array([0.0, 0.5, 5.0]) * losses[0]]),
    )
    assert values(readings) == values(record(training, lambda rows, ids: rows))


def test_the_fields_are_those_of_the_main_layer_alone(training, tmp_path):
    with Recorder(tmp_path / "run", every=5) as recorder:
        for sums, _, ids, losses in training:
            recorder.step({"unembedding": sums, "other": sums}, losses=losses, samples=ids)
    run = open_run(tmp_path / "run")
    last = {reading.site: reading for reading in run.readings[-2:]}
    assert last["unembedding"].drift is not None
    assert (last["other"].drift, last["other"].passes, last["other"].drift_reason) == (None, None, None)


def test_few_of_many_samples_are_tracked_and_the_drift_is_near(training):
    readings = record(training, revisits=72)
    truth = by_hand(training, readings[-1].step)
    assert 64 <= readings[-1].revisited < truth.pairs
    assert abs(readings[-1].drift - truth.drift) < 3 * readings[-1].drift_error


# Hashes ----------------------------------------------------------------------------------------------------------


def hashes_of_rows(rows):
    return joined(np.asarray(row_words(rows))).tolist()


def test_hashes_of_rows_tell_rows_apart():
    rng = np.random.default_rng(0)
    texts = np.unique(rng.integers(1, 4, (20_000, 12)), axis=0)
    words = np.asarray(row_words(texts))
    assert len(set(joined(words).tolist())) == len(texts)
    # Two independent words: each alone has the collisions that chance gives numbers of 32 bits.
    for word in (words[:, 0], words[:, 1], words[:, 0] ^ words[:, 1]):
        assert len(set(word.tolist())) > len(texts) - 5
    share = np.mean(joined(words) / 2.0**63)
    assert share == pytest.approx(0.5, abs=4 / math.sqrt(12 * len(texts)))
    swapped = texts[:, [1, 0, *range(2, 12)]]
    same = texts[:, 0] == texts[:, 1]
    assert [a == b for a, b in zip(hashes_of_rows(texts), hashes_of_rows(swapped), strict=True)] == same.tolist()


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int8, np.int64, np.uint8, bool])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 4), (6, 70, 90)])
def test_hashes_of_rows_are_the_same_on_the_host_and_on_the_device(dtype, shape):
    rows = np.random.default_rng(0).normal(size=shape) * 9
    rows = rows > 0 if dtype is bool else rows.astype(dtype)
    hashes = hashes_of_rows(rows)
    assert len(set(hashes)) == 6
    assert hashes_of_rows(jnp.asarray(rows)) == hashes
    assert hashes_of_rows(np.asfortranarray(rows)) == hashes
    assert hashes_of_rows(rows[::-1])[::-1] == hashes


def test_negative_zero_is_zero():
    assert hashes_of_rows(jnp.array([[1.0, -0.0]])) == hashes_of_rows(np.array([[1.0, 0.0]]))


def test_a_buffer_that_is_filled_again_is_no_other_sample():
    rows = np.arange(1, 4_000_001, dtype=np.int32).reshape(2, -1)
    expected = hashes_of_rows(rows.copy())
    words = row_words(rows)
    rows[:] = 0
    assert joined(np.asarray(words)).tolist() == expected


def test_ids_are_told_apart_and_known_in_any_type():
    hashes = id_hashes(np.arange(-50_000, 50_000))
    assert len(set(hashes.tolist())) == 100_000
    assert hashes.min() >= 0
    assert np.mean(hashes / 2.0**63) == pytest.approx(0.5, abs=0.004)
    assert id_hashes(np.array([-1], np.int32)) == id_hashes(np.array([-1], np.int64))


# Nothing waits ---------------------------------------------------------------------------------------------------


def test_a_step_waits_for_neither_losses_nor_samples(training):
    @jax.jit
    def slow(x):  # a second of work or several; it is dispatched in a thousandth of that
        return jax.lax.fori_loop(0, 1500, lambda _, y: jnp.cos(y @ x), x)

    sums = training[0][0]
    x = jax.random.normal(jax.random.key(0), (400, 400))
    jax.block_until_ready(slow(x))
    with Recorder(every=2) as recorder:  # all that is compiled is compiled before
        for _ in range(3):
            recorder.step(sums, losses=x[0, :8], samples=x[:8])
        recorder.flush()
    with Recorder(every=2) as recorder:
        recorder.step(sums, losses=jnp.ones(8), samples=np.arange(8))
        recorder.flush()
        late = slow(x)
        recorder.step(None, losses=late[0, :8], samples=late[:8])
        assert recorder.step(sums, losses=jnp.ones(8), samples=np.arange(8)) is None  # that of step 1 is to come
        assert len(recorder.readings) == 1
        assert not late.is_ready()
        assert recorder.flush().step == 2


def test_what_is_kept_between_readings_is_bounded(training):
    sums = training[0][0]
    with Recorder(every=1000, revisits=10) as recorder:
        for step in range(5 * MOST_STEPS):
            losses = jax.block_until_ready(jnp.ones(8))
            recorder.step(sums, losses=losses, samples=np.arange(8) + step)
            recorder.flush()
        kept = jax.tree.leaves(recorder._samples.cut())
    assert len(kept) <= 3 * (MOST_STEPS + 1)


def test_no_drift_is_lost_where_much_is_kept(training):
    steps = training * 2
    first = record(steps, every=len(steps) - 1)
    assert values(first)[-1] == values(record(steps, every=1))[-1]
    assert first[-1].drift is not None


def test_nothing_is_transferred_but_by_the_recorder_itself(training):
    row_words(np.ones((BATCH, LENGTH), np.int32))
    with jax.transfer_guard("disallow"):
        readings = record(training[:30], lambda rows, ids: rows)
    assert readings[-1].drift is not None


# Checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [13, 37, 41])
def test_a_training_that_is_resumed_has_the_drift_of_the_whole(training, cut):
    with Recorder(every=5) as recorder:
        for sums, rows, _, losses in training[:cut]:
            recorder.step(sums, losses=losses, samples=rows)
        state = json.loads(json.dumps(recorder.state_dict(), allow_nan=False))
    with Recorder(every=5) as recorder:
        recorder.load_state_dict(state)
        for sums, rows, _, losses in training[cut:]:
            recorder.step(sums, losses=losses, samples=jnp.asarray(rows))
    resumed = [readings.main for readings in recorder.readings]
    whole = record(training, lambda rows, ids: rows)
    assert values(resumed) == values(whole)[-len(resumed) :]
    assert resumed[-1].drift is not None


def test_a_checkpoint_between_readings_changes_nothing(training):
    with Recorder(every=5) as recorder:
        for sums, _, ids, losses in training:
            recorder.step(sums, losses=losses, samples=ids)
            recorder.state_dict()
    assert values([readings.main for readings in recorder.readings]) == values(record(training))


def test_going_back_to_a_checkpoint_drops_what_came_after(training):
    with Recorder(every=5) as recorder:
        for i, (sums, _, ids, losses) in enumerate(training[:40]):
            if i == 28:
                state = recorder.state_dict()
            recorder.step(sums, losses=losses if i < 28 else losses + 100, samples=ids)
        recorder.load_state_dict(state)
        for sums, _, ids, losses in training[28:]:
            recorder.step(sums, losses=losses, samples=ids)
    assert values([recorder.readings[-1].main]) == values(record(training))[-1:]


# What is passed --------------------------------------------------------------------------------------------------


def test_without_losses_the_reading_says_what_to_pass(training):
    with Recorder(every=5) as recorder:
        for step, (sums, *_) in enumerate(training):
            recorder.step(sums, epoch=step // STEPS_PER_PASS)
    last = recorder.readings[-1].main
    assert last.drift_reason == "no losses were passed: step(losses=per_sample, samples=ids)"
    assert (last.drift, last.revisited) == (None, 0)
    assert last.passes == pytest.approx(last.step / STEPS_PER_PASS, abs=0.35)  # a reading every 5 of 12 steps


def test_samples_that_are_not_to_be_tracked(training):
    readings = record(training, lambda rows, ids: object(), revisits=0)
    assert {reading.drift_reason for reading in readings} == {"samples are not tracked"}


def test_samples_that_never_come_back_are_given_up(training):
    with Recorder(every=5) as recorder:
        for step, (sums, rows, _, losses) in enumerate(training):
            recorder.step(sums, losses=losses, samples=rows + 100 * step, epoch=step / STEPS_PER_PASS)
            if step > 3 * STEPS_PER_PASS:
                assert not recorder._samples.cut()
    assert recorder.readings[-1].main.drift_reason == "no sample has come back in 2 passes"


EXPECTED = "samples: expected whole numbers or text, [B], or the samples themselves, [B, ...]"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"losses": jnp.ones(7)}, "losses: expected one for each sample, found 7 losses for 8 samples"),
        (
            {"losses": jnp.ones((8, 2))},
            "losses: expected one number for each sample, [B], found float32 of shape (8, 2)",
        ),
        ({"losses": 0.5}, "losses: expected one number for each sample, [B], found float64 of shape ()"),
        ({"losses": ["low"] * 8}, "losses: expected one number for each sample, [B], found <U3 of shape (8,)"),
        ({"losses": [1.0, [2.0]]}, "losses: expected an array, found list (setting an array element"),
        ({"losses": [jnp.ones(1), jnp.ones(2)]}, "losses: expected an array, found list (All input arrays must have"),
        ({"losses": None}, "losses: expected them beside samples, found none; step(losses=per_sample, samples=ids)"),
        ({"samples": None}, "samples: expected them beside losses, found none; step(losses=per_sample, samples=ids)"),
        ({"samples": np.arange(3)}, "losses: expected one for each sample, found 8 losses for 3 samples"),
        ({"samples": np.ones(8)}, EXPECTED),
        ({"samples": jnp.ones(8)}, EXPECTED),
        ({"samples": [True] * 8}, EXPECTED),
        ({"samples": {"input_ids": 1}}, f"{EXPECTED}, found object of shape ()"),
        ({"samples": [None] * 8}, f"{EXPECTED}, found object of shape (8,)"),
        ({"samples": np.array([["a"]] * 8)}, "samples: expected rows of numbers, found an array of <U1"),
        ({"samples": jnp.ones((8, 2), complex)}, "samples: expected rows of numbers, found an array of complex64"),
        ({"samples": jax.random.split(jax.random.key(0), 8)}, f"{EXPECTED}, found key<fry> of shape (8,)"),
    ],
)
def test_what_cannot_be_used_warns_once_and_stops_nothing(training, given, message):
    wrong = range(13, 24, 2)
    steps = [(sums, None if i in wrong else rows, ids, losses) for i, (sums, rows, ids, losses) in enumerate(training)]
    recorder = Recorder(every=5)

    def train():
        with recorder:
            for step, (sums, _, ids, losses) in enumerate(steps):
                good = {"losses": losses, "samples": ids}
                recorder.step(sums, **(good | given if step in wrong else good))

    with pytest.warns(LogAlignWarning, match=f"step 13: {re.escape(message)}") as told:
        train()
    assert len(told) == 1
    assert "steps like this are left out of the drift" in str(told[0].message)
    # As though those steps had had no samples.
    with Recorder(every=5) as without:
        for step, (sums, _, ids, losses) in enumerate(steps):
            without.step(sums, **({} if step in wrong else {"losses": losses, "samples": ids}))
    readings, expected = ([each.main for each in one.readings] for one in (recorder, without))
    assert values(readings) == values(expected)
    assert readings[-1].drift is not None


def test_lengths_that_differ_from_step_to_step_warn_once(training):
    recorder = Recorder(every=5)

    def train():
        with recorder:
            for step, (sums, _, ids, losses) in enumerate(training):
                recorder.step(sums, losses=losses[: step % BATCH], samples=ids)

    with pytest.warns(LogAlignWarning, match="found 0 losses for 8 samples") as told:
        train()
    assert len(told) == 1


def test_where_all_is_wrong_the_reading_says_so(training):
    with pytest.warns(LogAlignWarning, match="losses: expected one number") as told:
        readings = record(training, losses=lambda losses: losses[:, None])
    assert len(told) == 1
    assert readings[-1].drift_reason.startswith("losses: expected one number for each sample, [B], found float32")


def test_an_array_that_was_donated_warns_once(training):
    recorder = Recorder(every=5)

    def train():
        with recorder:
            for step, (sums, _, ids, losses) in enumerate(training):
                mine = losses + 0
                if step == 14:
                    mine.delete()  # before
                recorder.step(sums, losses=mine, samples=ids)
                if step == 16:
                    mine.delete()  # and after

    with pytest.warns(LogAlignWarning, match="losses: expected an array that is there, found one that was don") as told:
        train()
    assert len(told) == 1
    assert recorder.readings[-1].main.drift is not None


def test_losses_that_are_not_finite_are_in_no_pair(training):
    spoiled = training.copy()
    for i, value in ((30, math.nan), (31, math.inf), (32, 1e35)):
        sums, rows, ids, losses = training[i]
        spoiled[i] = (sums, rows, ids, losses.at[:3].set(value))
    readings = record(spoiled)
    unknown = [
        (sums, rows, ids, np.where(np.asarray(losses) < 1e30, losses, np.nan)) for sums, rows, ids, losses in spoiled
    ]
    for reading in readings[8:10]:
        # The visits are known, their losses are not: neither pair of such a visit is there.
        assert reading.revisited < by_hand(training, reading.step).pairs
    assert values(readings) == values(record(unknown))
    assert values(readings)[-1] == pytest.approx(values(record(training))[-1], abs=1e-12)  # two passes later


def test_ids_that_repeat_within_a_batch_are_one_visit_with_the_mean(training):
    readings = record(
        training,
        samples=lambda rows, ids: np.concatenate([ids, ids]),
        losses=lambda losses: jnp.concatenate([losses - 0.25, losses + 0.25]),
    )
    expected = record(training)
    assert [each[4:] for each in values(readings)] == [each[4:] for each in values(expected)]
    assert values(readings)[-1] == pytest.approx(values(expected)[-1], abs=1e-6)


def test_a_set_of_samples_that_changes_half_way(training):
    half = len(training)
    readings = record(
        [*training, *[(sums, rows, ids + 1000, losses) for sums, rows, ids, losses in training]], revisits=96
    )
    # The new samples take the place of those that come no more.
    assert readings[half // 5].drift is not None
    assert readings[-1].drift == pytest.approx(by_hand(training, readings[-1].step - half).drift, abs=0.05)
    assert readings[-1].revisited > 64


def test_batches_without_a_sample(training):
    steps = [*training[:20], (training[0][0], np.zeros((0, LENGTH)), np.zeros(0), jnp.zeros(0)), *training[20:]]
    for samples in (lambda rows, ids: rows, lambda rows, ids: ids.astype(int), lambda rows, ids: ids.tolist()):
        assert record(steps, samples)[-1].drift is not None


def test_traced_arrays_are_refused(training):
    recorder = Recorder(every=5)
    sums, rows, ids, losses = training[0]
    recorder.step(sums)
    for given in ({"losses": losses, "samples": rows}, {"losses": list(losses), "samples": ids}):
        with pytest.raises(InputError, match=r"step\(losses=...\): expected values, found traced ones"):
            jax.jit(lambda given: recorder.step(None, **given))(given)
    recorder.step(None, losses=losses, samples=rows)
    assert recorder._step == 2


def test_how_many_samples_to_follow():
    for wrong in (-1, 2.5, True, "all"):
        with pytest.raises(InputError, match="revisits: expected how many samples to follow, 0 for none, found"):
            Recorder(revisits=wrong)
