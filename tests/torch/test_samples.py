"""Drift in a training against `revisits` on every sample's loss, in all the ways in which targets are found."""

import copy
import json
import math
import pickle
import re
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import logalign
from logalign.errors import InputError, LogAlignWarning
from logalign.torch.samples import ADVICE, UNSEEN
from tests.torch import sample_cases
from tests.torch.sample_cases import (
    BATCH,
    LENGTH,
    PASSES,
    PER_PASS,
    VOCABULARY,
    WIDTH,
    Plain,
    TinyForCausalLM,
    model_of,
    order,
    plain_loss,
    readings_of,
    row_losses,
    steps_of,
    text,
    train,
    truth_of,
)
from tests.torch.workers import Workers

torch.set_num_threads(1)


def check(losses, monitor, *, least=4, tolerance=1e-5, skip=0):
    """The readings say what `revisits` says of all samples' losses."""
    expected, found = truth_of(order(), losses, steps_of(monitor)), readings_of(monitor)
    decided = [(e, f) for e, f in zip(expected, found, strict=True) if f[0] is not None][skip:]
    assert len(decided) >= least
    for e, f in decided:
        assert f == pytest.approx(e, abs=tolerance)


def test_a_plain_loop_needs_nothing():
    losses, monitor = train(model_of(), loss_of=plain_loss)
    check(losses, monitor)
    last = monitor.readings[-1].main
    assert last.passes == pytest.approx((PASSES * PER_PASS - 5) / PER_PASS, abs=0.05)
    assert last.epoch is None


@pytest.mark.parametrize("every", [1, 7, 20])
def test_readings_far_apart_and_close_say_the_same(every):
    losses, monitor = train(model_of(), loss_of=plain_loss, every=every)
    check(losses, monitor, least=2)


def test_labels_that_the_model_shifts():
    def loss_of(model, batch):
        labels = batch.clone()
        labels[:, :4] = -100
        loss, logits = model(batch, labels=labels)
        return loss, row_losses(logits[:, :-1], labels[:, 1:])

    losses, monitor = train(model_of(TinyForCausalLM), loss_of=loss_of)
    check(losses, monitor)


def test_targets_that_do_not_count_are_seen_in_the_gradient():
    def loss_of(model, batch):
        logits, targets = model(batch[:, :-1]), batch[:, 1:].clone()
        targets[batch[:, 1:] % 3 == 0] = -100
        targets[:, 0] = batch[:, 1]  # one at least
        return (
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100),
            row_losses(logits, targets),
        )

    losses, monitor = train(model_of(), loss_of=loss_of)
    check(losses, monitor)


@pytest.mark.parametrize("scale", [128.0, 1e-3])
def test_a_scaled_loss_has_the_same_targets(scale):
    def loss_of(model, batch):
        loss, losses = plain_loss(model, batch)
        return scale * loss, losses

    losses, monitor = train(model_of(), loss_of=loss_of)
    check(losses, monitor)


def test_label_smoothing_has_the_same_targets():
    def loss_of(model, batch):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), label_smoothing=0.1)
        return loss, row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(), loss_of=loss_of)
    check(losses, monitor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """The loss is taken in float32 from logits in half precision, as the training's own."""

    def loss_of(model, batch):
        with torch.autocast("cpu", dtype=dtype):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        return 64 * loss, row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(), loss_of=loss_of)
    check(losses, monitor)


@pytest.mark.parametrize("micro", [2, 4])
def test_accumulation(micro):
    losses, monitor = train(model_of(), loss_of=plain_loss, micro=micro)
    check(losses, monitor)


def test_ids_say_who_is_who():
    """The rows are changed on the way, as augmentation changes images."""
    noise = torch.Generator().manual_seed(5)

    def loss_of(model, batch):
        batch = torch.where(torch.rand(batch.shape, generator=noise) < 0.1, 7, batch)
        return plain_loss(model, batch)

    losses, monitor = train(
        model_of(), loss_of=loss_of, step_kwargs=lambda *, samples, **_: {"samples": samples}, micro=2
    )
    check(losses, monitor, skip=2)


