"""The terminal: take it over, draw on it and give it back, whatever ends the program.

Method: termios and a handful of escape sequences that every terminal since the VT100 knows, colors through Rich, and
`select` to wait for keys, signals and news in one thread. Only changed rows are sent, which suits ssh. The alternative,
Textual, does all of it and much more, in three threads. It is one more package to install on a machine where somebody
only wants to look.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.text import Text

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
"""Alternate screen, no cursor, no wrapping, clear."""
LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
KEYS = {
    b"q": "quit",
    b"Q": "quit",
    b"?": "help",
    b"h": "help",
    b"z": "zoom",
    b"\t": "right",
    b"\x1b[Z": "left",
    **{
        b"\x1b" + kind + letter: name
        for kind in (b"[", b"O")
        for letter, name in ((b"A", "up"), (b"B", "down"), (b"C", "right"), (b"D", "left"))
    },
}


class EndedError(Exception):
    """A signal asks the program to end.

    Attributes:
        status: The exit status: 128 and the signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number


class Terminal:
    """A terminal in full-screen use, as a context manager.

    Raises:
        EndedError: inside the context, when SIGTERM or SIGHUP arrives, or the terminal is gone.
    """

    def __init__(self) -> None:
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        self._rows: list[Text] = []
        self._size = (0, 0)
        self._before: list[Any] | None = None
        self._handlers: dict[int, Any] = {}
        self._pending = b""
        self._wake_read, self._wake_write = os.pipe()
        for end in (self._wake_read, self._wake_write):
            os.set_blocking(end, False)
        encoding = (sys.stdout.encoding or "ascii").lower().replace("-", "")
        self.ascii_only = encoding != "utf8" or os.environ.get("TERM") == "linux"

    def __enter__(self) -> Terminal:
        self._before = termios.tcgetattr(self._in)
        for number, handler in (
            (signal.SIGTERM, self._end),
            (signal.SIGHUP, self._end),
            (signal.SIGWINCH, self._resized),
            (signal.SIGTSTP, self._suspend),
        ):
            self._handlers[int(number)] = signal.signal(number, handler)
        self._old_wake = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # From here on a second signal ends the program at once, in case the terminal does not take the output.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        self._give_back()
        signal.set_wakeup_fd(self._old_wake)
        for handled, handler in self._handlers.items():
            signal.signal(handled, handler)
        os.close(self._wake_read)
        os.close(self._wake_write)

    @property
    def size(self) -> tuple[int, int]:
        """Return columns and rows, or 80 by 24 where the terminal does not say."""
        try:
            columns, rows = os.get_terminal_size(self._out)
        except OSError:
            columns, rows = 0, 0
        return (columns or 80, rows or 24)

    def draw(self, rows: Sequence[Text]) -> None:
        """Show these rows from the top, and send only the changed ones."""
        if self.size != self._size:
            self._size, self._rows = self.size, []
        sent = ["\x1b[2J"] if not self._rows else []
        console = Console(
            file=io.StringIO(), force_terminal=True, color_system="standard", width=self._size[0] + 1, highlight=False
        )
        for i, row in enumerate(rows):
            if i >= len(self._rows) or not _same(self._rows[i], row):
                with console.capture() as captured:
                    console.print(row, end="", no_wrap=True, overflow="crop", soft_wrap=True)
                sent.append(f"\x1b[{i + 1};1H{captured.get()}\x1b[0m\x1b[K")
        if len(rows) < len(self._rows):
            sent.append(f"\x1b[{len(rows) + 1};1H\x1b[J")
        self._rows = [row.copy() for row in rows]
        if sent:
            self._write("".join(sent))

    def keys(self, timeout: float) -> list[str]:
        """Wait for keys, a signal, news (`wake`) or the timeout, and return the names of known keys."""
        readable, _, _ = select.select([self._in, self._wake_read], [], [], timeout)
        if self._wake_read in readable:
            with suppress(BlockingIOError):
                os.read(self._wake_read, 1024)
        if self._in not in readable:
            return []
        try:
            data = os.read(self._in, 1024)
        except OSError:
            data = b""
        if not data:
            raise EndedError(signal.SIGHUP)
        return _keys(data)

    def wake(self) -> None:
        """Let `keys` return. Another thread may call this."""
        with suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"\0")

    def _take(self) -> None:
        tty.setcbreak(self._in, termios.TCSANOW)
        self._rows, self._size = [], (0, 0)
        self._write(ENTER)

    def _give_back(self) -> None:
        with suppress(EndedError):
            self._write(LEAVE)
        if self._before is not None:
            with suppress(termios.error, OSError):
                termios.tcsetattr(self._in, termios.TCSANOW, self._before)

    def _write(self, text: str) -> None:
        data = text.encode("ascii" if self.ascii_only else "utf-8", "replace")
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except OSError as error:
            raise EndedError(signal.SIGHUP) from error

    def _end(self, number: int, frame: FrameType | None) -> None:
        raise EndedError(number)

    def _resized(self, number: int, frame: FrameType | None) -> None:
        """Do nothing: the signal itself ends the waiting."""

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        self.wake()


def _same(one: Text, other: Text) -> bool:
    return one.plain == other.plain and one.style == other.style and one.spans == other.spans


def _keys(data: bytes) -> list[str]:
    """Return the keys in the typed bytes, without unknown key sequences."""
    found = []
    while data:
        length = 1
        if data[:1] == b"\x1b" and data[1:2] in (b"[", b"O"):
            length = 3
            while data[1:2] == b"[" and length <= len(data) and not 0x40 <= data[length - 1] <= 0x7E:
                length += 1
        key = KEYS.get(data[:length])
        if key is not None:
            found.append(key)
        data = data[length:]
    return found
