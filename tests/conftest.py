"""What tests of several parts share: run folders written by hand, as another program would write them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logalign.runs.run import Run, open_run

WriteRun = Callable[..., Run]

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on a CPU, too; read when Triton is first imported


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Write a run folder of 20 readings after docs/run-format.md, without the library's own writer."""

    def write(
        name: str = "run",
        *,
        lars: list[float | None] | None = None,
        sites: tuple[str, ...] = ("unembedding",),
        meta: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Run:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        described = {
            "schema_version": 1,
            "created": 1_700_000_000.0,
            "logalign_version": "0.1.0",
            "sites": {
                site: {
                    "module": "lm_head" if site == "unembedding" else site,
                    "kind": "Linear",
                    "how": "GPT.get_output_embeddings()",
                    "tied_to": ["embedding.weight"] if site == "unembedding" else [],
                    "m": 512,
                    "n": 64,
                    "bias": False,
                    "softmax": site == "unembedding",
                    "mask": "forward argument 'labels'",
                }
                for site in sites
            },
            "main": "unembedding",
            "settings": {"lr": 0.001},
            "every": 10,
            "spectra_every": 0,
            **(meta or {}),
        }
        (folder / "run.json").write_text(json.dumps(described))
        (folder / "events.jsonl").write_text('{"event": "start", "time": 1700000000.0}\n')
        values = [0.5 + 0.01 * i for i in range(20)] if lars is None else lars
        with (folder / "readings.jsonl").open("w") as file:
            for i, lar in enumerate(values):
                for site in sites:
                    record = {
                        "step": 10 * i,
                        "site": site,
                        "time": 1_700_000_000.0 + i,
                        "n": 64,
                        "m": 512,
                        "lar": lar,
                        "lar_vocab_centered": lar,
                        "lar_token_centered": lar,
                        "lar_centered": lar,
                        "effective_dim": None if lar is None else 64 ** (2 * (1 - lar)),
                        "energies": {"weight": 2.0, "input": 3.0, "output": 1.0},
                        "tokens": 128,
                        "tokens_seen": 128 * (10 * i + 1),
                        "kept": 0.9,
                        "epoch": i / 4,
                        "loss": 4.0 - 0.1 * i,
                        "lr": 1e-3,
                        "nonfinite": 0 if lar is not None else 2,
                        "reason": None if lar is not None else "the outputs hold NaN",
                        **fields,
                    }
                    file.write(json.dumps(record) + "\n")
        return open_run(folder)

    return write