@pytest.mark.parametrize(
    "kind", [lambda ids: ids.tolist(), lambda ids: [f"row {i}" for i in ids.tolist()], lambda ids: ids.numpy()]
)
def test_ids_are_numbers_or_text(kind):
    losses, monitor = train(
        model_of(), loss_of=plain_loss, step_kwargs=lambda *, samples, **_: {"samples": kind(samples)}
    )
    check(losses, monitor, skip=2)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("kind", [lambda each: each, lambda each: each.tolist(), lambda each: each.numpy()])
def test_losses_that_the_user_gives(ids, kind):
    """A regression, whose gradient tells of no target."""

    def loss_of(model, batch):
        each = (model(batch[:, :-1]).mean(2) - batch[:, 1:] / VOCABULARY).square().mean(1)
        return each.mean(), each.detach()

    losses, monitor = train(
        model_of(),
        loss_of=loss_of,
        step_kwargs=lambda *, samples, losses, **_: {"losses": kind(losses)} | ({"samples": samples} if ids else {}),
    )
    check(losses, monitor)


def test_a_loss_that_is_no_cross_entropy_is_not_taken_for_one():
    def loss_of(model, batch):
        each = (model(batch[:, :-1]) - F.one_hot(batch[:, 1:], VOCABULARY)).square().mean((1, 2))
        return each.mean(), each.detach()

    _, monitor = train(model_of(), loss_of=loss_of)
    assert all(each.main.drift is None for each in monitor.readings)


def test_a_classifier_of_floating_point_rows():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(160, 8, generator=generator)
    labels = torch.randint(5, (160,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.01), []
    with logalign.watch(model, every=5) as monitor:
        for batch in order():
            each = F.cross_entropy(model(rows[batch]), labels[batch], reduction="none")
            each.mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(each.detach())
            monitor.step(loss=each.mean())
    check(losses, monitor)


def test_padding_changes_nothing():
    """Rows of different lengths, padded to the longest of their batch, in front or behind."""
    lengths = torch.randint(6, LENGTH + 1, (160,), generator=torch.Generator().manual_seed(2))
    place = {tuple(row.tolist()): i for i, row in enumerate(text())}

    def loss_of(model, batch):
        own = torch.tensor([lengths[place[tuple(row.tolist())]] for row in batch])
        longest = int(own.max())
        counts = torch.arange(longest) < own[:, None]
        ids = torch.where(counts, batch[:, :longest], 0)
        if int(own[0]) % 2:
            ids, counts = ids.flip(1), counts.flip(1)  # padding in front
            ids = torch.stack([torch.cat([row[row == 0], row[row != 0].flip(0)]) for row in ids])
        labels = torch.where(counts, ids, -100)
        loss, logits = model(ids, attention_mask=counts.long(), labels=labels)
        return loss, row_losses(logits[:, :-1], labels[:, 1:])

    losses, monitor = train(model_of(TinyForCausalLM), loss_of=loss_of)
    check(losses, monitor)


class Chunked(Plain):
    """The head runs outside of the model's forward, on what it returned."""

    def forward(self, ids):
        return self.body(ids)


def test_a_head_that_runs_after_the_forward():
    def loss_of(model, batch):
        logits = model.lm_head(model(batch[:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(Chunked), loss_of=loss_of)
    check(losses, monitor)


def test_a_loss_that_multiplies_by_the_weight_itself():
    losses, monitor = train(model_of(sample_cases.Fused), loss_of=sample_cases.fused_loss)
    check(losses, monitor)


class WithLiger(Plain):
    """Its loss is a module of it, which gets hidden states, weight and targets."""

    def __init__(self):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        super().__init__()
        self.loss = LigerFusedLinearCrossEntropyLoss()

    def forward(self, ids, targets):
        return self.loss(self.lm_head.weight, self.body(ids).flatten(0, 1), targets.flatten())


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is for Linux")
def test_liger():
    def loss_of(model, batch):
        loss = model(batch[:, :-1], batch[:, 1:])
        with torch.no_grad():
            logits = F.linear(model.body(batch[:, :-1]), model.lm_head.weight)
        return loss, row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(WithLiger), loss_of=loss_of)
    check(losses, monitor)


def test_a_compiled_model_whose_targets_are_the_next_tokens():
    def loss_of(model, batch):
        logits = compiled(batch)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()), row_losses(
            logits[:, :-1], batch[:, 1:]
        )

    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager")
    losses, monitor = train(model, loss_of=loss_of)
    check(losses, monitor)


def test_a_compiled_model_whose_targets_are_others_is_found_out():
    """What the loss wants is known at once, and the next tokens are not: the losses drift apart."""

    def loss_of(model, batch):
        logits = compiled(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, :-1].flatten()), row_losses(logits, batch[:, :-1])

    torch._dynamo.reset()
    model = model_of()
    compiled = torch.compile(model, backend="aot_eager")
    _, monitor = train(model, loss_of=loss_of, lr=0.05)
    last = monitor.readings[-1].main
    assert last.drift is None
    assert last.drift_reason.startswith("targets are not the next tokens: with those the loss is ")
    assert last.drift_reason.endswith(ADVICE)


