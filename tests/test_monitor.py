"""The monitor beside a one-process truth: the energies in float64 of the very arrays that the training used."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional as F

import logalign
from logalign import Baseline, Energies, Reading, diagnose, open_run, spectra, watch
from logalign.errors import InputError, LogAlignError, LogAlignWarning, RunError, SiteError

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
torch.set_num_threads(1)  # small tensors, many steps
EXACT = 2e-6  # float32 sums of a few hundred terms


class Net(nn.Module):
    """A network whose head's inputs are kept, so that a test can take the truth from them."""

    def __init__(self, *, bias=False, tied=False, head="lm_head", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(13, 8)
        self.body = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)
        setattr(self, head, nn.Linear(8, 13, bias=bias))
        if tied:
            getattr(self, head).weight = self.embedding.weight
        self.head_name = head
        self.seen = []

    def forward(self, tokens, targets=None, *, labels=None, shift_labels=None, chunks=1):
        hidden = self.dropout(torch.tanh(self.body(self.embedding(tokens))))
        head = getattr(self, self.head_name)
        self.seen.append((head.weight.detach().clone(), hidden.detach().clone()))
        return torch.cat([head(part) for part in hidden.chunk(chunks, dim=1)], dim=1)


def tokens_of(step, *, batch=4, length=6):
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, 13, (batch, length), generator=generator)


def train_step(model, optimizer, tokens, **kwargs):
    loss = F.cross_entropy(model(tokens, **kwargs).flatten(0, 1).float(), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def truth(model, masks=None):
    """The energies of all forwards that the model has seen since it was last asked."""
    weight = model.seen[0][0].double()
    inputs = torch.cat([hidden.flatten(0, -2) for _, hidden in model.seen]).double()
    mask = None if masks is None else torch.cat([mask.flatten() for mask in masks])
    model.seen.clear()
    return Energies.of(weight, inputs, mask=mask)


def assert_reading(reading, exact, *, tolerance=EXACT, softmax=True):
    for form in FORMS:
        found = getattr(reading, form)
        if form in ("lar_vocab_centered", "lar_centered") and not softmax:
            assert found is None
        else:
            assert found == pytest.approx(getattr(exact, form), abs=tolerance), form
    assert reading.effective_dim == pytest.approx(exact.effective_dim, rel=10 * tolerance)
    for name, energy in reading.energies.items():
        assert energy == pytest.approx(getattr(exact, name), rel=10 * tolerance), name
    assert (reading.n, reading.m, reading.tokens) == (exact.n, exact.m, exact.tokens)
    assert (reading.nonfinite, reading.reason) == (0, None)


# What is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_readings_are_those_of_the_forward(bias, tied, chunks):
    model = Net(bias=bias, tied=tied)
    optimizer = sgd(model)
    with watch(model, every=1) as monitor:
        for step in range(4):
            train_step(model, optimizer, tokens_of(step), chunks=chunks)
            readings = monitor.step()
            assert_reading(readings.main, truth(model))
            assert (readings.step, readings.main.site) == (step, "unembedding")
    assert [each.step for each in monitor.readings] == [0, 1, 2, 3]
    assert monitor.sites["unembedding"]["tied_to"] == (["embedding.weight"] if tied else [])


def test_step_may_come_before_or_after_the_optimizer():
    found = []
    for before in (True, False):
        model = Net()
        optimizer = sgd(model)
        with watch(model, every=1) as monitor:
            for step in range(3):
                model(tokens_of(step)).square().mean().backward()
                if before:
                    monitor.step()
                optimizer.step()
                if not before:
                    monitor.step()
        found.append([(each.main.lar, each.main.energies) for each in monitor.readings])
    assert found[0] == found[1]


def test_micro_batches_are_pooled_to_one_reading():
    model = Net(bias=True)
    optimizer = sgd(model)
    masks = []
    with watch(model, every=2) as monitor:
        for step in range(4):
            for micro_batch in range(3):
                tokens = tokens_of(10 * step + micro_batch, length=3 + micro_batch)
                masks.append(tokens % 3 != 0)
                monitor.mask(masks[-1])
                model(tokens).square().mean().backward()
            optimizer.step()
            readings = monitor.step()
            exact = truth(model, masks)
            masks.clear()
            assert (readings is None) == (step % 2 == 1)
            if readings is not None:
                assert_reading(readings.main, exact)
                assert readings.main.kept == pytest.approx(exact.tokens / (4 * 12))


def test_more_layers_by_pattern_have_no_vocabulary():
    model = Net(head="readout")
    optimizer = sgd(model)
    inputs = []
    model.body.register_forward_hook(lambda module, args, output: inputs.append((module.weight.clone(), args[0])))
    with watch(model, layers=["unembedding", "bo*"], every=1) as monitor:
        for step in range(3):
            train_step(model, optimizer, tokens_of(step))
            readings = monitor.step()
            weight, given = inputs.pop()
            assert set(readings) == {"unembedding", "body"}
            assert_reading(readings.main, truth(model))
            assert_reading(readings["body"], Energies.of(weight.double(), given.double()), softmax=False)


def test_a_layer_asked_for_twice_has_one_reading():
    model = Net(head="readout")
    optimizer = sgd(model)
    with watch(model, layers=["unembedding", "read*"], every=1) as monitor:
        for step in range(2):
            train_step(model, optimizer, tokens_of(step))
            readings = monitor.step()
            assert list(readings) == ["unembedding"]
            assert_reading(readings.main, truth(model))


def test_without_the_unembedding_the_first_layer_is_the_main_one():
    model = Net()
    with watch(model, layers=["body"], every=1) as monitor:
        train_step(model, sgd(model), tokens_of(0))
        readings = monitor.step()
    assert (readings.main.site, list(readings)) == ("body", ["body"])
    assert readings.main.lar_centered is None


def test_the_last_linear_layer_to_run_is_found():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 13), nn.Linear(5, 8)

        def forward(self, x):
            return self.last(self.first(x).relu())

    model = Backwards()
    with watch(model, every=1) as monitor:
        assert monitor.sites == {}
        for _ in range(2):
            x = torch.randn(7, 5)
            model(x).square().mean().backward()
            readings = monitor.step()
            assert_reading(readings.main, Energies.of(model.last.weight.double(), model.first(x).relu().double()))
        assert monitor.sites["unembedding"]["module"] == "last"
        assert monitor.sites["unembedding"]["how"] == "the last linear layer to run in the first forward"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = Net(bias=True).to(dtype)
    with watch(model, every=1) as monitor:
        for step in range(2):
            model(tokens_of(step)).float().square().mean().backward()
            tolerance = 1e-11 if dtype == torch.float64 else 3e-3
            assert_reading(monitor.step().main, truth(model), tolerance=tolerance)


