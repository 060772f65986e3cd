import numpy as np
import pytest

from logalign.follow.plot import BRAILLE, TerminalCurve, plot

NAN = float("nan")


def dots(rows):
    """Which dots are set, as an array of the plot's inside."""
    inside = [row.plain[8:] for row in rows[1:-1]]
    width = max(map(len, inside))
    found = np.zeros((4 * len(inside), 2 * width), dtype=bool)
    bits = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
    for y, row in enumerate(inside):
        for x, letter in enumerate(row):
            code = ord(letter) - BRAILLE
            if 0 <= code < 256:
                for column in range(2):
                    for line in range(4):
                        found[4 * y + line, 2 * x + column] = bool(code & bits[column][line])
    return found


def test_a_line_goes_from_corner_to_corner():
    rows = plot("x", np.arange(5.0), [TerminalCurve("", np.arange(5.0), "cyan")], width=28, height=7)
    found = dots(rows)
    assert found[-1, 0]
    assert found[0, -1]
    assert found.any(axis=0).all()  # joined, without a gap
    assert [row.plain[:8] for row in rows[1:-1]] == ["     4 ┤", "       │", "     2 ┤", "       │", "     0 ┤"]
    assert rows[-1].plain.split() == ["└0", "step", "4"]


def test_no_extreme_of_a_long_run_is_lost():
    values = np.zeros(100_000)
    values[[777, 50_001]] = 1.0, -1.0
    found = dots(plot("x", np.arange(100_000.0), [TerminalCurve("", values, "cyan")], width=80, height=8))
    assert found[0].sum() == 1
    assert found[-1].sum() == 1


def test_undefined_values_are_a_gap():
    values = np.array([1.0, 1.0, NAN, 1.0, 1.0])
    columns = dots(plot("x", np.arange(5.0), [TerminalCurve("", values, "cyan")], width=49, height=5)).any(axis=0)
    assert columns[:20].all()
    assert not columns[25:55].any()
    assert columns[62:].all()


def test_a_logarithmic_axis_has_its_powers_and_leaves_out_what_is_not_positive():
    values = np.array([0.0, 1.0, 10.0, 100.0, -5.0])
    rows = plot("k", np.arange(5.0), [TerminalCurve("", values, "cyan")], width=40, height=9, log=True)
    labels = [row.plain[:6].strip() for row in rows[1:-1]]
    assert [label for label in labels if label] == ["100", "10", "1"]
    assert labels.index("10") == 3


def test_a_threshold_is_named_at_its_line_or_in_the_heading():
    curve = TerminalCurve("", np.array([0.0, 1.0]), "cyan")
    near = plot("x", np.arange(2.0), [curve], width=60, height=8, lines=[(1.5, "approaching")])
    assert "approaching 1.5" in near[1].plain
    far = plot("x", np.arange(2.0), [curve], width=60, height=8, lines=[(100.0, "approaching")])
    assert "approaching 100" in far[0].plain
    assert near[0].plain.count("approaching") == 0


@pytest.mark.parametrize("values", [[], [NAN], [0.5], [0.5, 0.5], [1e300, -1e300], [5e-324, 0.0], [0.0, 0.0]])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("size", [(9, 3), (12, 3), (80, 4), (200, 30)])
def test_every_plot_fits(values, log, size):
    width, height = size
    steps = np.arange(float(len(values)))
    if not len(steps):
        steps, values = np.array([0.0]), [NAN]
    curves = [
        TerminalCurve("plain", np.array(values), "cyan"),
        TerminalCurve("centered", np.array(values), "red", dotted=True),
    ]
    for ascii_only in (False, True):
        rows = plot("LAR", steps, curves, width=width, height=height, log=log, ascii_only=ascii_only)
        assert len(rows) == height
        assert all(row.cell_len <= width for row in rows)
        if ascii_only:
            assert all(row.plain.isascii() for row in rows)
