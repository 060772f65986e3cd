"""The recorder beside jitted trainings: Flax NNX, Equinox, plain Optax; against NumPy and against PyTorch."""

import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import logalign
from logalign import Energies, open_run
from logalign.errors import InputError, LogAlignError, LogAlignWarning, RunError
from logalign.integrations.jax import Recorder
from logalign.jax import energies

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
STEPS = 6


def batch(step):
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(32, 8)).astype(np.float32), rng.integers(0, 5, 32)


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# Each training yields, for every step, the weight [m, n] and inputs of the head's forward, the loss, and the sums.


def train_optax(*, measured, every=1, adam=True):
    rng = np.random.default_rng(0)
    parameters = {"body": rng.normal(size=(8, 16)) / 3, "head": rng.normal(size=(16, 5)) / 4, "bias": np.ones(5)}
    parameters = {name: jnp.asarray(value, jnp.float32) for name, value in parameters.items()}
    optimizer = optax.adamw(1e-2) if adam else optax.sgd(0.5)
    state = optimizer.init(parameters)

    def loss_of(parameters, x, y, now):
        hidden = jnp.tanh(x @ parameters["body"])
        logits = hidden @ parameters["head"] + parameters["bias"]
        sums = None
        if measured:
            sums = energies(parameters["head"].T, hidden, outputs=logits, bias=parameters["bias"], when=now)
        return cross_entropy(logits, y), (sums, hidden)

    @jax.jit
    def train_step(parameters, state, x, y, now):
        (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters, x, y, now)
        updates, state = optimizer.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, loss, aux

    for step in range(STEPS):
        before = parameters
        parameters, state, loss, (sums, hidden) = train_step(parameters, state, *batch(step), step % every == 0)
        yield parameters, before["head"].T, hidden, loss, sums


def train_nnx(*, measured):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body, self.head = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 5, rngs=rngs)

    def loss_of(model, x, y):
        hidden = nnx.tanh(model.body(x))
        logits = model.head(hidden)
        sums = None
        if measured:
            sums = energies(model.head.kernel.T, hidden, outputs=logits, bias=model.head.bias[...])
        return cross_entropy(logits, y), (sums, hidden)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        (loss, aux), gradients = nnx.value_and_grad(loss_of, has_aux=True)(model, x, y)
        optimizer.update(model, gradients)
        return loss, aux

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    for step in range(STEPS):
        weight = model.head.kernel.T
        loss, (sums, hidden) = train_step(model, optimizer, *batch(step))
        yield nnx.state(model, nnx.Param), weight, hidden, loss, sums


def train_equinox(*, measured):
    optimizer = optax.adamw(1e-2)

    def loss_of(model, x, y):
        hidden = jnp.tanh(jax.vmap(model[0])(x))
        logits = jax.vmap(model[1])(hidden)
        sums = energies(model[1].weight, hidden, outputs=logits, bias=model[1].bias) if measured else None
        return cross_entropy(logits, y), (sums, hidden)

    @eqx.filter_jit
    def train_step(model, state, x, y):
        (loss, aux), gradients = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, x, y)
        updates, state = optimizer.update(gradients, state, model)
        return eqx.apply_updates(model, updates), state, loss, aux

    keys = jax.random.split(jax.random.key(0))
    model = (eqx.nn.Linear(8, 16, key=keys[0]), eqx.nn.Linear(16, 5, key=keys[1]))
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    for step in range(STEPS):
        weight = model[1].weight
        model, state, loss, (sums, hidden) = train_step(model, state, *batch(step))
        yield model, weight, hidden, loss, sums


trainings = pytest.mark.parametrize("train", [train_optax, train_nnx, train_equinox])