def test_autocast():
    model = Net(bias=True)
    optimizer = sgd(model)
    with watch(model, every=1) as monitor:
        for step in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                train_step(model, optimizer, tokens_of(step))
            assert_reading(monitor.step().main, truth(model), tolerance=3e-3)


# Masks -----------------------------------------------------------------------------------------------------------

COUNTED = torch.arange(24).reshape(4, 6) % 5 != 2


@pytest.mark.parametrize("how", ["mask", "labels", "positional", "shift_labels", "labels shifted by the model"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_tokens_that_do_not_count(how, chunks):
    model = Net(bias=True)
    tokens = tokens_of(0)
    labels = torch.where(COUNTED, tokens, -100)
    args, kwargs = (tokens,), {"chunks": chunks}
    if how == "positional":
        args = (tokens, labels)
    elif how == "labels shifted by the model":
        kwargs["labels"] = torch.cat([torch.full((4, 1), 3), labels[:, :-1]], dim=1)
    elif how != "mask":
        kwargs[how] = labels
    counted = COUNTED.clone()
    if how == "labels shifted by the model":
        counted[:, -1] = False
    with watch(model, every=1, shift_labels=how.endswith("model")) as monitor:
        if how == "mask":
            monitor.mask(COUNTED)
        model(*args, **kwargs).square().mean().backward()
        reading = monitor.step().main
        assert_reading(reading, truth(model, [counted]))
        assert reading.kept == pytest.approx(counted.float().mean().item())
        model(tokens).square().mean().backward()  # a mask serves one forward
        reading = monitor.step().main
        assert_reading(reading, truth(model))
        assert reading.kept is None


def test_a_given_mask_while_the_unembedding_is_yet_to_be_found():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.readout = nn.Linear(5, 8), nn.Linear(8, 13)

        def forward(self, x):
            self.hidden = self.patches(x).mean(dim=1)
            return self.readout(self.hidden)

    model = Pooled()
    mask = torch.tensor([True, False, True])
    with watch(model, every=1) as monitor:
        for _ in range(2):
            monitor.mask(mask)
            model(torch.randn(3, 4, 5)).square().mean().backward()
            exact = Energies.of(model.readout.weight.double(), model.hidden.double(), mask=mask)
            assert_reading(monitor.step().main, exact)
        assert monitor.sites["unembedding"]["mask"] == "monitor.mask()"


def test_a_given_mask_that_does_not_fit_is_refused():
    for head in ("lm_head", "readout"):
        model = Net(head=head)
        with watch(model, every=1) as monitor:
            monitor.mask(COUNTED[:, :5])
            with pytest.raises(InputError, match=r"each of the tokens \(4, 6\) that reach the layer, found shape"):
                model(tokens_of(0))
            truth(model)
            monitor.mask(COUNTED)
            model(tokens_of(0))
            reading = monitor.step().main
            if head == "lm_head":
                assert_reading(reading, truth(model, [COUNTED]))
        with watch(model, every=1) as monitor, pytest.raises(InputError, match="expected a tensor of bool"):
            monitor.mask(COUNTED.float())


def test_nan_in_a_token_that_does_not_count():
    model = Net(bias=True)
    with torch.no_grad():
        model.embedding.weight[12] = float("nan")
    tokens = tokens_of(0) % 12
    tokens[1, 2] = 12
    mask = tokens != 12
    with watch(model, every=1, spectra_every=1) as monitor:
        monitor.mask(mask)
        model(tokens)
        reading = monitor.step().main
    assert_reading(reading, truth(model, [mask]))
    assert 0 < reading.coherence <= 1


# Steps and what is recorded beside -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 10])
def test_steps_are_counted_from_zero(every):
    model = Net()
    optimizer = sgd(model)
    given = []
    with watch(model, every=every) as monitor:
        for step in range(21):
            assert monitor.next_is_monitored == (step % every == 0)
            train_step(model, optimizer, tokens_of(step))
            given.append(monitor.step(loss=step))
            exact = truth(model)
            if given[-1] is not None:
                assert_reading(given[-1].main, exact)
    steps = list(range(0, 21, every))
    assert [step for step, readings in enumerate(given) if readings is not None] == steps
    assert [readings.step for readings in monitor.readings] == steps
    assert [readings.main.loss for readings in monitor.readings] == steps


def test_numbers_given_to_step_are_recorded():
    model = Net()
    with watch(model, every=1) as monitor:
        model(tokens_of(0))
        reading = monitor.step(
            loss=torch.tensor(1.5, requires_grad=True), lr=1e-3, epoch=0.25, val_loss=torch.tensor([2.5]),
            grad_norm=np.float32(0.5), diverged=math.inf, unknown=None,
        ).main  # fmt: skip
    assert (reading.loss, reading.lr, reading.epoch) == (1.5, 1e-3, 0.25)
    assert reading.extra == {"val_loss": 2.5, "grad_norm": 0.5, "diverged": None, "unknown": None}


def test_the_mean_of_the_losses_since_the_reading_before_is_recorded():
    model = Net()
    optimizer = sgd(model)
    means = []
    with logalign.watch(model, every=3) as monitor:
        for step in range(8):
            train_step(model, optimizer, tokens_of(0))
            loss = torch.tensor(float(step), requires_grad=True) * 1 if step % 2 else np.float32(step)
            readings = monitor.step(loss=None if step == 5 else loss)
            if readings is not None:
                means.append((readings.main.loss, readings.main.loss_mean))
        with pytest.raises(InputError, match="expected a number, found 'low'"):
            monitor.step(loss="low")
    assert means == [(0.0, 0.0), (3.0, 2.0), (6.0, 5.0)]


def test_a_mean_holds_no_graph_and_no_tensor_that_is_overwritten():
    model = Net()
    optimizer = sgd(model)
    with logalign.watch(model, every=2) as monitor:
        buffer = torch.zeros((), dtype=torch.bfloat16)
        for value in (1.0, 2.0, 257.0):
            train_step(model, optimizer, tokens_of(0))
            buffer.fill_(value)
            readings = monitor.step(loss=buffer)
    assert readings is not None
    assert readings.main.loss_mean == (2.0 + 256.0) / 2  # bfloat16 has no 257


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": "low"}, "step(loss=...): expected a number, found 'low'"),
        ({"lr": [1e-3]}, "step(lr=...): expected a number, found [0.001]"),
        ({"loss": torch.ones(3)}, "step(loss=...): expected one number, found a tensor of shape (3,)"),
        ({"lar": 0.5}, "step(lar=...): expected a name of your own, found one that readings use themselves"),
        ({"step": 5}, "step(step=...): expected a name of your own, found one that readings use themselves"),
    ],
)
def test_a_value_that_cannot_be_recorded_loses_no_reading(values, text):
    model = Net()
    with watch(model, every=2) as monitor:
        model(tokens_of(0))
        with pytest.raises(InputError) as caught:
            monitor.step(**values)
        assert str(caught.value) == text
        readings = monitor.step(loss=1.0)
        assert readings.step == 0
        assert_reading(readings.main, truth(model))
        model(tokens_of(1))
        assert monitor.step() is None
        truth(model)
        model(tokens_of(2))
        assert_reading(monitor.step().main, truth(model))


