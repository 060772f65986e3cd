"""Hooks on real models: what they see, and that training and model are as if they had never been there."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from logalign import Energies, watch

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")


class Net(nn.Module):
    def __init__(self, *, tied=False, dropout=0.1, parametrize=None, head="lm_head"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 8)
        self.body = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        setattr(self, head, nn.Linear(8, 13))
        self.head = getattr(self, head)
        if tied:
            self.head.weight = self.embedding.weight
        if parametrize is not None:
            parametrize(self.head)

    def forward(self, tokens):
        return self.head(self.dropout(torch.tanh(self.body(self.embedding(tokens)))))


def tokens_of(step, batch=4):
    return torch.randint(0, 13, (batch, 6), generator=torch.Generator().manual_seed(step))


def assert_reading(reading, exact, tolerance=2e-6):
    assert reading.tokens == exact.tokens
    for form in FORMS:
        assert getattr(reading, form) == pytest.approx(getattr(exact, form), abs=tolerance), form


# Training is not changed -----------------------------------------------------------------------------------------

TRAININGS = {
    "plain": {},
    "tied": {"tied": True},
    "accumulation": {"micro_batches": 3},
    "autocast": {"autocast": True},
    "dropout": {"dropout": 0.5},
    "the last linear layer": {"head": "readout"},
    "spectral norm": {"parametrize": parametrizations.spectral_norm},
    "weight norm": {"parametrize": parametrizations.weight_norm},
    "checkpointed": {"checkpointed": True},
}


def trained(*, monitored, micro_batches=1, autocast=False, checkpointed=False, steps=50, **net):
    model = Net(**net)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = watch(model, every=2, spectra_every=10, layers=["unembedding", "body"]) if monitored else None
    torch.manual_seed(1)
    for step in range(steps):
        for micro_batch in range(micro_batches):
            tokens = tokens_of(100 * step + micro_batch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                logits = checkpoint(model, tokens, use_reentrant=False) if checkpointed else model(tokens)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(loss=loss)
    if monitor is not None:
        assert len(monitor.readings) == steps / 2
        assert all(reading.lar is not None for readings in monitor.readings for reading in readings.values())
        monitor.close()
    return model.state_dict(), torch.random.get_rng_state()


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS.keys())
def test_weights_are_bit_identical_with_and_without_the_monitor(training):
    plain, rng = trained(monitored=False, **training)
    watched, watched_rng = trained(monitored=True, **training)
    assert plain.keys() == watched.keys()
    for name in plain:
        assert torch.equal(plain[name], watched[name]), name
    assert torch.equal(rng, watched_rng)


def test_the_comparison_sees_a_training_that_was_changed(monkeypatch):
    from logalign.torch.meter import Meter

    add = Meter.add

    def meddling(self, *args, **kwargs):
        torch.rand(1)
        return add(self, *args, **kwargs)

    plain, _ = trained(monitored=False, steps=4)
    monkeypatch.setattr(Meter, "add", meddling)
    watched, _ = trained(monitored=True, steps=4)
    assert any(not torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("parametrize", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_parametrized_weight_is_measured_as_the_forward_used_it(parametrize):
    model = Net(parametrize=parametrize, dropout=0)
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append((args[0], output - module.bias)))
    with watch(model, every=1) as monitor:
        for step in range(3):
            model(tokens_of(step)).square().mean().backward()
            reading = monitor.step().main
            ((inputs, outputs),) = seen
            seen.clear()
            flat = inputs.flatten(0, 1).double()
            weight = torch.linalg.lstsq(flat, outputs.flatten(0, 1).double()).solution.T  # 24 tokens, 8 columns
            exact = Energies.of(weight.detach(), flat)
            assert_reading(reading, exact, tolerance=1e-5)


# What counts as training -----------------------------------------------------------------------------------------


def test_evaluation_is_not_recorded():
    model = Net(dropout=0)
    with watch(model, every=1) as monitor:
        model(tokens_of(0))
        with torch.no_grad():
            model(tokens_of(1))
        with torch.inference_mode():
            model(tokens_of(2))
        model.eval()
        model(tokens_of(3))
        model.train()
        reading = monitor.step().main
    exact = Energies.of(model.head.weight.double(), torch.tanh(model.body(model.embedding(tokens_of(0)))).double())
    assert_reading(reading, exact)
    assert reading.tokens_seen == 24


class Checkpointed(nn.Module):
    """The head inside a checkpointed segment, or outside."""

    def __init__(self, *, reentrant, head_inside, head="lm_head"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 8)
        self.body = nn.Linear(8, 8)
        setattr(self, head, nn.Linear(8, 13, bias=False))
        self.names = (head, reentrant, head_inside)

    def forward(self, tokens, targets=None):
        head, reentrant, head_inside = self.names
        head = getattr(self, head)
        embedded = self.embedding(tokens)

        def body(x):
            return torch.tanh(self.body(x))

        if head_inside:
            return checkpoint(lambda x: head(body(x)) + 0, embedded, use_reentrant=reentrant)
        return head(checkpoint(body, embedded, use_reentrant=reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head_inside", [False, True])
@pytest.mark.parametrize("head", ["lm_head", "readout"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_recomputed_forward_counts_once(reentrant, head_inside, head, masked):
    model = Checkpointed(reentrant=reentrant, head_inside=head_inside, head=head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    mask = torch.arange(24).reshape(4, 6) % 3 != 1
    with watch(model, layers=["unembedding", "body"], every=1) as monitor:
        for step in range(3):
            weight = getattr(model, head).weight.detach().clone().double()
            tokens = [tokens_of(10 * step), tokens_of(10 * step + 1)]
            with torch.no_grad():
                embedded = model.embedding(torch.cat(tokens))
                hidden = torch.tanh(model.body(embedded)).double()
            body_weight = model.body.weight.detach().clone().double()
            for micro_batch in tokens:
                targets = torch.where(mask, micro_batch, -100) if masked else None
                model(micro_batch, targets).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            readings = monitor.step()
            whole = torch.cat([mask, mask]) if masked else None
            assert_reading(readings.main, Energies.of(weight, hidden, mask=whole))
            exact = Energies.of(body_weight, embedded.double(), mask=whole)
            assert readings["body"].tokens == exact.tokens
            assert readings["body"].lar == pytest.approx(exact.lar, abs=2e-6)


# Nothing is left behind ------------------------------------------------------------------------------------------


def hooks_of(model):
    return {
        name: {
            key: (len(value) if key.startswith(("_forward", "_backward", "_state", "_load")) else None)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("head", ["lm_head", "readout"])
def test_closing_leaves_nothing_on_the_model(head):
    model = Net(head=head)
    before = hooks_of(model)
    monitor = watch(model, every=1, layers=["unembedding", "body"])
    assert hooks_of(model) != before
    model(tokens_of(0)).square().mean().backward()
    monitor.step()
    monitor.close()
    assert hooks_of(model) == before
    monitor = watch(model)  # never run
    monitor.close()
    assert hooks_of(model) == before


def test_layers_that_were_only_candidates_are_let_go_after_the_first_forward():
    model = Net(head="readout")
    with watch(model, every=1) as monitor:
        assert model.body._forward_hooks
        model(tokens_of(0))
        monitor.step()
        assert not model.body._forward_hooks
        with watch(model.body, every=1) as other:
            model.body(torch.randn(3, 8))
            assert other.step().main.tokens == 3


def test_no_graph_is_kept():
    model = Net()
    freed = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token(freed)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    with watch(model, every=1, spectra_every=1) as monitor:
        output = model(tokens_of(0))
        loss = Watched.apply(output).square().mean()
        loss.backward()
        monitor.step(loss=loss)
        del output, loss
        assert freed == ["freed"]


class Token:
    def __init__(self, freed):
        self.freed = freed

    def __del__(self):
        self.freed.append("freed")


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("head", ["lm_head", "readout"])
def test_copies_of_a_watched_model_work_and_record_nothing(duplicate, head):
    model = Net(head=head, dropout=0)
    with watch(model, every=1) as monitor:
        model(tokens_of(0))
        twin = duplicate(model)
        assert torch.equal(twin(tokens_of(1)), duplicate(model)(tokens_of(1)))
        assert monitor.step().main.tokens == 24
        with watch(twin, every=1) as other:
            twin(tokens_of(2))
            model(tokens_of(3, batch=5))
            assert other.step().main.tokens == 24
            assert monitor.step().main.tokens == 30


def test_a_state_dict_is_as_without_the_monitor():
    model = Net()
    before = list(model.state_dict())
    with watch(model):
        assert list(model.state_dict()) == before


# Transformers ----------------------------------------------------------------------------------------------------

TINY = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def llama():
    return LlamaForCausalLM(LlamaConfig(**TINY, num_key_value_heads=2, tie_word_embeddings=False))


def bert():
    return BertForMaskedLM(BertConfig(**TINY, max_position_embeddings=32))


@pytest.mark.parametrize(
    ("build", "name", "tied", "shifted"),
    [
        (gpt2, "lm_head", ["transformer.wte.weight"], True),
        (llama, "lm_head", [], True),
        (bert, "cls.predictions.decoder", ["bert.embeddings.word_embeddings.weight"], False),
    ],
    ids=["GPT-2", "Llama", "BERT"],
)
def test_transformers(build, name, tied, shifted):
    torch.manual_seed(0)
    model = build().train()
    head = model.get_output_embeddings()
    assert head is model.get_submodule(name)
    if head.bias is not None:
        nn.init.normal_(head.bias)
    inputs = []
    head.register_forward_hook(lambda module, args, output: inputs.append(args[0].detach().double()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with watch(model, every=1) as monitor:
        for step in range(3):
            tokens = torch.randint(0, 61, (3, 10), generator=torch.Generator().manual_seed(step))
            labels = tokens.clone()
            labels[torch.arange(30).reshape(3, 10) % 7 < 3] = -100
            weight = head.weight.detach().clone().double()
            out = model(input_ids=tokens, labels=labels)
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            reading = monitor.step(loss=out.loss).main
            counted = labels != -100
            if shifted:
                counted = F.pad(counted[:, 1:], (0, 1), value=False)
            assert_reading(reading, Energies.of(weight, inputs.pop(), mask=counted), tolerance=5e-6)
            assert reading.kept == pytest.approx(counted.float().mean().item())
            if shifted:  # what the model's own loss was taken over
                logits = out.logits[counted].double()
                targets = labels[:, 1:][counted[:, :-1]]
            else:
                logits, targets = out.logits[counted].double(), labels[counted]
            assert reading.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
        site = monitor.sites["unembedding"]
    assert (site["module"], site["tied_to"], site["bias"]) == (name, tied, head.bias is not None)
    assert site["how"] == f"{type(model).__name__}.get_output_embeddings()"
    assert site["mask"].startswith("forward argument 'labels' != -100")
    assert math.isfinite(reading.lar_centered)
