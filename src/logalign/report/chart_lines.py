"""Lines of charts: one description for the page's charts and for the figures for paper."""

from __future__ import annotations

from typing import Literal, NamedTuple

Style = Literal["-", "--", ":"]


class ChartLine(NamedTuple):
    """One curve.

    Attributes:
        column: The column of a run that it draws.
        color: Its name in `figures.COLORS`.
        words: Its name in the legend.
        style: Its line style, as Matplotlib names it. Styles differ too, for print in gray.
        is_main: True where a chart shows it from the beginning.
    """

    column: str
    color: str
    words: str
    style: Style
    is_main: bool

    @property
    def dash(self) -> str:
        """Its line style, as Plotly names it."""
        return {"-": "solid", "--": "dash", ":": "dot"}[self.style]


FORM_LINES = (
    ChartLine("lar", "plain", "plain", "-", is_main=True),
    ChartLine("lar_centered", "centered", "centered (both)", "-", is_main=True),
    ChartLine("lar_vocab_centered", "vocab_centered", "vocabulary-centered", "--", is_main=False),
    ChartLine("lar_token_centered", "token_centered", "token-centered", ":", is_main=False),
)
LOSS_LINES = (
    ChartLine("loss", "train", "training", "-", is_main=True),
    ChartLine("loss_mean", "plain", "training, mean since the reading before", ":", is_main=False),
    ChartLine("val_loss", "held_out", "held-out", "--", is_main=True),
)