def test_tokens_seen_are_estimated_from_the_monitored_steps():
    model = Net()
    with watch(model, every=3) as monitor:
        for step in range(7):
            monitor.mask(torch.ones(4, 6, dtype=torch.bool))
            model(tokens_of(step))
            monitor.step()
    assert [each.main.tokens_seen for each in monitor.readings] == [24, 24 * 4, 24 * 7]


def test_history_is_bounded():
    model = Net()
    with watch(model, every=1, history=3) as monitor:
        for step in range(5):
            model(tokens_of(step))
            monitor.step()
    assert [each.step for each in monitor.readings] == [2, 3, 4]


# Spectra ---------------------------------------------------------------------------------------------------------


def test_spectra_of_the_steps_asked_for(tmp_path):
    model = Net(bias=True)
    optimizer = sgd(model)
    with watch(model, every=2, spectra_every=4, run=tmp_path / "run", layers=["unembedding", "body"]) as monitor:
        for step in range(9):
            mask = tokens_of(step) % 3 != 1
            for micro_batch in (0, 1):
                monitor.mask(mask)
                train_loss = model(tokens_of(step + micro_batch)).square().mean()
                train_loss.backward()
            optimizer.step()
            readings = monitor.step()
            weight, inputs = model.seen[0][0].double(), torch.cat([hidden for _, hidden in model.seen]).double()
            model.seen.clear()
            path = tmp_path / "run" / "spectra" / f"step-{step:08d}.safetensors"
            if step % 4:
                assert not path.exists()
                assert readings is None or readings.main.coherence is None
                continue
            exact = spectra(weight, inputs, mask=torch.cat([mask, mask]))
            saved = load_file(path)
            assert set(saved) == {"unembedding.p", "unembedding.q", "body.p", "body.q"}
            assert saved["unembedding.p"] == pytest.approx(exact.p.numpy(), abs=1e-9)
            assert saved["unembedding.q"] == pytest.approx(exact.q.numpy(), abs=1e-7)
            for name in ("weight_participation", "input_participation", "coherence"):
                assert getattr(readings.main, name) == pytest.approx(getattr(exact, name), rel=1e-6), name
    recorded = open_run(tmp_path / "run").readings
    assert [each.coherence is not None for each in recorded] == [True, True, False, False] * 2 + [True, True]