def test_a_compiled_model_with_labels():
    def loss_of(model, batch):
        loss, logits = compiled(batch, labels=batch)
        return loss, row_losses(logits[:, :-1], batch[:, 1:])

    torch._dynamo.reset()
    model = model_of(TinyForCausalLM)
    compiled = torch.compile(model, backend="aot_eager")
    losses, monitor = train(model, loss_of=loss_of)
    check(losses, monitor)


def test_a_compiled_classifier_asks_for_losses():
    rows, labels = torch.randn(64, 8), torch.randint(5, (64,))
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    with logalign.watch(model, layers="2", every=1) as monitor:
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            F.cross_entropy(compiled(rows), labels).backward()
            monitor.step()
    assert monitor.readings[-1].main.drift_reason == UNSEEN


@pytest.mark.parametrize("at", [12, 25, 33])
@pytest.mark.parametrize("way", ["rows", "ids"])
def test_a_resumed_training_says_the_same(at, way):
    kwargs = (lambda *, samples, **_: {"samples": samples}) if way == "ids" else (lambda **_: {})
    _, whole = train(model_of(), loss_of=plain_loss, step_kwargs=kwargs)

    def resume(step, monitor):
        if step != at:
            return monitor
        state = json.loads(json.dumps(monitor.state_dict(), allow_nan=False))
        monitor.close()
        resumed = logalign.watch(model, every=5)
        resumed.load_state_dict(state)
        return resumed

    model = model_of()
    _, monitor = train(model, loss_of=plain_loss, step_kwargs=kwargs, on_step=resume)
    later = [numbers for numbers, step in zip(readings_of(whole), steps_of(whole), strict=True) if step > at]
    assert steps_of(monitor) == [step for step in steps_of(whole) if step > at]
    assert readings_of(monitor) == [pytest.approx(each, abs=1e-9) if each[0] is not None else each for each in later]


def test_weights_are_bit_identical():
    def weights(**watching):
        model = model_of()
        train(model, loss_of=plain_loss, **watching)
        return [parameter.detach().clone() for parameter in model.parameters()]

    for one, other in zip(weights(), weights(revisits=0), strict=True):
        assert torch.equal(one, other)
    alone = model_of()
    optimizer = torch.optim.Adam(alone.parameters(), lr=0.02)
    for batch in order():
        plain_loss(alone, text()[batch])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in zip(alone.parameters(), weights(), strict=True):
        assert torch.equal(one, other)


def test_nothing_is_left_behind():
    model = model_of()
    train(model, loss_of=plain_loss)
    logits = model(text()[:4, :-1])
    assert logits._backward_hooks is None
    assert not model._forward_hooks
    assert not model.lm_head._forward_hooks


