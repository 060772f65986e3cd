"""What monitoring costs in each training stack, beside the same training without a monitor, in one run.

    python -m benchmarks.stacks                       all stacks that run here, as a table on the terminal
    python -m benchmarks.stacks --stacks eager ddp    some of them
    python -m benchmarks.stacks --write               and put the table into docs/performance.md

Three copies of one training take turns, in blocks of four steps: without a monitor, every=10 (one monitored step in a
block, and a tenth of what it costs is reported) and every=1. Stacks of several ranks run on two gloo processes, of one
thread each. What is spent inside the monitor (its hooks and `step()`) is timed there, by the clock of CPU time, for
the ratio of step times scatters by more than it is. Waits for the device are the reading's one transfer to the host,
and every scalar that is read beside it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import logalign
from benchmarks.pages import markdown, measured_here, put, show
from logalign.demos.gpt import GPT

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
VOCABULARY, WIDTH, LAYERS, BATCH, CONTEXT = 16_384, 256, 2, 8, 64
STEPS = 4
WAYS = {"none": 0, "every=10": STEPS, "every=1": 1}
COLLECTIVES = ("c10d::",)
Row = dict[str, str]


class Training:
    """One copy of a training: the model in its stack, and how its loss is had."""

    def __init__(self, stack: str, every: int, rank: int, world: int) -> None:
        torch.manual_seed(0)
        # A class of its own: compiled code is shared between models of one class, hooks or not.
        own: type[GPT] = type(f"GPT{every}", (GPT,), {})
        model = own(vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, context=CONTEXT)
        self.model, self.losses = STACKS[stack](model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        generator = torch.Generator().manual_seed(rank)
        self.tokens = torch.randint(VOCABULARY, (BATCH // world, CONTEXT + 1), generator=generator)
        self.inside = 0.0
        self.monitor = logalign.watch(self.model, every=every) if every else None
        if self.monitor is not None:
            recorder = self.monitor._recorder
            for owner, name in ((recorder, "record"), (recorder, "forward_over"), (self.monitor, "step")):
                setattr(owner, name, self._timed(getattr(owner, name)))

    def steps(self, count: int = STEPS) -> None:
        """Train so many steps."""
        for _ in range(count):
            loss = self.losses(self.model, self.tokens[:, :-1], self.tokens[:, 1:])
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.monitor is not None:
                self.monitor.step()

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.inside += time.thread_time() - begun

        return timed


def cross_entropy(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """From logits."""
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def in_bfloat16(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The same under autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return cross_entropy(model, inputs, targets)


Prepared = tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]


def compiled(model: GPT) -> Prepared:
    """torch.compile of the whole model, inductor."""
    model.compile(fullgraph=True)
    return model, cross_entropy


def checkpointed(model: GPT) -> Prepared:
    """Blocks and head run again in backward."""
    for module in (*model.blocks, model.lm_head):
        forward = module.forward
        module.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)  # type: ignore[method-assign]
    return model, cross_entropy


def with_lora(model: GPT) -> Prepared:
    """Adapters on the head and on every other linear layer."""
    from peft import LoraConfig, get_peft_model

    targets = ["query_key_value", "attention_out", "mlp.0", "mlp.2", "lm_head"]
    return get_peft_model(model, LoraConfig(r=8, target_modules=targets)), cross_entropy  # type: ignore[arg-type]


def data_parallel(model: GPT) -> Prepared:
    """DistributedDataParallel."""
    return nn.parallel.DistributedDataParallel(model), cross_entropy


def fully_sharded(model: GPT) -> Prepared:
    """`fully_shard` of blocks, head and the rest."""
    from torch.distributed.fsdp import fully_shard

    for unit in (*model.blocks, model.lm_head, model):
        fully_shard(unit)
    return model, cross_entropy


def tensor_parallel(model: GPT) -> Prepared:
    """The rows of the head over two ranks."""
    from torch.distributed import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan), cross_entropy  # type: ignore[arg-type]


STACKS: dict[str, Callable[[GPT], Prepared]] = {
    "eager": lambda model: (model, cross_entropy),
    "autocast bf16": lambda model: (model, in_bfloat16),
    "compiled": compiled,
    "checkpointed": checkpointed,
    "LoRA on the head": with_lora,
    "DDP": data_parallel,
    "FSDP2": fully_sharded,
    "tensor parallel": tensor_parallel,
}
RANKS = {"DDP": 2, "FSDP2": 2, "tensor parallel": 2}


def measure(stack: str, rounds: int, rank: int = 0, world: int = 1) -> Row:
    """One row of the table."""
    trainings = {way: Training(stack, every, rank, world) for way, every in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for training in trainings.values():
        training.steps()  # compile, allocate, settle
        training.inside = 0.0
    for turn in range(rounds):
        for way in list(WAYS) if turn % 2 else list(WAYS)[::-1]:
            begun = time.perf_counter()
            trainings[way].steps()
            times[way].append((time.perf_counter() - begun) / STEPS)
    step = statistics.median(times["none"])
    extra = {
        way: statistics.median(watched / plain - 1 for watched, plain in zip(times[way], times["none"], strict=True))
        for way in ("every=10", "every=1")
    }
    one = trainings["every=1"].inside / rounds / STEPS
    return {
        "stack": stack if world == 1 else f"{stack}, {world} ranks",
        "step": f"{step * 1e3:.0f} ms",
        "extra time at every=1": f"{extra['every=1']:+.1%}",
        "inside the monitor, every=1": f"{one / step:.2%}",
        "every=10": f"{one / step / 10:.3%}",
        "collectives": str(calls(trainings, *COLLECTIVES)),
        "waits for the device": str(calls(trainings, "aten::_local_scalar_dense") + 1),
        "extra peak memory": f"{extra_memory(trainings) / 1e6:.1f} MB",
    }


def calls(trainings: dict[str, Training], *kinds: str) -> int:
    """Calls of operators of these kinds that a monitored step adds to one without a monitor."""
    counts = []
    for way in ("every=1", "none"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            trainings[way].steps(1)
        counts.append(sum(event.count for event in profiler.key_averages() if event.key.startswith(kinds)))
    return counts[0] - counts[1]


def extra_memory(trainings: dict[str, Training]) -> int:
    """Peak memory of a monitored step less that of a step without a monitor."""
    from benchmarks.overhead import peak_allocation

    return peak_allocation(lambda: trainings["every=1"].steps(1), "cpu") - peak_allocation(
        lambda: trainings["none"].steps(1), "cpu"
    )


def rank_of(rank: int, world: int, stack: str, rounds: int, meeting: Path, found: Any) -> None:
    """What each process of a stack of several ranks does."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    row = measure(stack, rounds, rank, world)
    if rank == 0:
        found.put(row)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measure_over_ranks(stack: str, rounds: int) -> Row:
    """The row that rank 0 measures."""
    world, context = RANKS[stack], multiprocessing.get_context("spawn")
    found: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, stack, rounds, Path(folder) / "meeting", found)
        processes = [context.Process(target=rank_of, args=(rank, *arguments)) for rank in range(world)]
        for process in processes:
            process.start()
        row: Row = found.get()
        for process in processes:
            process.join()
    return row


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stacks", nargs="*", choices=list(STACKS), default=list(STACKS))
    parser.add_argument("--rounds", type=int, default=8, help="blocks of four steps for each way (default 8)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch in stacks of one process (default: its choice)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows = []
    for stack in arguments.stacks:
        rows.append((measure_over_ranks if stack in RANKS else measure)(stack, arguments.rounds))
        print(rows[-1], flush=True)
    show(rows)
    if arguments.write:
        where = measured_here(f"torch {torch.__version__}")
        put(PAGE, "stacks", f"{where}\n\n{markdown(rows, numbers=True)}")


if __name__ == "__main__":
    main()