# Observing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_observe_serves_a_loss_of_ones_own(outputs, bias):
    """A head that no module computes, in a model whose last linear layer is not the unembedding."""

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 9), nn.Linear(9, 8)
            self.weight, self.offset = nn.Parameter(torch.randn(13, 8)), nn.Parameter(torch.randn(13))

        def forward(self, x):
            return self.two(self.one(x).relu())

    torch.manual_seed(0)
    model = Fused()
    with watch(model, every=2) as monitor:
        for step in range(5):
            hiddens, masks = [], []
            for _ in range(2):
                hidden = model(torch.randn(4, 6, 5))
                mask = torch.rand(4, 6) < 0.7
                hiddens.append(hidden.detach())
                masks.append(mask)
                logits = F.linear(hidden, model.weight, model.offset if bias else None)
                monitor.observe(
                    model.weight,
                    hidden,
                    outputs=logits if outputs else None,
                    bias=model.offset if bias else None,
                    mask=mask,
                )
            readings = monitor.step()
            if step % 2 == 0:
                exact = Energies.of(model.weight.double(), torch.cat(hiddens).double(), mask=torch.cat(masks))
                assert list(readings) == ["unembedding"]
                assert_reading(readings.main, exact)
                assert readings.main.kept == pytest.approx(torch.cat(masks).float().mean().item())


def test_observe_does_nothing_without_gradients_or_between_monitored_steps():
    model = Net()
    W, X = torch.randn(5, 4), torch.randn(3, 4)
    with watch(model, every=2) as monitor:
        with torch.no_grad():
            monitor.observe(W, X, site="extra")
        model(tokens_of(0))
        assert list(monitor.step()) == ["unembedding"]
        monitor.observe(W, X, site="extra")
        monitor.step()
        model(tokens_of(2))
        assert list(monitor.step()) == ["unembedding"]


def test_observe_beside_the_layers_own_forward_is_refused():
    model = Net()
    W, X = torch.randn(13, 8), torch.randn(3, 8)
    with watch(model, every=1) as monitor:
        model(tokens_of(0))
        with pytest.raises(InputError, match=r"measured by its own forward and by observe\(\) in one step"):
            monitor.observe(W, X)
        monitor.observe(W, X, site="other")
        assert list(monitor.step()) == ["unembedding", "other"]
        monitor.observe(W, X)
        with pytest.raises(InputError, match=r"measured by observe\(\) and by its own forward in one step"):
            model(tokens_of(1))


def test_observe_checks_what_it_is_given():
    model = Net()
    W, X = torch.randn(13, 8), torch.randn(3, 8)
    with watch(model, every=1) as monitor:
        with pytest.raises(InputError, match="a kernel stored as"):
            monitor.observe(W.T, X)
        with pytest.raises(InputError, match=r"mask: expected bool of shape \(3,\), found torch\.bool of \(4,\)"):
            monitor.observe(W, X, mask=torch.ones(4, dtype=torch.bool))
        with pytest.raises(InputError, match=r"mask: expected bool of shape \(3,\), found torch\.float32"):
            monitor.observe(W, X, mask=torch.ones(3))
        with pytest.raises(InputError, match="outputs: expected shape"):
            monitor.observe(W, X, outputs=torch.ones(3, 5))
        monitor.observe(W, X)
        with pytest.raises(InputError, match=r"expected a weight of shape \(13, 8\) as before in this step, found"):
            monitor.observe(torch.randn(12, 8), X)
        assert monitor.step().main.tokens == 3