def test_none_are_followed_where_none_are_asked_for():
    _, monitor = train(model_of(), loss_of=plain_loss, revisits=0)
    last = monitor.readings[-1].main
    assert (last.drift, last.passes, last.drift_reason) == (None, None, "samples are not tracked")
    assert not monitor._recorder.samples.is_on


def test_evaluation_is_not_a_visit():
    model, held_out = model_of(), text()

    def loss_of(model, batch):
        with torch.no_grad():
            model(held_out[:, :-1])
        model.eval()
        model(batch[:, :-1])
        model.train()
        return plain_loss(model, batch)

    losses, monitor = train(model, loss_of=loss_of)
    check(losses, monitor)


def test_checkpointing_is_one_visit():
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):

        class Checkpointed(Plain):
            def forward(self, ids):
                x = self.body(ids).requires_grad_()
                return checkpoint(self.lm_head, x, use_reentrant=reentrant)  # noqa: B023

        losses, monitor = train(model_of(Checkpointed), loss_of=plain_loss)
        if not reentrant:
            check(losses, monitor)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"losses": [1.0, 2.0]}, "expected one loss for each of the 16 rows of the step's forwards, found 2"),
        ({"losses": "many"}, "losses: expected one number for each row of the step's forwards, found str"),
        ({"losses": torch.ones(4, 4)}, r"losses: expected one number for each row .* found shape \(4, 4\)"),
        ({"samples": [1, 2, 3], "losses": torch.ones(16)}, "expected one loss for each of the 3 samples, found 16"),
        ({"samples": 7, "losses": torch.ones(16)}, "samples: expected an id for each row .* found int"),
        ({"samples": torch.rand(16), "losses": torch.ones(16)}, "samples: expected whole numbers"),
        ({"samples": torch.ones(2, 8, dtype=int), "losses": torch.ones(16)}, "samples: expected whole numbers"),
    ],
)
def test_what_is_wrong_with_what_is_given_is_told_once(given, words):
    model = model_of()
    with logalign.watch(model, every=2) as monitor, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in order()[:9]:
            plain_loss(model, text()[batch])[0].backward()
            monitor.step(**given)
    told = [str(each.message) for each in caught if issubclass(each.category, LogAlignWarning)]
    assert len(told) == 1
    assert re.search(words, told[0])


def test_losses_with_nan_are_left_out():
    def kwargs(*, step, losses, **_):
        given = losses.clone()
        given[step % BATCH] = math.nan
        return {"losses": given}

    _, monitor = train(model_of(), loss_of=plain_loss, step_kwargs=kwargs)
    last = monitor.readings[-1].main
    assert last.drift is not None
    assert 80 < last.revisited < 145


