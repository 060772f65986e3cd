"""A real pseudo-terminal with the command in it, and a screen that shows what a person would see."""

import os
import signal
import sys
import time
from pathlib import Path

import pexpect
import pyte
import pytest

PATIENCE = 20


class Session:
    """`logalign follow` in a pseudo-terminal of 24 rows and 80 columns, or of another size."""

    def __init__(self, arguments, *, rows=24, columns=80, env=None, cwd=None):
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "logalign.cli", "follow", *map(str, arguments)],
            dimensions=(rows, columns),
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **(env or {})},
            cwd=cwd,
            timeout=PATIENCE,
        )
        self.sent = b""
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.ByteStream(self.screen)

    def read(self):
        """Take what has been written, waiting a moment for it."""
        try:
            data = self.child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return
        self.sent += data
        self.stream.feed(data)

    @property
    def text(self):
        return "\n".join(self.screen.display)

    def wait_for(self, expected):
        """Read until something is on the screen, text or what a function says of the text."""
        is_there = expected if callable(expected) else lambda text: expected in text
        end = time.monotonic() + PATIENCE
        while not is_there(self.text):
            assert time.monotonic() < end, f"not seen: {expected}\n{self.text}"
            self.read()
        return self.text

    def resize(self, rows, columns):
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def keys(self, keys):
        self.child.send(keys)

    def signal(self, number):
        os.kill(self.child.pid, number)

    def end(self):
        """The exit status after all has been read; negative for a signal that was not handled."""
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end, self.text
            try:
                self.read()
            except pexpect.EOF:
                break
        self.child.wait()
        return self.child.exitstatus if self.child.signalstatus is None else -self.child.signalstatus

    def close(self):
        if self.child.isalive():
            self.child.kill(signal.SIGKILL)
        self.child.close(force=True)


@pytest.fixture
def terminal():
    """Start `logalign follow` with arguments in a pseudo-terminal."""
    sessions = []

    def start(*arguments, **options) -> Session:
        sessions.append(Session(arguments, **options))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


@pytest.fixture
def recorded() -> Path:
    """A run of another part's tests: readings of a small GPT that repeats its data."""
    return Path(__file__).parent.parent / "data" / "lm_repeat200k.jsonl"