# What is undefined, and what never comes -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["weight", "input"])
def test_values_that_are_not_finite_are_marked_and_training_goes_on(tmp_path, bad, place):
    model = Net(bias=True)
    weight = model.lm_head.weight if place == "weight" else model.embedding.weight
    with watch(model, every=1, spectra_every=1, run=tmp_path / "run") as monitor:
        for step in range(4):
            kept = weight.detach().clone()
            if step in (1, 2):
                with torch.no_grad():
                    weight[3, 2] = bad
            tokens = tokens_of(step)
            tokens[0, 0] = 3
            model.body.register_forward_pre_hook(lambda module, args: None)
            model.seen.clear()
            hidden_is_finite = model(tokens).isfinite().all()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                readings = monitor.step(loss=bad if step == 1 else 1.0)
            if step in (1, 2) and not hidden_is_finite:
                assert readings.main.lar is None
                assert readings.main.lar_centered is None
                assert readings.main.nonfinite > 0
                assert readings.main.reason.endswith("rows of weight, inputs or outputs hold a NaN or an infinity")
                assert readings.main.coherence is None
                assert [each.category for each in caught] == ([LogAlignWarning] if step == 1 else [])
            else:
                assert caught == []
                assert_reading(readings.main, truth(model))
            with torch.no_grad():
                weight.copy_(kept)
    lines = (tmp_path / "run" / "readings.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["lar"] is None for record in records] == [False, True, True, False] or place == "input"
    assert records[1]["loss"] is None
    warned = [event for event in open_run(tmp_path / "run").events if event["event"] == "warning"]
    assert len(warned) <= 1


def test_logits_that_are_not_finite(tmp_path):
    model = Net()
    model.lm_head.register_forward_hook(lambda module, args, output: output.mul_(math.nan), prepend=True)
    with watch(model, every=1) as monitor:
        # The user's hook was there first and ours is prepended: what the layer gave is measured.
        model(tokens_of(0))
        assert_reading(monitor.step().main, truth(model))


def test_a_step_of_which_no_token_counts(tmp_path):
    model = Net(bias=True)
    with watch(model, every=1, spectra_every=1, run=tmp_path / "run") as monitor:
        model(tokens_of(0), labels=torch.full((4, 6), -100))
        with pytest.warns(LogAlignWarning, match="step 0, unembedding: no LAR, for no token: the mask keeps none"):
            reading = monitor.step().main
        assert (reading.lar, reading.tokens, reading.kept) == (None, 0, 0.0)
        assert reading.reason == "no token: the mask keeps none"
        model(tokens_of(1), labels=torch.full((4, 6), -100))
        assert monitor.step().main.lar is None  # warned once
        truth(model)
        model(tokens_of(2), labels=tokens_of(2))
        assert_reading(monitor.step().main, truth(model))


def test_a_layer_that_never_runs_is_reported_by_the_third_step():
    model = Net()
    with watch(model, every=2) as monitor:
        for step in range(9):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                readings = monitor.step()
            if readings is not None:
                assert readings.main.lar is None
                assert readings.main.reason == "no training forward reached this layer"
                assert (readings.main.m, readings.main.n, readings.main.tokens) == (13, 8, 0)
            assert len(caught) == (step == 4)
            if caught:
                assert str(caught[0].message) == (
                    "logalign: unembedding: no training forward reached this layer in 3 monitored steps; "
                    "watch a model that is compiled before its first compiled call, or call torch._dynamo.reset() "
                    "after watch(); pass the very object that is trained; "
                    "where a fused loss takes the layer's place, call "
                    "monitor.observe(weight, inputs, mask=labels != -100) beside it"
                )


def test_a_silent_layer_among_others_is_reported_alone():
    model = nn.ModuleDict({"used": nn.Linear(4, 5), "unused": nn.Linear(4, 5)})
    with watch(model, layers=["*used"], every=1) as monitor:
        for _ in range(2):
            model["used"](torch.randn(3, 4))
            monitor.step()
        model["used"](torch.randn(3, 4))
        with pytest.warns(LogAlignWarning, match="unused: no training forward"):
            readings = monitor.step()
    assert readings["used"].lar is not None
    assert readings["unused"].lar is None


@pytest.mark.parametrize("head", ["lm_head", "readout"])
def test_training_in_eval_mode_is_named(head):
    model = Net(head=head).eval()
    with watch(model, every=1) as monitor:
        for _ in range(2):
            model(tokens_of(0))
            assert monitor.step().main.reason == "no training forward reached this layer" + (
                " (1 in eval mode)" if head == "lm_head" else " (2 in eval mode)"  # both candidates
            )
        model(tokens_of(0))
        with pytest.warns(LogAlignWarning, match=r"in eval mode; train in model\.train\(\) and with gradients"):
            monitor.step()


def test_training_without_step_is_told():
    model = Net()
    optimizer = sgd(model)
    with watch(model, every=1) as monitor:
        for step in range(6):
            train_step(model, optimizer, tokens_of(step))
        with pytest.warns(LogAlignWarning, match="the weights changed 5 times between two calls of step"):
            monitor.step()
    model = Net()
    monitor = watch(model)
    train_step(model, sgd(model), tokens_of(0))
    with pytest.warns(LogAlignWarning, match=r"forwards were measured, but step\(\) was never called"):
        monitor.close()


def test_warnings_that_are_errors_lose_nothing(tmp_path):
    model = Net()
    monitor = watch(model, every=1, run=tmp_path / "run")
    model(tokens_of(0), labels=torch.full((4, 6), -100))
    with pytest.raises(LogAlignWarning, match="no LAR"):
        monitor.step()
    model(tokens_of(1))
    monitor.step()
    monitor.close()
    assert [each.step for each in open_run(tmp_path / "run").readings] == [0, 1]
    monitor = watch(model, run=tmp_path / "other")
    model(tokens_of(0))
    with pytest.raises(LogAlignWarning, match=r"step\(\) was never called"):
        monitor.close()
    assert not model.lm_head._forward_hooks
    assert open_run(tmp_path / "other").events[-1]["event"] == "close"


def test_an_error_in_the_training_is_not_covered_by_a_warning():
    model = Net()

    def train():
        model(tokens_of(0))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch(model):
        train()
    assert not model.lm_head._forward_hooks


def test_a_monitor_that_was_never_used_closes_quietly():
    with watch(Net()):
        pass


# Watching --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_watched(tmp_path):
    with pytest.raises(InputError, match=r"model: expected a torch\.nn\.Module, found function"):
        watch(lambda x: x)
    with pytest.raises(InputError, match="every: expected a whole number of steps from 1 on, found 0"):
        watch(Net(), every=0)
    with pytest.raises(InputError, match="spectra_every: expected 0 or a multiple of every=10, found 15"):
        watch(Net(), spectra_every=15)
    with pytest.raises(SiteError, match="near matches: lm_head"):
        watch(Net(), layers="lmhead")
    with pytest.raises(SiteError, match="expected a model with a linear layer"):
        watch(nn.Sequential(nn.ReLU()))
    with pytest.raises(SiteError, match="fan-in n of at least 2"):
        watch(nn.ModuleDict({"lm_head": nn.Linear(1, 5)}))


def test_two_watches_on_one_model():
    model = Net()
    with watch(model), pytest.raises(SiteError, match="Net: expected a model that is not watched yet, found one"):
        watch(model, layers="body")
    with watch(model, every=1) as monitor:  # the refusal has left nothing behind
        model(tokens_of(0))
        assert_reading(monitor.step().main, truth(model))


def test_a_watch_that_fails_leaves_the_model_free(tmp_path):
    model = Net()
    (tmp_path / "file").write_text("")
    for bad in ({"run": tmp_path / "file"}, {"run": tmp_path / "new", "settings": {"lr": math.nan}}):
        with pytest.raises(RunError):
            watch(model, **bad)
    watch(model).close()


def test_closing():
    model = Net()
    monitor = watch(model, every=2)
    model(tokens_of(0))
    monitor.step()
    monitor.close()
    monitor.close()
    assert monitor.step() is None
    with pytest.raises(LogAlignError, match=r"step\(\) on a monitor that is closed"):
        monitor.step()
    with watch(model, every=1) as again:
        model.seen.clear()
        model(tokens_of(0))
        assert_reading(again.step().main, truth(model))
    assert [each.step for each in monitor.readings] == [0]


def test_which_layer_is_measured_is_told(capsys, caplog):
    model = Net(tied=True)
    with caplog.at_level("INFO", logger="logalign"), watch(model, every=1) as monitor:
        model(tokens_of(0), labels=tokens_of(0))
        monitor.step()
        assert "unembedding = 'lm_head'" in repr(monitor)
    told = caplog.text + capsys.readouterr().err
    assert "unembedding = 'lm_head', Linear 13 x 8, no bias, tied to embedding.weight: the well-known name" in told
    assert "mask: forward argument 'labels' != -100" in told


# The run ---------------------------------------------------------------------------------------------------------


def train_and_record(path, steps, *, model=None, state=None, resume=False, every=1, **kwargs):
    model = model or Net()
    optimizer = sgd(model)
    with watch(model, every=every, run=path, resume=resume, **kwargs) as monitor:
        if state is not None:
            monitor.load_state_dict(state)
        for step in range(steps):
            loss = train_step(model, optimizer, tokens_of(step), labels=tokens_of(step))
            monitor.step(loss=loss, lr=0.5, epoch=step / 10, val_loss=2.0)
        return monitor


def test_what_the_run_says(tmp_path):
    monitor = train_and_record(
        tmp_path / "run", 5, every=2, layers=["unembedding", "body"], settings={"lr": 0.5, "name": "tést"}
    )
    run = open_run(tmp_path / "run")
    assert run.meta["schema_version"] == 1
    assert run.meta["logalign_version"] == logalign.__version__
    assert {key: run.meta[key] for key in ("model", "main", "every", "spectra_every", "settings")} == {
        "model": "Net",
        "main": "unembedding",
        "every": 2,
        "spectra_every": 0,
        "settings": {"lr": 0.5, "name": "tést"},
    }
    assert run.meta["sites"] == monitor.sites
    assert run.meta["sites"]["unembedding"] == {
        "module": "lm_head", "kind": "Linear", "how": "the well-known name 'lm_head'", "softmax": True, "tied_to": [],
        "m": 13, "n": 8, "bias": False, "dtype": "float32", "mask": "forward argument 'labels' != -100",
    }  # fmt: skip
    assert [event["event"] for event in run.events] == ["start", "sites", "sites", "close"]
    assert run.readings == [reading for readings in monitor.readings for reading in readings.values()]
    for line in (tmp_path / "run" / "readings.jsonl").read_text().splitlines():
        record = json.loads(line)
        of_samples = {"revisited", "passes", "drift_reason"}  # the main layer's; every row comes back in every step
        assert set(record) - of_samples == {
            "step", "site", "time", "n", "m", "lar", "lar_vocab_centered", "lar_token_centered", "lar_centered",
            "effective_dim", "energies", "tokens", "tokens_seen", "kept", "epoch", "loss", "loss_mean", "lr",
            "nonfinite", "reason", "val_loss",
        }  # fmt: skip
        assert set(record["energies"]) == {"weight", "input", "output"}
        assert (of_samples & set(record)) == (of_samples if record["site"] == "unembedding" else set())


def test_readings_are_on_disk_as_soon_as_step_returns(tmp_path):
    model = Net()
    with watch(model, every=1, run=tmp_path / "run") as monitor:
        for step in range(3):
            model(tokens_of(step))
            readings = monitor.step()
            assert open_run(tmp_path / "run").readings[-1] == readings.main
    assert len(open_run(tmp_path / "run").readings) == 3


def test_a_run_that_is_there_is_not_overwritten(tmp_path):
    train_and_record(tmp_path / "run", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RunError, match=r"expected a new or empty folder, found a run \(.*resume=True"):
        watch(Net(), run=tmp_path / "run")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resuming_at_a_checkpoint_supersedes_what_came_after(tmp_path):
    path = tmp_path / "run"
    model = Net()
    optimizer = sgd(model)
    with watch(model, every=2, run=path, layers=["unembedding", "body"]) as monitor:
        for step in range(9):
            if step == 5:
                state = monitor.state_dict()
            train_step(model, optimizer, tokens_of(step))
            monitor.step()
    assert json.loads(json.dumps(state)) == state
    before = (path / "readings.jsonl").read_bytes()
    monitor = train_and_record(path, 6, state=state, resume=True, every=2, layers=["unembedding", "body"])
    assert (path / "readings.jsonl").read_bytes().startswith(before)
    run = open_run(path)
    assert [each.step for each in run.readings if each.site == "body"] == [0, 2, 4, 6, 8, 10]
    assert [each.loss is not None for each in run.readings] == [False] * 6 + [True] * 6
    for site in ("unembedding", "body"):
        assert [each.tokens_seen for each in run.readings if each.site == site] == [
            24 * (step + 1) for step in (0, 2, 4, 6, 8, 10)
        ]
    assert [event["event"] for event in run.events].count("resume") == 1
    assert next(event["step"] for event in run.events if event["event"] == "resume") == 5


@pytest.mark.parametrize("bad", [False, True])
def test_the_mean_loss_goes_on_from_a_checkpoint_between_readings(bad):
    losses = [torch.tensor(1 / (3 + step)) for step in range(9)]
    if bad:
        losses[5] = torch.tensor(float("nan"))
    means, state, checkpoint = [], {}, 6  # readings are at steps 0, 4 and 8
    for resumed in (False, True):
        model = Net()
        with watch(model, every=4) as monitor:
            if resumed:
                monitor.load_state_dict(json.loads(json.dumps(state, allow_nan=False)))
            for step in range(checkpoint if resumed else 0, 9):
                if step == checkpoint:
                    state = monitor.state_dict()
                model(tokens_of(step))
                readings = monitor.step(loss=losses[step])
        means.append(readings.main.loss_mean)
    assert means[0] == means[1]
    assert (means[0] is None) == bad


def test_resuming_without_a_state_goes_on_after_the_last_reading(tmp_path):
    path = tmp_path / "run"
    train_and_record(path, 5, every=2, layers=["unembedding", "body"])
    monitor = train_and_record(path, 3, every=2, resume=True, layers=["unembedding", "body"])
    assert [each.step for each in monitor.readings] == [6]
    run = open_run(path)
    assert [each.step for each in run.readings if each.site == "unembedding"] == [0, 2, 4, 6]
    for site in ("unembedding", "body"):
        assert [each.tokens_seen for each in run.readings if each.site == site] == [24, 72, 120, 168]


def test_resuming_where_nothing_is_begins(tmp_path):
    train_and_record(tmp_path / "run", 2, resume=True)
    assert [each.step for each in open_run(tmp_path / "run").readings] == [0, 1]


def test_going_back_within_one_run_supersedes_too(tmp_path):
    model = Net()
    with watch(model, every=1, run=tmp_path / "run") as monitor:
        for step in range(4):
            if step == 2:
                state = monitor.state_dict()
            model(tokens_of(step))
            monitor.step(loss=0)
        model(tokens_of(9))  # not of the step that is gone back to
        monitor.load_state_dict(state)
        for step in range(2, 5):
            model.seen.clear()
            model(tokens_of(step))
            readings = monitor.step(loss=1)
            assert_reading(readings.main, truth(model))
    recorded = open_run(tmp_path / "run").readings
    assert [(each.step, each.loss) for each in recorded] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1)]


