"""Compiled models beside the same models uncompiled: the same readings, the same training, and no graph more."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from logalign import watch
from logalign.errors import InputError, LogAlignWarning

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
EXACT = 1e-6  # another order of float32 sums

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    """Blocks and a head; the blocks, or the blocks and the head, may be recomputed in backward."""

    def __init__(self, head="lm_head", reentrant=None, head_inside=False, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        setattr(self, head, nn.Linear(8, 13))
        self.head_name, self.reentrant, self.head_inside = head, reentrant, head_inside

    def last(self, x):
        return getattr(self, self.head_name)(torch.tanh(x)) * 1

    def maybe_recomputed(self, function, x):
        return function(x) if self.reentrant is None else checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, tokens, labels=None):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = self.maybe_recomputed(block, x)
        logits = self.maybe_recomputed(self.last, x) if self.head_inside else self.last(x)
        return logits if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tokens_of(step, batch=4):
    return torch.randint(0, 13, (batch, 6), generator=torch.Generator().manual_seed(step))


# How models are compiled -----------------------------------------------------------------------------------------


def nothing(model, **options):
    return model


def wrapped(model, **options):
    return torch.compile(model, **options)


def in_place(model, **options):
    model.compile(**options)
    return model


def blocks_in_place(model, **options):
    for block in model.blocks:
        block.compile(**options)
    return model


def blocks_wrapped(model, **options):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **options)
    return model


def trained(compiled, *, monitored=True, layers="unembedding", backend="aot_eager", evaluated=False, **net):
    """The readings, the weights and the number of graphs of a training.

    Micro-batches change in size, and every second step is read; there may be an evaluation after each.
    """
    torch._dynamo.reset()
    counters.clear()
    model = Net(**net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = watch(model, layers=layers, every=2) if monitored else None
    run = compiled(model, backend=backend, fullgraph=True, dynamic=True)
    torch.manual_seed(1)
    readings = []
    for step in range(3):
        for micro_batch in range(2):
            tokens = tokens_of(10 * step + micro_batch, batch=4 + (step + micro_batch) % 3)
            run(tokens, labels=torch.where(tokens % 3 == 0, -100, tokens)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None and (taken := monitor.step()) is not None:
            readings.append(taken)
        if evaluated:
            model.eval()
            run(tokens, labels=tokens)
            with torch.no_grad():
                run(tokens, labels=tokens)
            model.train()
    if monitor is not None:
        monitor.close()
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    assert not counters["graph_break"]
    return readings, weights, counters["stats"]["unique_graphs"]


def assert_same_readings(found, expected):
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for site in other:
            for form in FORMS:
                if form in ("lar", "lar_token_centered") or site == "unembedding":
                    assert getattr(one[site], form) == pytest.approx(getattr(other[site], form), abs=EXACT), (
                        site,
                        form,
                    )
            for field in ("step", "tokens", "tokens_seen", "kept"):
                assert getattr(one[site], field) == getattr(other[site], field), (site, field)


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


# The same readings, the same training, no graph more -------------------------------------------------------------

ALL = ["unembedding", "blocks.*"]


@pytest.mark.parametrize("compiled", [wrapped, in_place])
def test_a_model_that_is_compiled(compiled):
    readings, weights, graphs = trained(compiled, layers=ALL, evaluated=True)
    _, plain_weights, plain_graphs = trained(compiled, monitored=False, evaluated=True)
    assert graphs == plain_graphs
    assert_same_weights(weights, plain_weights)
    assert_same_readings(readings, trained(nothing, layers=ALL)[0])


def test_a_head_that_is_found_in_the_first_forward_costs_one_graph():
    readings, weights, graphs = trained(wrapped, head="readout")
    _, plain_weights, plain_graphs = trained(wrapped, monitored=False, head="readout")
    assert graphs == plain_graphs + 1  # that of the first forward, with a hook at every linear layer
    assert_same_weights(weights, plain_weights)
    assert_same_readings(readings, trained(nothing, head="readout")[0])


@pytest.mark.parametrize("compiled", [blocks_in_place, blocks_wrapped])
def test_blocks_that_are_compiled_one_by_one(compiled):
    _, plain_weights, plain_graphs = trained(compiled, monitored=False)
    for layers, more in ((ALL, 1), (["unembedding", "blocks.1.*"], 2)):
        readings, weights, graphs = trained(compiled, layers=layers)
        # One code for all blocks; two where some are watched and some are not.
        assert graphs == more * plain_graphs, layers
        assert_same_weights(weights, plain_weights)
        assert_same_readings(readings, trained(nothing, layers=layers)[0])


def test_layers_beside_watched_ones_are_let_go():
    model = Net()

    def hooked():
        return {name for name, module in model.named_modules() if module._forward_hooks}

    with watch(model, layers=["unembedding", "blocks.1.up"], every=1):
        # Else the compiler would run the code of another block for the one that is watched.
        assert hooked() == {"", "lm_head", "blocks.0.up", "blocks.1.up", "blocks.2.up"}
    assert hooked() == set()


def test_inductor_makes_the_same_weights_with_and_without_the_monitor():
    readings, weights, graphs = trained(wrapped, backend="inductor", layers=ALL)
    _, plain_weights, plain_graphs = trained(wrapped, backend="inductor", monitored=False)
    assert graphs == plain_graphs
    assert_same_weights(weights, plain_weights)
    assert_same_readings(readings, trained(nothing, layers=ALL)[0])


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize(("compiled", "head_inside"), [(wrapped, True), (blocks_in_place, False)])
def test_what_backward_recomputes_counts_once(compiled, reentrant, head_inside):
    net = {"reentrant": reentrant, "head_inside": head_inside}
    readings, weights, graphs = trained(compiled, layers=ALL, **net)
    _, plain_weights, plain_graphs = trained(compiled, monitored=False, **net)
    assert graphs == plain_graphs
    assert_same_weights(weights, plain_weights)
    assert_same_readings(readings, trained(nothing, layers=ALL)[0])  # nothing compiled, nothing recomputed


# What is compiled ------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_watched_before_its_first_call():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with watch(compiled, every=1) as monitor:
        tokens = tokens_of(0)
        compiled(tokens, labels=torch.where(tokens % 3 == 0, -100, tokens)).backward()
        reading = monitor.step().main
        assert monitor.sites["unembedding"]["module"] == "_orig_mod.lm_head"
    with watch(model, every=1) as monitor:
        model(tokens, labels=torch.where(tokens % 3 == 0, -100, tokens)).backward()
        assert reading.lar == pytest.approx(monitor.step().main.lar, abs=EXACT)
        assert reading.tokens == monitor.readings[-1].main.tokens == (tokens % 3 != 0).sum()


def test_a_loss_that_is_compiled_with_the_model_in_it():
    model = Net()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(tokens):
        return model(tokens, torch.where(tokens > 5, tokens, -100))  # labels by place, made inside

    with watch(model, every=1) as monitor:
        for step in range(2):
            tokens = tokens_of(step)
            loss_of(tokens).backward()
            assert monitor.step().main.tokens == (tokens > 5).sum()
        mask = tokens_of(3) > 8
        monitor.mask(mask)
        loss_of(tokens_of(4)).backward()
        assert monitor.step().main.tokens == mask.sum()
        loss_of(tokens_of(4)).backward()  # the mask was for one forward
        assert monitor.step().main.tokens == (tokens_of(4) > 5).sum()


def test_graph_breaks_of_the_models_own():
    class Broken(Net):
        def last(self, x):
            torch._dynamo.graph_break()
            return super().last(x)

    found = []
    for compiled in (True, False):
        model = Broken()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with watch(model, layers=ALL, every=1) as monitor:
            run(tokens_of(0)).square().mean().backward()
            readings = monitor.step()
        found.append(
            {site: (reading.tokens, pytest.approx(reading.lar, abs=EXACT)) for site, reading in readings.items()}
        )
    assert found[0] == found[1]


def test_layers_that_share_their_weight_are_told_apart():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(13, 8)
            self.first, self.second = nn.Linear(8, 13, bias=False), nn.Linear(8, 13, bias=False)
            self.second.weight = self.first.weight

        def forward(self, tokens):
            x = self.embedding(tokens)
            return self.first(x) + self.second(torch.tanh(3 * x))

    found = []
    for compiled in (True, False):
        model = Twins()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with watch(model, layers=["first", "second"], every=1) as monitor:
            run(tokens_of(0)).square().mean().backward()
            found.append({site: pytest.approx(reading.lar, abs=EXACT) for site, reading in monitor.step().items()})
    assert found[0] == found[1]
    assert found[0]["first"] != found[0]["second"]


def test_models_of_one_class_share_their_code():
    models = [Net() for _ in range(9)]
    for i, model in enumerate(models):
        with torch.no_grad():
            model.lm_head.weight.mul_(torch.rand(8) * i + 1)
    monitors = [watch(model, every=1) for model in models]
    for i, model in enumerate(models):
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
        run(tokens_of(i)).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    for i, (model, monitor) in enumerate(zip(models, monitors, strict=True)):
        compiled = monitor.step().main.lar
        model(tokens_of(i)).square().mean().backward()
        assert compiled == pytest.approx(monitor.step().main.lar, abs=EXACT)
        monitor.close()


def test_nothing_of_the_monitor_is_exported():
    model = Net()
    with watch(model, every=1) as monitor:
        for strict in (False, True):
            program = torch.export.export(model, (tokens_of(0),), strict=strict)
            assert not any("logalign" in str(node.target) for node in program.graph.nodes)
        model(tokens_of(0)).square().mean().backward()
        assert monitor.step().main.tokens == 24


def test_a_monitor_stands_aside_where_a_forward_is_not_run_as_it_stands():
    model = Net()
    parameters = dict(model.named_parameters())

    def loss_of(parameters, tokens):
        return torch.func.functional_call(model, parameters, (tokens,)).square().mean()

    expected = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(parameters, tokens_of(0))
    with watch(model, every=1) as monitor:
        found = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0))(parameters, tokens_of(0))
        traced = torch.jit.trace(model, (tokens_of(0),))
        assert monitor.step().main.tokens == 0
        torch.func.grad(loss_of)(parameters, tokens_of(0))  # a training step in another form
        assert monitor.step().main.tokens == 24
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(traced(tokens_of(1)), model(tokens_of(1)))


# Errors, silence and the end -------------------------------------------------------------------------------------


def test_errors_reach_the_user():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with watch(model, every=1) as monitor:
        monitor.mask(torch.ones(2, 6, dtype=torch.bool))
        with pytest.raises(InputError, match=r"expected one value for each of the tokens \(4, 6\)"):
            compiled(tokens_of(0))


def test_a_model_that_ran_compiled_before_it_was_watched_is_told():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(tokens_of(0))
    with watch(model, every=2) as monitor:
        for step in range(4):
            compiled(tokens_of(step)).square().mean().backward()
            monitor.step()
        compiled(tokens_of(4)).square().mean().backward()
        with pytest.warns(LogAlignWarning, match=r"first compiled call, or call torch\._dynamo\.reset\(\) after watch"):
            assert monitor.step().main.lar is None
        monitor.step()
        torch._dynamo.reset()
        compiled(tokens_of(5)).square().mean().backward()
        assert monitor.step().main.tokens == 24


def test_closing_while_the_model_is_compiled():
    def run(monitored):
        torch._dynamo.reset()
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = watch(model, every=1) if monitored else None
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for step in range(6):
            compiled(tokens_of(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None and step < 3:
                assert monitor.step().main.tokens == 24
                if step == 2:
                    monitor.close()
                    readings, monitor = len(monitor.readings), None
                    assert readings == 3
        return model.state_dict()

    assert_same_weights(run(True), run(False))


def test_a_copy_of_a_watched_model_is_compiled_without_it():
    model = Net()
    with watch(model, every=1) as monitor:
        twin = copy.deepcopy(model)
        torch.compile(twin, backend="aot_eager", fullgraph=True)(tokens_of(0)).square().mean().backward()
        torch.compile(model, backend="aot_eager", fullgraph=True)(tokens_of(1)).square().mean().backward()
        assert monitor.step().main.tokens == 24