def test_ids_that_repeat_within_a_batch():
    _, monitor = train(
        model_of(), loss_of=plain_loss, step_kwargs=lambda *, samples, **_: {"samples": samples // 2 * 2}
    )
    last = monitor.readings[-1].main
    assert last.drift is None or math.isfinite(last.drift)
    assert last.lar is not None


def test_identical_rows_in_the_data():
    rows = text()
    rows[:20] = rows[0]
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    with logalign.watch(model, every=5) as monitor:
        for batch in order():
            loss, _ = plain_loss(model, rows[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
    last = monitor.readings[-1].main
    assert last.passes == pytest.approx(45 / PER_PASS, abs=0.3)
    assert last.drift is not None


@pytest.mark.parametrize("size", [16, 8])
def test_one_or_two_steps_a_pass_have_a_defined_result(size):
    rows, model = text()[:16], model_of()
    generator = torch.Generator().manual_seed(0)
    with logalign.watch(model, every=3) as monitor:
        for _ in range(20):
            for batch in torch.randperm(16, generator=generator).reshape(-1, size):
                loss, _ = plain_loss(model, rows[batch])
                loss.backward()
                monitor.step(loss=loss)
    last = monitor.readings[-1].main
    assert last.passes == pytest.approx(last.step * size / 16, abs=1.1)
    assert last.drift is None
    assert last.drift_reason


class TakesADict(Plain):
    def forward(self, batch):
        return super().forward(batch["input_ids"])


class TakesNothing(Plain):
    def forward(self):
        return super().forward(torch.randint(1, VOCABULARY, (4, LENGTH)))


class TakesSparse(Plain):
    def forward(self, counts):
        return self.lm_head(torch.zeros(counts.shape[0], WIDTH) + counts.to_dense().sum())


class TakesNested(Plain):
    def forward(self, ids):
        return self.lm_head(self.body(torch.nested.to_padded_tensor(ids, 0)))


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (TakesDict := TakesADict, lambda rows: ({"input_ids": rows},)),
        (TakesNothing, lambda rows: ()),
        (TakesSparse, lambda rows: (torch.eye(4).to_sparse(),)),
        (TakesNested, lambda rows: (torch.nested.nested_tensor(list(rows)),)),
    ],
)
def test_inputs_of_any_kind_stop_nothing(kind, make):
    model = model_of(kind)
    with logalign.watch(model, every=2) as monitor, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        for step in range(6):
            loss = model(*make(text()[4 * step : 4 * step + 4])).square().mean()
            loss.backward()
            monitor.step(loss=loss)
    assert monitor.readings[-1].main.lar is not None
    assert monitor.readings[-1].main.drift is None


class Wrapped(nn.Module):
    """Whose own forward does not run, as a LightningModule's in `training_step()`."""

    def __init__(self):
        super().__init__()
        self.inner = model_of()
        self.checks = nn.ModuleList([nn.Linear(2, 2)])


@pytest.mark.parametrize("layers", ["unembedding", "inner.lm_head"])
def test_a_part_that_runs_by_itself(layers):
    def loss_of(model, batch):
        return plain_loss(model.inner, batch)

    losses, monitor = train(Wrapped(), loss_of=loss_of, layers=layers)
    check(losses, monitor)


def test_a_dict_of_inputs_is_looked_into():
    def loss_of(model, batch):
        logits = model({"input_ids": batch[:, :-1]})
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(TakesADict), loss_of=loss_of)
    check(losses, monitor)


def test_an_error_of_our_own_ends_the_tracking_and_not_the_training(monkeypatch):
    monkeypatch.setattr("logalign.torch.samples.joined_hashes", lambda *_, **__: 1 / 0)
    with pytest.warns(LogAlignWarning, match="samples are followed no more: ZeroDivisionError"):
        _, monitor = train(model_of(), loss_of=plain_loss)
    last = monitor.readings[-1].main
    assert last.lar is not None
    assert "ZeroDivisionError" in last.drift_reason


def test_a_stream_is_told_once_and_costs_nothing_from_then_on(caplog):
    caplog.set_level("INFO", logger="logalign")
    model = model_of()
    generator = torch.Generator().manual_seed(0)
    with logalign.watch(model, every=5) as monitor:
        for step in range(60):
            rows = torch.randint(1, VOCABULARY, (16, LENGTH + 1), generator=generator)
            loss, _ = plain_loss(model, rows)
            loss.backward()
            monitor.step(loss=loss, epoch=step / 10)
        assert not monitor._recorder.samples.is_on
        assert monitor._recorder.listens == monitor.next_is_monitored
    assert caplog.text.count("no sample has come back in 2 passes") == 1
    assert monitor.readings[-1].main.drift_reason == "no sample has come back in 2 passes"
    assert monitor.readings[-1].main.passes == pytest.approx(5.5)


def test_an_epoch_at_another_pace_is_told_once():
    with pytest.warns(LogAlignWarning, match="epoch: expected passes over the data so far, found") as caught:
        train(model_of(), loss_of=plain_loss, step_kwargs=lambda *, step, **_: {"epoch": step / 100})
    assert len(caught) == 1


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "all"])
def test_revisits_is_a_number_of_samples(wrong):
    with pytest.raises(InputError, match="revisits: expected how many samples to follow, 0 for none, found"):
        logalign.watch(model_of(), revisits=wrong)


