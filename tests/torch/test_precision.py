"""Low precision and what saves memory: the readings of the very tensors, and weights as without the monitor."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from logalign import Energies, watch
from logalign.errors import SiteError

FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


class Net(nn.Module):
    """A network that keeps what its head was given in training: recomputation gives it the same once more."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(13, 32)
        self.body = nn.Linear(32, 32)
        self.lm_head = nn.Linear(32, 13)
        self.reentrant = reentrant
        self.seen = []

    def logits(self, x):
        hidden = torch.tanh(self.body(x))
        if not torch.compiler.is_compiling():
            self.seen.append((self.lm_head.weight.detach().clone(), hidden.detach().clone()))
        return self.lm_head(hidden) * 1

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.logits(x) if self.reentrant is None else checkpoint(self.logits, x, use_reentrant=self.reentrant)


def tokens_of(seed):
    return torch.randint(0, 13, (4, 6), generator=torch.Generator().manual_seed(seed))


def trained(*, monitored, autocast=None, scaled=False, dtype=torch.float32, offload=False, compiled=False, **net):
    """The readings, what the head was given, and the weights; two micro-batches a step."""
    torch._dynamo.reset()
    model = Net(**net).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**22, growth_interval=2)
    monitor = watch(model, layers=["unembedding", "body"], every=1) if monitored else None
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    readings, seen = [], []
    for step in range(4):
        for micro_batch in range(2):
            tokens = tokens_of(10 * step + micro_batch)
            with (
                torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
                torch.autograd.graph.save_on_cpu() if offload else torch.enable_grad(),
            ):
                loss = F.cross_entropy(run(tokens).flatten(0, 1).float(), tokens.flatten())
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        seen.append(model.seen)
        model.seen = []
        if monitor is not None:
            readings.append(monitor.step(loss=loss))
    if monitor is not None:
        monitor.close()
    return readings, seen, model.state_dict(), scaler.get_scale() if scaled else None


SETTINGS = {
    "autocast to bfloat16": ({"autocast": BF16}, 1e-3),
    "autocast to float16 with a gradient scaler": ({"autocast": FP16, "scaled": True}, 2e-4),
    "bfloat16": ({"dtype": BF16}, 1e-3),
    "saved on the host": ({"offload": True}, 2e-6),
    "recomputed under autocast": ({"autocast": BF16, "reentrant": False}, 1e-3),
    "recomputed, reentrant, under autocast": ({"autocast": BF16, "reentrant": True}, 1e-3),
    "recomputed, float16 with a gradient scaler": ({"autocast": FP16, "scaled": True, "reentrant": False}, 2e-4),
    "recomputed, saved on the host": ({"offload": True, "reentrant": False}, 2e-6),
}


@pytest.mark.parametrize(("setting", "tolerance"), SETTINGS.values(), ids=SETTINGS.keys())
def test_precision_and_memory(setting, tolerance):
    readings, seen, weights, scale = trained(monitored=True, **setting)
    _, _, plain_weights, plain_scale = trained(monitored=False, **setting)
    for name in plain_weights:
        assert torch.equal(weights[name], plain_weights[name]), name
    if scale is not None:
        assert scale == plain_scale != 2.0**22  # the scaler has skipped steps, and the monitor takes their readings
    for taken, forwards in zip(readings, seen, strict=True):
        once = forwards[::2] if "reentrant" in setting else forwards  # backward has recomputed each
        assert len(once) == 2
        inputs = torch.cat([hidden.flatten(0, 1) for _, hidden in once]).double()
        exact = Energies.of(forwards[0][0].double(), inputs)
        assert taken.main.tokens == taken["body"].tokens == 48
        for form in FORMS:
            assert getattr(taken.main, form) == pytest.approx(getattr(exact, form), abs=tolerance), form


@pytest.mark.parametrize(
    "setting",
    [{"autocast": BF16}, {"dtype": BF16}, {"autocast": BF16, "reentrant": False}, {"autocast": FP16, "scaled": True}],
    ids=["autocast", "bfloat16", "recomputed under autocast", "float16 with a gradient scaler"],
)
def test_compiled(setting):
    readings, _, weights, scale = trained(monitored=True, compiled=True, **setting)
    _, _, plain_weights, plain_scale = trained(monitored=False, compiled=True, **setting)
    for name in plain_weights:
        assert torch.equal(weights[name], plain_weights[name]), name
    assert scale == plain_scale
    for taken, eager in zip(readings, trained(monitored=True, **setting)[0], strict=True):
        for site in ("unembedding", "body"):
            assert taken[site].tokens == eager[site].tokens == 48
            assert taken[site].lar == pytest.approx(eager[site].lar, abs=2e-4), site


# Weights that are elsewhere between forwards ---------------------------------------------------------------------


def test_a_model_that_is_moved_to_its_device_for_a_forward():
    model = Net()
    cpu_offload_with_hook(model, execution_device="cpu")
    with watch(model, every=1) as monitor:
        model(tokens_of(0)).square().mean().backward()
        weight, hidden = model.seen[0]
        exact = Energies.of(weight.double(), hidden.double())
        assert monitor.step().main.lar == pytest.approx(exact.lar, abs=2e-6)


def test_a_head_that_is_offloaded_after_it_is_watched_is_named():
    model = Net()
    with watch(model, every=1):
        cpu_offload(model, execution_device="cpu")
        with pytest.raises(SiteError, match=r"layer 'lm_head': expected a weight that is in memory, .* meta device"):
            model(tokens_of(0))