@trainings
def test_readings_are_those_of_numpy(train, tmp_path):
    truths = []
    with Recorder(tmp_path / "run", every=1, settings={"lr": 1e-2}) as recorder:
        for _, weight, hidden, loss, sums in train(measured=True):
            recorder.step(sums, loss=loss, lr=1e-2, epoch=0.5, val_loss=jnp.float32(2.0))
            truths.append((Energies.of(np.asarray(weight), np.asarray(hidden)), float(loss)))
    readings = open_run(tmp_path / "run").readings
    assert [reading.step for reading in readings] == list(range(STEPS))
    for reading, kept, (truth, loss) in zip(readings, recorder.readings, truths, strict=True):
        assert {form: getattr(reading, form) for form in FORMS} == pytest.approx(
            {form: getattr(truth, form) for form in FORMS}, abs=2e-6
        )
        assert reading == kept.main
        assert reading.lar == pytest.approx(truth.lar, abs=1e-6)
        assert (reading.loss, reading.loss_mean, reading.lr, reading.epoch) == (loss, loss, 1e-2, 0.5)
        assert (reading.n, reading.m, reading.tokens, reading.tokens_seen) == (16, 5, 32, 32 * (reading.step + 1))
        assert (reading.kept, reading.extra, reading.reason) == (None, {"val_loss": 2.0}, None)


@trainings
def test_weights_are_bit_identical_with_and_without(train):
    runs = [[step[0] for step in train(measured=measured)][-1] for measured in (True, False)]
    with_energies, without = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(run)] for run in runs)
    assert with_energies == without
    assert len(without) > 2


