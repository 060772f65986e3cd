"""Small trainings on data that comes in passes, in many set-ups, and what their samples are known to do.

Every row has few enough logits to be looked at whole, so the truth is the mean loss of a row over those that count.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import logalign

SAMPLES, LENGTH, VOCABULARY, WIDTH, BATCH, PASSES = 160, 12, 31, 16, 16, 5
PER_PASS = SAMPLES // BATCH
Numbers = list[tuple[float | None, ...]]


class Truth(NamedTuple):
    """Drift, its error, gain, its error and pairs at every reading; and the readings' own."""

    expected: Numbers
    found: Numbers


class Body(nn.Module):
    """Embedding, a recurrence over what came before, and a norm: [B, T] to [B, T, n]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        before = x.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return self.norm(x + torch.tanh(self.mix(before)))


class Plain(nn.Module):
    """Logits [B, T, m], and the loss is the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.body(ids))
        return logits


class TinyForCausalLM(Plain):
    """As Transformers has it: labels are shifted inside, the loss comes out."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        logits = super().forward(input_ids)
        assert labels is not None
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return loss, logits


def model_of(kind: type[Plain] = Plain) -> Plain:
    torch.manual_seed(3)
    return kind()


def text() -> Tensor:
    """[samples, tokens + 1], each from a random walk, so that there is something to learn; no zeros."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(1, 4, (SAMPLES, LENGTH + 1), generator=generator)
    return (steps.cumsum(1) + torch.randint(30, (SAMPLES, 1), generator=generator)) % (VOCABULARY - 1) + 1


def order() -> list[Tensor]:
    """The samples of every step: shuffled anew in every pass."""
    generator = torch.Generator().manual_seed(1)
    return [
        batch for _ in range(PASSES) for batch in torch.randperm(SAMPLES, generator=generator).reshape(PER_PASS, BATCH)
    ]


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each row over its tokens that count, [B]."""
    each = F.cross_entropy(logits.detach().float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return each.sum(1) / (targets != -100).sum(1)


def numbers(found: Any) -> tuple[float | None, ...]:
    """Of a reading or of what `revisits` gives."""
    pairs = found.pairs if hasattr(found, "pairs") else found.revisited
    return found.drift, found.drift_error, found.gain, found.gain_error, pairs


def truth_of(samples: list[Tensor], losses: list[Tensor], steps: list[int]) -> Numbers:
    """What `revisits` gives at the last step of the last pass of `PER_PASS` steps that is complete at each of these."""
    who = torch.cat(samples).tolist()
    when = [step / PER_PASS for step, each in enumerate(samples) for _ in each]
    values = torch.cat(losses).double().tolist()
    return [numbers(logalign.revisits(who, when, values, now=(step + 1) // PER_PASS - 1 / PER_PASS)) for step in steps]


def train(
    model: nn.Module,
    *,
    loss_of: Any,
    every: int = 5,
    micro: int = 1,
    step_kwargs: Any = lambda **_: {},
    watched: nn.Module | None = None,
    loss: bool = True,
    lr: float = 0.02,
    on_step: Any = None,
    share: tuple[int, int] = (0, 1),
    optimizer_of: Any = None,
    **watching: Any,
) -> tuple[list[Tensor], Any]:
    """Train the model, and give the row losses of every step and the monitor.

    `loss_of(model, batch)` gives the loss and the row losses of a batch of text; `share` is (rank, world), where each
    rank has a part of every batch.
    """
    data, losses = text(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=lr) if optimizer_of is None else optimizer_of(model)
    monitor = logalign.watch(model if watched is None else watched, every=every, **watching)
    with contextlib.closing(monitor):
        for step, samples in enumerate(order()):
            total, seen = torch.zeros(()), []
            rank, world = share
            for part in samples.chunk(world)[rank].chunk(micro):
                value, each = loss_of(model, data[part])
                (value / micro).backward()
                total, seen = total + value.detach() / micro, [*seen, each]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(torch.cat(seen))
            monitor.step(
                **({"loss": total} if loss else {}), **step_kwargs(step=step, samples=samples, losses=losses[-1])
            )
            if on_step is not None:
                monitor = on_step(step, monitor)
    return losses, monitor


def plain_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """The README's loop: the model gives logits, the user has the targets."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])


def readings_of(monitor: Any) -> Numbers:
    return [numbers(each.main) for each in monitor.readings]


def steps_of(monitor: Any) -> list[int]:
    return [each.step for each in monitor.readings]


# What the ranks of a test do ----------------------------------------------------------------------------------------


def slow_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """In which differences of rounding do not grow, as they do in Adam."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def alone(micro: int = 1) -> Numbers:
    """One process that has all rows."""
    return readings_of(train(model_of(), loss_of=plain_loss, optimizer_of=slow_sgd, micro=micro)[1])


def ddp(rank: int, world: int, micro: int = 1, ids: bool = False) -> Numbers:
    """DistributedDataParallel; each pass deals a sample to another rank."""
    model = nn.parallel.DistributedDataParallel(model_of())
    own = (lambda *, samples, **_: {"samples": samples.chunk(world)[rank]}) if ids else (lambda **_: {})
    share = (rank, world)
    _, monitor = train(model, loss_of=plain_loss, share=share, optimizer_of=slow_sgd, micro=micro, step_kwargs=own)
    return readings_of(monitor)


def ddp_compiled(rank: int, world: int) -> Numbers:
    """The model compiled, then wrapped: targets are the next tokens."""

    def loss_of(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(batch)[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()), row_losses(logits, batch[:, 1:])

    model = nn.parallel.DistributedDataParallel(torch.compile(model_of(), backend="aot_eager"))
    return readings_of(train(model, loss_of=loss_of, share=(rank, world), optimizer_of=slow_sgd)[1])


def fsdp(rank: int, world: int) -> Numbers:
    """`fully_shard` of the head, the body and the model."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = model_of(), init_device_mesh("cpu", (world,))
    for unit in (model.body, model.lm_head, model):
        fully_shard(unit, mesh=mesh)
    return readings_of(train(model, loss_of=plain_loss, share=(rank, world), optimizer_of=slow_sgd)[1])


def fsdp_fused(rank: int, world: int) -> Numbers:
    """The same where the loss multiplies by the head's weight itself."""
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = model_of(Fused), init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    return readings_of(train(model, loss_of=fused_loss, share=(rank, world), optimizer_of=slow_sgd)[1])


def verdicts(rank: int = 0, world: int = 1) -> list[tuple[str, int | None]]:
    """Outcome and since when it has stood, at every reading."""
    model = model_of() if world == 1 else nn.parallel.DistributedDataParallel(model_of())
    said = []

    def on_step(step: int, monitor: Any) -> Any:
        if monitor.readings and monitor.readings[-1].step == step:
            said.append((monitor.verdict.outcome, monitor.verdict.since_step))
        return monitor

    train(model, loss_of=plain_loss, share=(rank, world), optimizer_of=slow_sgd, on_step=on_step)
    return said


class Fused(Plain):
    """A model as Transformers builds them, whose head's own forward does not run, and whose logits never leave it."""

    @property
    def base_model(self) -> nn.Module:
        return self.body

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, targets: Tensor | None = None) -> Any:
        assert targets is not None
        logits = F.linear(self.body(input_ids), self.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), row_losses(logits, targets)


def fused_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    return model(batch[:, :-1], targets=batch[:, 1:])
