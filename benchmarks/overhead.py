"""What monitoring costs: time and memory, as ratios measured side by side in one process.

    python -m benchmarks.overhead                  all parts, as tables on the terminal
    python -m benchmarks.overhead --parts sums     one of: steps, samples, memory, sums, accuracy, spectra
    python -m benchmarks.overhead --write          and put the tables into docs/performance.md
    python -m benchmarks.overhead --clock cpu --threads 1
                                                   on a machine that is not idle: seconds of CPU, not of the clock

Step times are taken in turns (no monitor, every=10, every=1, ...) in blocks of ten steps, and the medians of the
ratios of neighboring blocks are reported: a machine that is slow for a minute is slow for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import logalign
from benchmarks.pages import markdown, measured_here, put
from logalign.demos.gpt import GPT
from logalign.samples.visits import TRACKED
from logalign.torch import reduce
from logalign.torch.meter import Meter
from logalign.torch.module_map import linear_map
from logalign.torch.rows import HIGHEST
from logalign.torch.samples import SampleTracker

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
VOCABULARY, WIDTH, LAYERS, BATCH, CONTEXT = 32_768, 256, 4, 8, 128
BLOCK = 10
POOL = 4096
"""Rows of the data."""
WARM_BLOCKS = 8
"""Blocks after which most samples that are followed are known."""
ROWS, COLUMNS = 4096, 50_304
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HEAD = (50_257, 768)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Rows = list[dict[str, str]]


def main() -> None:
    """Measure, print, and write if asked."""
    parts: dict[str, Callable[[argparse.Namespace], Rows]] = {
        "steps": step_times,
        "samples": sample_times,
        "memory": extra_memory,
        "sums": sums_beside_a_read,
        "accuracy": accuracy,
        "spectra": spectra_beside_svd,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(parts), default=list(parts))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of ten steps for each way (default 12)")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its own choice)")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="what a second is (default wall)")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    console = Console()
    for name in arguments.parts:
        rows = parts[name](arguments)
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*row.values())
        console.print(table)
        if arguments.write:
            write(name, rows, arguments)


def step_times(arguments: argparse.Namespace) -> Rows:
    """Training steps of a small GPT with a 32k vocabulary, with and without a monitor."""
    rows = []
    for precision in ("fp32", "bf16"):
        dtype, ways = DTYPES[precision], {"none": 0, "every=10": 10, "every=1": 1}
        blocks = {way: training_block(dtype, every, arguments.device) for way, every in ways.items()}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for block in blocks.values():
            block()  # warm up
        for turn in range(arguments.rounds):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            for way in order:
                times[way].append(timed(blocks[way], arguments))
        step = statistics.median(times["none"]) / BLOCK
        rows.append(row(precision, "none", f"{step * 1e3:.0f} ms", "", ""))
        for way in ("every=10", "every=1"):
            ratios = [with_ / without - 1 for with_, without in zip(times[way], times["none"], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            inside = inside_monitor(dtype, arguments) / step / (10 if way == "every=10" else 1)
            rows.append(
                row(
                    precision,
                    way,
                    f"{statistics.median(times[way]) / BLOCK * 1e3:.0f} ms",
                    f"{statistics.median(ratios):+.2%} ({low:+.2%} to {high:+.2%})",
                    f"{inside:.2%}",
                )
            )
    return rows


def row(precision: str, way: str, step: str, ratio: str, inside: str) -> dict[str, str]:
    """One row of the step table."""
    return {
        "precision": precision,
        "monitor": way,
        "step": step,
        "extra time, median (quartiles)": ratio,
        "spent inside the monitor": inside,
    }


def sample_times(arguments: argparse.Namespace) -> Rows:
    """The same steps at every=10, with samples followed and without, and what following them takes by itself."""
    rows = []
    for precision in ("fp32", "bf16"):
        dtype, ways = DTYPES[precision], {"none": 0, "default": TRACKED}
        blocks = {way: training_block(dtype, 10, arguments.device, revisits=count) for way, count in ways.items()}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for block in blocks.values():
            for _ in range(WARM_BLOCKS):
                block()
        for turn in range(arguments.rounds):
            for way in list(ways) if turn % 2 else list(ways)[::-1]:
                times[way].append(timed(blocks[way], arguments))
        step = statistics.median(times["none"]) / BLOCK
        ratios = [with_ / without - 1 for with_, without in zip(times["default"], times["none"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        for samples in (POOL, 1024):
            inside, extra = inside_samples(dtype, samples, arguments)
            rows.append(
                {
                    "precision": precision,
                    "samples in the data": f"{samples:,}",
                    "step": f"{step * 1e3:.0f} ms",
                    "extra time, median (quartiles)": f"{statistics.median(ratios):+.2%} ({low:+.2%} to {high:+.2%})"
                    if samples == POOL
                    else "",
                    "spent on samples": f"{inside / step:.2%}",
                    "extra memory": megabytes(extra),
                }
            )
    return rows


def inside_samples(dtype: torch.dtype, samples: int, arguments: argparse.Namespace) -> tuple[float, int]:
    """Median seconds that a step spends on hashes and losses, after the forward and in backward; bytes at the peak."""
    like = {"device": arguments.device, "dtype": dtype}
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, **like)
    hidden = torch.randn(BATCH, CONTEXT, WIDTH, **like)
    tracker, step = SampleTracker(is_on=True), 0
    gradient = torch.softmax(head(hidden).detach().float(), -1)
    targets = torch.randint(VOCABULARY, (BATCH, CONTEXT, 1), device=arguments.device)
    gradient = gradient.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=gradient.dtype)).to(dtype)
    tracker.settle(threshold=int(min(1.0, TRACKED / samples) * (HIGHEST - 1)))
    mapped = lambda: linear_map(head)  # noqa: E731

    def follow() -> None:
        nonlocal step
        tracker.begin([tokens], None)
        tracker.measure(logits, hidden=hidden, mapped=mapped)
        for hook in logits._backward_hooks.values():
            hook(gradient)
        step += 1
        tracker.next_step(step)

    times, peak = [], 0
    for turn in range(15):
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT), device=arguments.device)
        logits = head(hidden)
        if turn == 14:
            peak = peak_allocation(follow, arguments.device)
        else:
            times.append(timed(follow, arguments))
    assert tracker.fault is None
    return statistics.median(times), peak


def training_block(dtype: torch.dtype, every: int, device: str, *, revisits: int = TRACKED) -> Callable[[], None]:
    """A function that trains ten steps, on a model of its own, on rows that come back in passes."""
    torch.manual_seed(0)
    model = GPT(vocabulary=VOCABULARY, width=WIDTH, layers=LAYERS, context=CONTEXT).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pool = torch.randint(VOCABULARY, (POOL, CONTEXT + 1), device=device)
    # As far into the training as it takes to know which samples are followed.
    order = iter(torch.randperm(POOL).repeat(1000).split(BATCH))
    monitor = logalign.watch(model, every=every, revisits=revisits) if every else None

    def block() -> None:
        for _ in range(BLOCK):
            tokens = pool[next(order).to(device)]
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(loss=loss)

    return block


def inside_monitor(dtype: torch.dtype, arguments: argparse.Namespace) -> float:
    """Median seconds that one monitored step spends in the head's hook and in step(), right after the head has run."""
    like = {"device": arguments.device, "dtype": dtype}
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, **like)
    inputs = torch.randn(BATCH, CONTEXT, WIDTH, **like)
    times = []
    with logalign.watch(head, layers="", every=1) as monitor:
        hook = next(iter(head._forward_hooks.values()))
        monitor._recorder.armed = False
        for _ in range(15):
            outputs = head(inputs)
            monitor._recorder.armed = True
            times.append(timed(lambda: (hook(head, (inputs,), {}, outputs), monitor.step()), arguments))  # noqa: B023
            monitor._recorder.armed = False
    return statistics.median(times)