def test_a_copy_of_a_watched_model_has_no_samples():
    model = Wrapped()
    with logalign.watch(model, every=1):
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        plain_loss(twin.inner, text()[:4])[0].backward()
    assert np.isfinite([float(parameter.grad.norm()) for parameter in twin.inner.parameters()]).all()


@pytest.fixture(scope="module")
def truth():
    return sample_cases.alone()


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request):
    workers = Workers(request.param)
    yield workers
    workers.stop()


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        (sample_cases.ddp, ()),
        (sample_cases.ddp, (2,)),
        (sample_cases.ddp, (1, True)),
        (sample_cases.fsdp, ()),
        (sample_cases.fsdp_fused, ()),
        (sample_cases.ddp_compiled, ()),
    ],
    ids=["ddp", "ddp-accumulation", "ddp-ids", "fsdp", "fsdp-fused", "ddp-compiled"],
)
def test_ranks_say_what_one_process_says(ranks, truth, case, arguments):
    found = ranks.run(case, *arguments)
    assert all(each == found[0] for each in found)
    decided = [(e, f) for e, f in zip(truth, found[0], strict=True) if e[0] is not None]
    assert len(decided) >= 4
    first = 2 if arguments == (1, True) else 0  # ids come after the first forward, whose visits are lost
    for e, f in decided[first:]:
        assert f == pytest.approx(e, abs=1e-5)


def test_ranks_have_the_verdicts_of_one_process(ranks):
    said = sample_cases.verdicts()
    assert len({outcome for outcome, _ in said}) > 1
    assert all(theirs == said for theirs in ranks.run(sample_cases.verdicts))


def follow(batches, rows, **watching):
    """Train on batches of rows, and give every visit and the monitor."""
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    visits = []
    with logalign.watch(model, every=5, **watching) as monitor:
        for step, batch in enumerate(batches):
            loss, losses = plain_loss(model, rows[batch])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
            visits += [(int(i), step, float(each)) for i, each in zip(batch, losses, strict=True)]
    return np.array(visits), monitor


def test_an_uneven_last_batch():
    """150 samples in batches of 16: the last of a pass has six."""
    generator = torch.Generator().manual_seed(0)
    batches = [batch for _ in range(6) for batch in torch.randperm(150, generator=generator).split(16)]
    visits, monitor = follow(batches, text())
    expected = [
        logalign.revisits(visits[:, 0], visits[:, 1] / 10, visits[:, 2], now=(each.step + 1) // 10 - 0.1)
        for each in monitor.readings
    ]
    decided = 0
    for e, f in zip(expected, monitor.readings, strict=True):
        if f.main.drift is not None:
            decided += 1
            assert f.main.passes == pytest.approx(f.step / 10, abs=0.06)
            assert (f.main.drift, f.main.gain, f.main.revisited) == pytest.approx((e.drift, e.gain, e.pairs), abs=1e-5)
    assert decided >= 6


def test_samples_drawn_with_replacement():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(160, (16,), generator=generator) for _ in range(80)]
    visits, monitor = follow(batches, text())
    last = monitor.readings[-1].main
    assert last.passes == pytest.approx(7.5, abs=1.5)
    expected = logalign.revisits(visits[:, 0], visits[:, 1] / 10, visits[:, 2], now=7.5)
    assert last.drift == pytest.approx(expected.drift, abs=3 * expected.drift_error)


def test_a_curriculum_that_moves_on_to_other_samples():
    generator = torch.Generator().manual_seed(0)
    easy = [batch for _ in range(4) for batch in torch.randperm(80, generator=generator).split(8)]
    hard = [80 + batch for _ in range(6) for batch in torch.randperm(80, generator=generator).split(8)]
    _, monitor = follow([*easy, *hard], text())
    found = [each.main for each in monitor.readings]
    assert any(each.drift is not None for each in found if each.step < 40)
    assert any(each.drift is not None for each in found if each.step > 70)
    assert all(each.drift is not None or each.drift_reason for each in found)


