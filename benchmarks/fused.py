"""What the energy of logits that never exist costs, and how far off it is.

    python -m benchmarks.fused            both tables on the terminal
    python -m benchmarks.fused --write    and put them into docs/performance.md

Times are CPU time on one thread, beside one forward of the head. Errors are those of a small GPT after a short training
on sources of Python's standard library: what is found of the last hidden states of 32 held-out sequences, against the
logits that its head makes of them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.overhead import Rows, megabytes, peak_allocation, timed, write
from logalign.demos import corpus
from logalign.demos.gpt import GPT
from logalign.mathematics.energies import Energies
from logalign.torch.linear import Dense
from logalign.torch.meter import Meter, unpack
from logalign.torch.output_energy import OutputEnergy, Way

VOCABULARY, WIDTH, TOKENS = 50_304, 768, 4096
SAMPLES = (64, 256, 1024)
DOCUMENTS, CONTEXT, BATCH, STEPS, DRAWN = 300, 128, 16, 300, 100
FORMS = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    arguments = parser.parse_args()
    arguments.device, arguments.clock = "cpu", "cpu"
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts: dict[str, Callable[[argparse.Namespace], Rows]] = {"fused-costs": costs, "fused-errors": errors}
    for name, part in parts.items():
        rows = part(arguments)
        table = Table(*rows[0], title=name)
        for row in rows:
            table.add_row(*row.values())
        Console().print(table)
        if arguments.write:
            write(name, rows, arguments)


def costs(arguments: argparse.Namespace) -> Rows:
    """Time and memory of each way beside one forward of the head."""
    weight, inputs = torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5, torch.randn(TOKENS, WIDTH)
    row_mean = weight.double().mean(0)

    def once(way: Way) -> Callable[[], object]:
        return lambda: OutputEnergy(way).of(Dense(weight), inputs, row_mean=row_mean)

    again = OutputEnergy(Way("exact"))
    again.of(Dense(weight), inputs)
    ways: dict[str, Callable[[], object]] = {
        "the head's own forward": lambda: F.linear(inputs, weight),
        "exact": once(Way("exact")),
        "exact, a further micro-batch of the step": lambda: again.of(Dense(weight), inputs),
        **{f"{size} tokens": once(Way(size)) for size in SAMPLES},
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):
        for way, run in ways.items():
            times[way].append(timed(run, arguments))
    head = times["the head's own forward"]
    return [
        {
            "way": way,
            "time": f"{statistics.median(each) * 1e3:.0f} ms",
            "of the head's forward": f"{statistics.median(t / h for t, h in zip(each, head, strict=True)):.1%}",
            "extra memory": megabytes(peak_allocation(ways[way], arguments.device)),
        }
        for way, each in times.items()
    ]


def errors(arguments: argparse.Namespace) -> Rows:
    """Errors of the four forms of LAR against those from logits, and what was reported beside them."""
    weight, inputs, logits = trained()
    exact = Energies.of(weight.double(), inputs.double(), outputs=logits.double())
    rows = []
    for name, asked in {"exact": "exact", **{f"{size} tokens": size for size in SAMPLES}}.items():
        way = Way(asked)
        found = [measured(weight, inputs, way) for _ in range(1 if asked == "exact" else DRAWN)]
        row = {"way": name}
        for form in FORMS:
            off = [getattr(each, form) - getattr(exact, form) for each in found]
            row[f"`{form}`"] = f"{statistics.fmean(error**2 for error in off) ** 0.5:.1e}"
        reported = statistics.fmean(each.standard_errors["lar"] for each in found)
        within = sum(abs(each.lar - exact.lar) <= 3 * each.standard_errors["lar"] for each in found)
        row["reported for `lar`"] = f"{reported:.1e}" if reported else ""
        row["within 3 of it"] = f"{within} of {DRAWN}" if reported else ""
        rows.append(row)
    return rows


def measured(weight: Tensor, inputs: Tensor, way: Way) -> Energies:
    """What a monitored forward without logits gives."""
    meter = Meter((weight.shape[0], weight.shape[1]), weight.device, way=way)
    meter.add(weight, inputs)
    packed = meter.pack()
    return unpack(packed, packed.vector.numpy())[0]


def trained() -> tuple[Tensor, Tensor, Tensor]:
    """Weight, inputs and logits of the head of a GPT that was trained for a while."""
    documents = corpus.read_documents()
    documents = corpus.Documents(documents.texts[:DOCUMENTS], documents.source, documents.fingerprint)
    tokens = corpus.tokenize(documents)
    model = GPT(vocabulary=tokens.vocabulary, width=128, layers=2, context=CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data, held_out = torch.from_numpy(tokens.train), torch.from_numpy(tokens.held_out)
    for _ in range(STEPS):
        starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        window = data[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, 32).long()
    with torch.no_grad():
        model(held_out[starts[:, None] + torch.arange(CONTEXT)])
    print(f"trained on {len(data):,} tokens, vocabulary {tokens.vocabulary}, training loss {loss.item():.2f}")
    return model.lm_head.weight.detach(), seen[0].flatten(0, 1), seen[1].flatten(0, 1)


if __name__ == "__main__":
    main()
