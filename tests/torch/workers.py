"""Real processes with a gloo group between them: started once, then handed one case after the other.

A case is a module-level function `case(rank, world, *arguments)`; what it returns, or the error that it raised, comes
back from every rank. Processes that do not answer within the limit are killed: a hang is a failure, not a wait.
"""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LIMIT = 180.0
"""Seconds for one case."""
GROUP_LIMIT = datetime.timedelta(seconds=20)
"""The process group's own time limit."""


class Workers:
    """`world` processes of one gloo group."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What every rank returned.

        Raises:
            AssertionError: a rank raised, with its traceback; or did not answer.
        """
        results = self.outcomes(case, *arguments)
        broken = [f"rank {rank}:\n{text}" for rank, (kind, text) in enumerate(results) if kind == "raised"]
        assert not broken, "\n".join(broken)
        return [value for _, value in results]

    def outcomes(self, case: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        """("returned", value) or ("raised", traceback) of every rank; after an error the processes are started anew."""
        self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results: list[tuple[str, Any]] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                self.stop()
                raise AssertionError(f"rank {rank} of {self.world} did not answer within {LIMIT} s: {case.__name__}")
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(("raised", "the process ended"))
        if any(kind == "raised" for kind, _ in results):
            self.stop()
        return results

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("spawn")
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        for rank in range(self.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, self.world, meeting, theirs), daemon=True)
            process.start()
            self._processes.append(process)
            self._pipes.append(mine)


def _work(rank: int, world: int, meeting: Path, pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=GROUP_LIMIT
    )
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            result = ("returned", case(rank, world, *arguments))
        except BaseException:
            result = ("raised", traceback.format_exc())
        pipe.send(result)