def test_a_state_that_is_none():
    with watch(Net()) as monitor, pytest.raises(InputError, match=r"state: expected what Monitor\.state_dict"):
        monitor.load_state_dict({"version": 1, "step": 5})


def test_a_run_that_can_no_longer_be_written_stops_no_training(tmp_path, monkeypatch):
    path = tmp_path / "run"
    model = Net()
    full = False
    write = __import__("os").write

    def write_while_there_is_room(file, data):
        if not full:
            return write(file, data)
        if len(data) > 20:
            return write(file, data[:20])  # as much as there is room for
        raise OSError(28, "No space left on device")

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("logalign.runs.writer.os.write", write_while_there_is_room)
    with watch(model, every=1, run=path, spectra_every=1) as monitor:
        for step in range(6):
            full = 2 <= step < 4
            monkeypatch.setattr(
                "logalign.runs.writer.RunWriter.spectra",
                refuse if full else lambda *_, **__: None,
            )
            labels = torch.full((4, 6), -100) if step == 3 else tokens_of(step)
            model(tokens_of(step), labels=labels)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert monitor.step() is not None
            messages = [str(each.message) for each in caught]
            assert len([each for each in messages if "readings cannot be written" in each]) == (step == 2)
    assert [each.step for each in open_run(path).readings] == [0, 1, 4, 5]
    assert open_run(path).events[-1]["event"] == "close"
    for line in (path / "readings.jsonl").read_bytes().splitlines():
        assert line.endswith(b"}") or len(line) <= 20 * 200