def test_the_series_is_that_of_the_same_training_in_torch():
    first = next(train_optax(measured=True, adam=False))
    rng = np.random.default_rng(0)
    body, head = rng.normal(size=(8, 16)) / 3, rng.normal(size=(16, 5)) / 4
    model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.Tanh(), torch.nn.Linear(16, 5))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (body.T, head.T, np.ones(5)), strict=True):
            parameter.copy_(torch.tensor(value))
    assert first[1] == pytest.approx(model[2].weight.detach().numpy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Recorder(every=1) as recorder, logalign.watch(model, every=1) as monitor:
        for step, (_, _, _, loss, sums) in enumerate(train_optax(measured=True, adam=False)):
            recorder.step(sums, loss=loss)
            x, y = batch(step)
            torch_loss = torch.nn.functional.cross_entropy(model(torch.tensor(x)), torch.tensor(y))
            optimizer.zero_grad()
            torch_loss.backward()
            optimizer.step()
            monitor.step(loss=torch_loss)
    for ours, theirs in zip(recorder.readings, monitor.readings, strict=True):
        for form in (*FORMS, "loss"):
            assert getattr(ours.main, form) == pytest.approx(getattr(theirs.main, form), abs=1e-5), form


# The recorder ----------------------------------------------------------------------------------------------------


def sums_of(scale=1.0, *, m=6, n=4, mask=None, when=None):
    rng = np.random.default_rng(1)
    W, X = rng.normal(size=(m, n)), rng.normal(size=(20, n)) + scale
    return energies(jnp.asarray(W, jnp.float32), jnp.asarray(X, jnp.float32), mask=mask, when=when)


def record_all(recorder, steps, **values):
    with recorder:
        for sums in steps:
            recorder.step(sums, **values)


def test_every_so_many_steps_and_the_mean_of_the_losses_between():
    sums = sums_of()
    with Recorder(every=3) as recorder:
        for step in range(7):
            assert recorder.next_is_monitored == (step % 3 == 0)
            recorder.step(sums if step % 3 == 0 else None, loss=jnp.asarray([float(step)], jnp.bfloat16))
    assert [readings.step for readings in recorder.readings] == [0, 3, 6]
    assert [readings.main.loss_mean for readings in recorder.readings] == [0.0, 2.0, 5.0]
    assert [readings.main.tokens_seen for readings in recorder.readings] == [20, 80, 140]


def test_a_step_waits_for_nothing_and_the_reading_comes_later():
    @jax.jit
    def summed(x):  # a good part of a second of work; it is dispatched in a thousandth of that
        slow = jax.lax.fori_loop(0, 200, lambda _, y: jnp.cos(y @ x), x)
        return energies(x[:5], slow)

    x = jax.random.normal(jax.random.key(0), (400, 400))
    with Recorder(every=1) as recorder:
        jax.block_until_ready(sums := summed(x))
        assert recorder.step(sums).step == 0
        assert recorder.step(summed(x)) is None
        assert [readings.step for readings in recorder.readings] == [0]
        assert recorder.flush().step == 1
        assert recorder.flush() is None
    assert len(recorder.readings) == 2


def test_several_sites_a_mask_and_a_name_of_ones_own(tmp_path):
    mask = jnp.arange(20) < 15
    with Recorder(tmp_path / "run", every=1, main="head") as recorder:
        recorder.step({"body": sums_of(m=8), "head": sums_of(mask=mask)})
    readings = recorder.readings[0]
    assert set(readings) == {"head", "body"}
    assert readings.main.site == "head"
    assert (readings["head"].kept, readings["head"].tokens, readings["head"].tokens_seen) == (0.75, 15, 20)
    assert readings["head"].lar_centered is not None
    assert readings["body"].lar_centered is None  # no softmax behind it
    meta = open_run(tmp_path / "run").meta
    assert meta["main"] == "head"
    assert meta["sites"]["body"] == {
        "module": "body",
        "kind": "JAX",
        "how": "given to Recorder.step()",
        "softmax": False,
        "m": 8,
        "n": 4,
    }


def test_the_verdict_is_that_of_the_recorded_run(tmp_path):
    with Recorder(tmp_path / "run", every=1, trackers="csv") as recorder:
        for step in range(60):
            recorder.step(sums_of(1 + step / 10), loss=2 - step / 60, epoch=step / 7)
    assert recorder.verdict == logalign.diagnose(tmp_path / "run")
    assert recorder.verdict.step == 59
    assert next((tmp_path / "run").glob("*.csv")).read_text().count("\n") > 59


def record(path, steps, *, resume=False, state=None):
    with Recorder(path, every=2, resume=resume) as recorder:
        if state is not None:
            recorder.load_state_dict(state)
        for step in steps:
            recorder.step(sums_of(1 + step / 10), loss=jnp.float32(2 - step / 60), epoch=step / 7)
        return json.loads(json.dumps(recorder.state_dict())), recorder.verdict


@pytest.mark.parametrize("with_state", [True, False], ids=["from a checkpoint", "after the last reading"])
def test_a_run_that_is_resumed_is_the_run_uninterrupted(tmp_path, with_state):
    _, verdict = record(tmp_path / "whole", range(40))
    state, _ = record(tmp_path / "cut", range(21))
    if with_state:
        record(tmp_path / "cut", range(21, 33), resume=True)  # lost when training goes back to the checkpoint
    found = record(tmp_path / "cut", range(21, 40), resume=True, state=state if with_state else None)[1]
    whole, cut = (open_run(tmp_path / name).columns() for name in ("whole", "cut"))
    for name, column in whole.items():
        if name != "time":
            np.testing.assert_array_equal(cut[name], column, err_msg=name)
    assert found == verdict


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    record(tmp_path / "run", range(3))
    with pytest.raises(RunError, match="resume=True"):
        Recorder(tmp_path / "run")


def test_what_cannot_be_written_warns_once_and_recording_goes_on(tmp_path, monkeypatch):
    recorder = Recorder(tmp_path / "run", every=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.warns(LogAlignWarning, match="readings cannot be written .*; training goes on") as told:
        record_all(recorder, [sums_of()] * 4)
    assert len(told) == 1
    assert len(recorder.readings) == 4


def test_a_tracker_that_fails_is_told_of_once():
    class Broken:
        def log(self, values, *, step):
            raise RuntimeError("out of order")

        def tell(self, verdict):
            pass

        def close(self):
            pass

    recorder = Recorder(every=1, trackers=Broken())
    with pytest.warns(LogAlignWarning, match="Broken failed and gets no more readings") as told:
        record_all(recorder, [sums_of()] * 3)
    assert len(told) == 1
    assert len(recorder.readings) == 3


def test_what_is_undefined_warns_once_and_is_written(tmp_path):
    recorder = Recorder(tmp_path / "run", every=1)
    with pytest.warns(LogAlignWarning, match="step 0, unembedding: no LAR, for no token") as told:
        record_all(recorder, [sums_of(mask=jnp.zeros(20, bool))] * 2, loss=jnp.nan)
    assert len(told) == 1
    first = open_run(tmp_path / "run").readings[0]
    assert (first.lar, first.loss, first.tokens, first.kept) == (None, None, 0, 0.0)


def test_sums_that_were_not_taken_in_a_monitored_step_are_told_of():
    recorder = Recorder(every=1)
    with pytest.warns(LogAlignWarning, match=r"energies\(\) was told not to sum"):
        record_all(recorder, [sums_of(when=False)])
    assert recorder.readings[0].main.tokens_seen is None


def test_an_exception_in_the_loop_keeps_what_was_read(tmp_path):
    recorder = Recorder(tmp_path / "run", every=1)

    def train():
        with recorder:
            recorder.step(sums_of())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert len(open_run(tmp_path / "run").readings) == 1
    recorder.close()
    with pytest.raises(LogAlignError, match="closed"):
        recorder.step(sums_of())


def test_nothing_is_transferred_but_by_the_recorder_itself():
    sums = sums_of()
    with jax.transfer_guard("disallow"), Recorder(every=1) as recorder:
        recorder.step(sums, loss=sums.input_centered)
    assert math.isfinite(recorder.readings[0].main.lar)


# Wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sums": 0.5}, "sums: expected what logalign.jax.energies() returns, or a dict of such by site, found float"),
        (
            {"sums": {}},
            "sums: expected those of the main site 'unembedding', found none; name it in Recorder(main=...)",
        ),
        ({"loss": "low"}, "step(loss=...): expected a number, found 'low'"),
        ({"loss": jnp.ones(2)}, "step(loss=...): expected one number, found an array of shape (2,)"),
        ({"lar": 0.5}, "step(lar=...): expected a name of your own, found one that readings use themselves"),
    ],
)
def test_wrong_input(given, message):
    with Recorder(every=1) as recorder:
        with pytest.raises(InputError) as error:
            recorder.step(**{"sums": sums_of(), **given})
        assert message in str(error.value)
        recorder.step(sums_of())
    assert [readings.step for readings in recorder.readings] == [0]