class Scores(TinyForCausalLM):
    """What the loss is taken of is not what the head gives."""

    def score(self, logits):
        return logits / 8

    def forward(self, input_ids, labels=None):
        scores = self.score(Plain.forward(self, input_ids))
        loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return loss, scores


class Capped(Scores):
    def score(self, logits):
        return 0.5 * torch.tanh(logits / 0.5)


def says_nothing(monitor):
    assert all(each.main.drift is None for each in monitor.readings)
    assert monitor.readings[-1].main.drift_reason == UNSEEN
    assert monitor.readings[-1].main.lar is not None


@pytest.mark.parametrize("kind", [Scores, Capped])
def test_logits_that_are_changed_after_the_head_give_no_drift(kind):
    def loss_of(model, batch):
        loss, scores = model(batch, labels=batch)
        return loss, row_losses(scores[:, :-1], batch[:, 1:])

    says_nothing(train(model_of(kind), loss_of=loss_of, lr=0.1)[1])


@pytest.mark.parametrize(
    "penalty",
    [
        lambda logits: 0.3 * logits.square().mean(),
        lambda logits: 100 * (torch.softmax(logits, -1) - 1 / VOCABULARY).abs().mean(),
    ],
)
def test_a_cross_entropy_with_something_else_gives_no_drift(penalty):
    def loss_of(model, batch):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss + penalty(logits), row_losses(logits, batch[:, 1:])

    says_nothing(train(model_of(), loss_of=loss_of)[1])


class Decoder(Plain):
    """Its `targets` are its inputs, and the user shifts them in the loss."""

    def forward(self, source, targets):
        return super().forward(targets)