# The verdict -----------------------------------------------------------------------------------------------------


def test_the_verdict_is_what_the_recorded_run_shows(tmp_path):
    path = tmp_path / "run"
    model = Net()
    optimizer = sgd(model)
    with watch(model, every=1, run=path, layers=["unembedding", "body"]) as monitor:
        assert monitor.verdict == diagnose([])
        for step in range(40):
            loss = train_step(model, optimizer, tokens_of(step))
            monitor.step(loss=loss, lr=0.5, epoch=step / 20)
            assert monitor.verdict == diagnose(path)
            assert ("no data has repeated" in monitor.verdict.reason) == (step < 20)


def test_a_state_of_other_layers_is_refused():
    wide = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5))
    with watch(wide, layers=["2"], every=1) as monitor:
        state = monitor.state_dict()
    narrow = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5))
    with (
        watch(narrow, layers=["2"], every=1) as monitor,
        pytest.raises(InputError, match=r"made with, 2 5 x 9, found 2 5 x 8; watch the same layers, or begin anew"),
    ):
        monitor.load_state_dict(state)


def test_the_verdict_goes_on_from_a_checkpoint_and_from_the_run(tmp_path):
    path = tmp_path / "run"
    model = Net()
    optimizer = sgd(model)
    verdicts = []
    with watch(model, every=1, run=path) as monitor:
        for step in range(30):
            if step == 12:
                torch.save(monitor.state_dict(), tmp_path / "state.pt")
            train_step(model, optimizer, tokens_of(step))
            monitor.step(epoch=step / 20)
            verdicts.append(monitor.verdict)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert json.loads(json.dumps(state, allow_nan=False)) == state
    without = {name: value for name, value in state.items() if name != "detector"}
    for given in (state, without):
        with watch(Net(), every=1, run=path, resume=True) as monitor:
            assert monitor.verdict == verdicts[-1]
            monitor.load_state_dict(given)
            assert monitor.verdict == verdicts[11]
    with watch(Net(), every=1) as monitor:
        monitor.load_state_dict(state)
        assert monitor.verdict == verdicts[11]
        monitor.load_state_dict(without)
        assert monitor.verdict.step is None