def extra_memory(arguments: argparse.Namespace) -> Rows:
    """Peak memory that a monitored forward allocates beside the model's own."""
    rows = []
    for dtype in ("fp32", "bf16"):
        for vocabulary in (8192, 32_768, 131_072):
            tokens = BATCH * CONTEXT
            weight = torch.randn(vocabulary, WIDTH, device=arguments.device, dtype=DTYPES[dtype])
            inputs = torch.randn(tokens, WIDTH, device=arguments.device, dtype=DTYPES[dtype])
            outputs = inputs @ weight.T
            peak = peak_allocation(lambda: measure(weight, inputs, outputs), arguments.device)  # noqa: B023
            rows.append(
                {
                    "precision": dtype,
                    "vocabulary": f"{vocabulary:,}",
                    "logits": megabytes(outputs.nbytes),
                    "extra peak": megabytes(peak),
                    "of the logits": f"{peak / outputs.nbytes:.1%}",
                }
            )
    return rows


def measure(weight: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """What one monitored forward computes."""
    meter = Meter(tuple(weight.shape), weight.device)
    meter.add(weight, inputs, outputs=outputs)
    return meter.pack().vector


def peak_allocation(run: Callable[[], object], device: str) -> int:
    """Largest sum of bytes that were allocated and not yet freed during a call."""
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def sums_beside_a_read(arguments: argparse.Namespace) -> Rows:
    """The sums of squares of the logits beside one read of the same memory."""
    rows = []
    for name, dtype in DTYPES.items():
        logits = torch.randn(ROWS, COLUMNS, device=arguments.device, dtype=dtype)
        ways: dict[str, Callable[[], object]] = {
            "one read (sum)": logits.sum,
            "row_energies": lambda: reduce.row_energies(logits),  # noqa: B023
            "logits.float().pow(2).sum()": lambda: logits.float().pow(2).sum(),  # noqa: B023
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(7):
            for way, run in ways.items():
                times[way].append(timed(run, arguments))
        read = statistics.median(times["one read (sum)"])
        for way, each in times.items():
            ratio = statistics.median(t / r for t, r in zip(each, times["one read (sum)"], strict=True))
            extra = peak_allocation(ways[way], arguments.device)
            rows.append(
                {
                    "precision": name,
                    "way": f"`{way}`" if way != "one read (sum)" else way,
                    "time": f"{statistics.median(each) * 1e3:.0f} ms",
                    "of one read": f"{ratio:.2f}" if read else "",
                    "extra memory": megabytes(extra),
                }
            )
    return rows


def accuracy(arguments: argparse.Namespace) -> Rows:
    """Relative errors of the sums against float64, on logits as networks make them and on the worst case."""
    rows = []
    for name, dtype in DTYPES.items():
        for kind, make in LOGITS.items():
            logits = make(arguments.device).to(dtype)
            exact = sum(float(part.double().square().sum()) for part in torch.split(logits, 64))
            found = float(reduce.row_energies(logits).sum())
            whole = float(torch.linalg.vector_norm(logits)) ** 2
            rows.append(
                {
                    "precision": name,
                    "logits": kind,
                    "`row_energies`": f"{found / exact - 1:+.0e}",
                    "one norm over the whole tensor": f"{whole / exact - 1:+.0e}",
                }
            )
    return rows


def normal_logits(device: str) -> Tensor:
    """Independent standard normal logits."""
    return torch.randn(ROWS, COLUMNS, device=device)


def trained_logits(device: str) -> Tensor:
    """Logits with a common offset by word, as a trained head gives them, and a scale by token."""
    offset = torch.randn(COLUMNS, device=device) * 3 - 5
    return (normal_logits(device) + offset) * (0.5 + torch.rand(ROWS, 1, device=device))


LOGITS: dict[str, Callable[[str], Tensor]] = {
    "standard normal": normal_logits,
    "offset by word, scale by token": trained_logits,
    "all equal to 1.1": lambda device: torch.full((ROWS, COLUMNS), 1.1, device=device),
}


def spectra_beside_svd(arguments: argparse.Namespace) -> Rows:
    """The spectra of a GPT-2-sized head beside the SVD that they stand in for."""
    weight = torch.randn(HEAD, device=arguments.device)
    inputs = torch.randn(1024, HEAD[1], device=arguments.device)
    wide = weight.double()
    ways: dict[str, Callable[[], object]] = {
        "`logalign.spectra` (float64 inside)": lambda: logalign.spectra(weight, inputs),
        "`torch.linalg.svd`, float64": lambda: torch.linalg.svd(wide, full_matrices=False),
        "`torch.linalg.svd`, float32": lambda: torch.linalg.svd(weight, full_matrices=False),
        "`torch.linalg.svdvals`, float32": lambda: torch.linalg.svdvals(weight),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, run in ways.items():
            times[way].append(timed(run, arguments))
    ours = statistics.median(times[next(iter(ways))])
    return [
        {
            "way": way,
            "time": f"{statistics.median(each):.2f} s",
            "of spectra": f"{statistics.median(each) / ours:.1f}",
        }
        for way, each in times.items()
    ]


def timed(run: Callable[[], object], arguments: argparse.Namespace) -> float:
    """Seconds that a call takes, the device's work included."""
    cuda, clock = arguments.device.startswith("cuda"), CLOCKS[arguments.clock]
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    run()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def megabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def write(part: str, rows: Rows, arguments: argparse.Namespace) -> None:
    """Put a table into docs/performance.md, with what it was measured on."""
    kind = "cuda" if arguments.device.startswith("cuda") else "cpu"
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    what = [f"torch {torch.__version__}", threads]
    if kind == "cuda":
        what.insert(0, torch.cuda.get_device_name())
    if arguments.clock == "cpu":
        what.append("seconds of CPU time")
    put(PAGE, f"{part}-{kind}", f"{measured_here(*what)}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