def test_labels_that_the_gradient_contradicts_give_no_drift():
    def loss_of(model, batch):
        logits = model(batch, batch)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    says_nothing(train(model_of(Decoder), loss_of=loss_of)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_fitted_count(dtype):
    """Most targets are learned by heart and some change at every visit: rows keep all of their tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(128 * 8, 64), nn.Linear(64, VOCABULARY, bias=False)).to(dtype)
    optimizer, visits = torch.optim.Adam(model.parameters(), lr=0.05), []
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCABULARY, (128, 8), generator=generator)
    with logalign.watch(model, every=4) as monitor:
        for step in range(128):
            if step % 8 == 0:
                order = torch.randperm(128, generator=generator).reshape(8, 16)
            batch = order[step % 8]
            own = targets[batch].clone()
            own[:, :2] = torch.randint(VOCABULARY, (16, 2), generator=generator)
            logits = model(batch[:, None] * 8 + torch.arange(8))
            F.cross_entropy(logits.flatten(0, 1), own.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
            visits += zip(batch.tolist(), [step / 8] * 16, row_losses(logits, own).tolist(), strict=True)
    last = monitor.readings[-1]
    who, when, losses = zip(*visits, strict=True)
    expected = logalign.revisits(who, when, losses, now=(last.step + 1) // 8 - 1 / 8)
    # In bfloat16 some rows are left out, whose gradient is too coarse.
    assert last.main.drift == pytest.approx(
        expected.drift, abs=1e-4 if dtype == torch.float32 else expected.drift_error
    )
    assert last.main.drift_error < 2 * expected.drift_error


class TwoInputs(Plain):
    """Numbers and categories, of which there are few."""

    def forward(self, numbers, categories):
        return self.lm_head(self.body(categories) + numbers.mean())


@pytest.mark.parametrize("how", ["positional", "label first"])
def test_a_sample_is_all_of_its_tensors(how):
    numbers = torch.randn(160, 3, generator=torch.Generator().manual_seed(0))
    place = {tuple(row.tolist()): i for i, row in enumerate(text())}

    def loss_of(model, batch):
        own = numbers[[place[tuple(row.tolist())] for row in batch]]
        few = batch[:, :-1] % 2
        logits = model(own, few) if how == "positional" else model.forward_of({"label": few[:, 0], "image": own}, few)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    class Either(TwoInputs):
        def forward_of(self, batch, few):
            return self(batch["image"], few)

    losses, monitor = train(model_of(Either), loss_of=loss_of)
    check(losses, monitor)


class Predicts(Plain):
    """The head is called for a further token first."""

    def forward(self, ids):
        hidden = self.body(ids)
        self.further = self.lm_head(torch.tanh(hidden))
        return self.lm_head(hidden)


def test_the_main_call_counts():
    losses, monitor = train(model_of(Predicts), loss_of=plain_loss, main_call=1)
    check(losses, monitor)


def test_an_epoch_is_trusted_where_samples_come_back_unevenly():
    """As with a sampler that draws some of them far more often."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(160)
    weights[:8] = 20.0
    rows, model = text(), model_of()
    with logalign.watch(model, every=5) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(60):
            batch = torch.multinomial(weights, 16, replacement=True, generator=generator)
            loss, _ = plain_loss(model, rows[batch])
            loss.backward()
            monitor.step(loss=loss, epoch=step / 10)
    assert [each.main.passes for each in monitor.readings] == pytest.approx(
        [each.step / 10 for each in monitor.readings]
    )


def test_losses_in_every_other_step_are_not_pairs():
    losses, monitor = train(
        model_of(),
        loss_of=plain_loss,
        step_kwargs=lambda *, step, losses, **_: {"losses": losses} if step % 2 == 0 else {},
    )
    last = monitor.readings[-1].main
    assert last.passes == pytest.approx(4.5, abs=0.1)
    if last.drift is not None:
        (expected,) = truth_of(order(), losses, [last.step])
        assert last.drift == pytest.approx(expected[0], abs=4 * last.drift_error)


@pytest.mark.parametrize("at", [2, 3])
def test_forwards_that_are_only_traced_are_left_out(at):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    def on_step(step, monitor):
        if step == at:
            with FakeTensorMode(allow_non_fake_inputs=True):
                ones = torch.ones(4, LENGTH, dtype=torch.int64)
                model(ones).sum().backward()
            nodes.append(len(make_fx(lambda x: model(x))(torch.ones(4, LENGTH, dtype=torch.int64)).graph.nodes))
            model.zero_grad()
        return monitor

    nodes, model = [], model_of()
    losses, monitor = train(model, loss_of=plain_loss, on_step=on_step)
    check(losses, monitor)
    nodes_of_it = len(make_fx(lambda x: model(x))(torch.ones(4, LENGTH, dtype=torch.int64)).graph.nodes)
    assert nodes == [nodes_of_it]


def test_logits_that_are_saved_say_nothing_of_us(tmp_path):
    model = model_of()
    with logalign.watch(model, every=1) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(model(text()[:4, :-1]), tmp_path / "logits.pt")
        monitor.step()


def test_two_backwards_are_one_visit():
    def loss_of(model, batch):
        logits = model(batch[:, :-1])
        (1e-6 * logits.square().mean()).backward(retain_graph=True)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    losses, monitor = train(model_of(), loss_of=loss_of)
    check(losses, monitor)


@pytest.mark.parametrize(("before", "after"), [(0, 512), (512, 0)])
def test_a_resumed_training_follows_as_many_as_it_is_told(before, after):
    model = model_of()
    with logalign.watch(model, every=1, revisits=before) as monitor:
        plain_loss(model, text()[:4])[0].backward()
        monitor.step()
        state = monitor.state_dict()
    with logalign.watch(model, every=1, revisits=after) as monitor:
        monitor.load_state_dict(state)
        plain_loss(model, text()[:4])[0].backward()
        monitor.step()
    told = monitor.readings[-1].main.drift_reason
    assert (told == "samples are not tracked") is (after == 0)