def test_going_back_without_a_run_takes_the_past_from_memory():
    model = Net()
    with watch(model, every=1) as monitor:
        for step in range(6):
            if step == 3:
                state = monitor.state_dict()
            model(tokens_of(step))
            monitor.step(epoch=0.5)
        monitor.load_state_dict({"version": 2, "step": 3, "tokens_seen": state["tokens_seen"]})
        assert (monitor.verdict.outcome, monitor.verdict.step) == ("healthy", 2)


def test_a_baseline_of_another_shape_is_refused_at_attach(tmp_path):
    other = Baseline.from_readings([Reading(step=step, lar=0.5 + step / 10, m=13, n=16) for step in range(5)])
    model = Net()
    with pytest.raises(InputError) as caught:
        watch(model, baseline=other)
    assert str(caught.value) == (
        "lm_head: expected a layer of the baseline's shape (m, n) = (13, 16), found (13, 8); "
        "LARs compare only at equal shape"
    )
    with pytest.raises(InputError, match="regime: expected one of auto, grokking, decline, both, found 'none'"):
        watch(model, regime="none")
    with pytest.raises(RunError, match="found nothing there"):
        watch(model, baseline=tmp_path / "nowhere")
    watch(model).close()


def test_a_baseline_and_a_regime_reach_the_verdict(tmp_path):
    train_and_record(tmp_path / "fresh", 60)
    model = Net(seed=1)
    optimizer = sgd(model)
    with watch(model, every=1, baseline=tmp_path / "fresh", regime="decline") as monitor:
        for step in range(60):
            train_step(model, optimizer, tokens_of(step))
            monitor.step(lr=0.5, epoch=2)
        assert monitor.verdict.regime == "decline"
        assert monitor.verdict.evidence["deviation"] is not None


def test_a_detector_that_fails_stops_no_training_and_is_told_once(monkeypatch):
    monkeypatch.setattr("logalign.diagnosis.overfitting.decide", lambda *_: 1 / 0)
    model = Net()
    with watch(model, every=1) as monitor:
        for step in range(4):
            model(tokens_of(step))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert monitor.step() is not None
            assert len(caught) == (step == 0)
            for each in caught:
                assert str(each.message) == (
                    "logalign: there will be no more verdicts, for the detector failed (ZeroDivisionError: division by "
                    "zero); training goes on"
                )
        assert monitor.verdict.reason == "the detector failed (ZeroDivisionError: division by zero)."
        assert json.loads(monitor.state_dict()["detector"]) is None


def test_judging_touches_no_random_numbers():
    states = []
    for regime in ("auto", None):
        model = Net()
        optimizer = sgd(model)
        np.random.seed(0)
        monitor = watch(model, every=1, regime=regime) if regime else None
        for step in range(40):
            train_step(model, optimizer, tokens_of(step))
            if monitor is not None:
                monitor.step(lr=0.5)
        if monitor is not None:
            monitor.close()
        states.append((torch.get_rng_state(), np.random.get_state()[1], model.state_dict()))
    assert torch.equal(states[0][0], states[1][0])
    assert np.array_equal(states[0][1], states[1][1])
    assert all(torch.equal(states[0][2][name], states[1][2][name]) for name in states[0][2])