def test_step_inside_of_jit():
    recorder = Recorder(every=1)
    with pytest.raises(InputError, match="this is inside jit, grad, vmap or scan"):
        jax.jit(lambda x: recorder.step(energies(x, x)))(jnp.ones((3, 2)))
    with pytest.raises(InputError, match=r"step\(loss=...\): expected a value, found a traced one"):
        jax.jit(lambda x: recorder.step(sums_of(), loss=x))(1.0)
    with pytest.raises(InputError, match=r"leading axis of \(2,\)"):
        recorder.step(jax.vmap(lambda x: energies(jnp.eye(3), x))(jnp.ones((2, 4, 3))))


def test_a_loss_that_was_donated_is_an_error_and_no_crash():
    recorder = Recorder(every=2)
    recorder.step(sums_of(), loss=1.0)
    loss = jnp.ones(()) + 1
    recorder.step(None, loss=loss)
    recorder.flush()
    loss.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        recorder.step(sums_of(), loss=1.0)


def test_wrong_set_up(tmp_path):
    with pytest.raises(InputError, match="every: expected a whole number of steps from 1 on, found 0"):
        Recorder(every=0)
    with pytest.raises(InputError, match="regime"):
        Recorder(regime="memory")
    with pytest.raises(InputError, match="trackers: expected one of"):
        Recorder(trackers="paper")
    with pytest.raises(InputError, match=r"state: expected what Recorder\.state_dict"):
        Recorder().load_state_dict({"step": 3})


def test_a_baseline_of_another_shape(tmp_path):
    with Recorder(tmp_path / "baseline", every=1) as recorder:
        for step in range(60):
            recorder.step(sums_of(m=7), loss=2.0, epoch=step / 100)
    with pytest.raises(InputError, match="7"):
        Recorder(every=1, baseline=tmp_path / "baseline").step(sums_of())


def test_a_parameter_of_flax_is_not_an_array():
    layer = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"weight: expected a JAX array, found Param; pass its value"):
        energies(layer.kernel, jnp.ones((3, 4)))
