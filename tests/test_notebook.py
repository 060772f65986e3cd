"""What a notebook shows: in a real kernel, of real runs, with text that could be code."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import logalign
from logalign import Reading, Readings, Verdict, diagnose, open_run, spectra
from logalign.diagnosis.outcome import SHOWN
from logalign.errors import InputError, MissingExtraError, RunError
from tests.drifts import write_log

DATA = Path(__file__).parent / "data"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
ALLOWED = {"div", "table", "tr", "th", "td", "b", "span", "svg", "polyline", "text", "details", "summary", "ul", "li"}


class Elements(HTMLParser):
    """Which elements and attributes there are, and what text; an element that is not closed is a fault."""

    def __init__(self, html):
        super().__init__()
        self.names, self.attributes, self.shown, self.open = set(), set(), "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.shown += data


def shown(value):
    """The text of what a notebook shows, which holds nothing that could run."""
    found = Elements(value._repr_html_())
    assert found.names <= ALLOWED
    assert not any(name.startswith("on") or name in ("href", "src") for name in found.attributes)
    return found.shown


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_run(path)


def test_a_notebook_shows_runs_verdicts_spectra_and_figures(tmp_path):
    cells = [
        "import logalign, numpy as np",
        f"run = logalign.open_run({str(DATA / 'lm_repeat200k.jsonl')!r})\nrun",
        f"logalign.diagnose(run, baseline={str(DATA / 'lm_fresh.jsonl')!r})",
        "logalign.spectra(np.eye(8)[:4], np.random.default_rng(0).normal(size=(20, 8)))",
        "run.plot()",
        "import sys; print('torch' in sys.modules, 'matplotlib' in sys.modules)",
    ]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=100, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown_run, verdict, spectrum, figure = (cell.outputs[0].data for cell in book.cells[1:5])
    assert "lm_repeat200k" in shown_run["text/html"]
    assert "<svg" in shown_run["text/html"]
    assert "overfitting (decline regime)" in verdict["text/html"]
    assert "Spectra of 8 directions" in spectrum["text/html"]
    [curves] = {len(data["data"]) for name, data in figure.items() if name == "application/vnd.plotly.v1+json"}
    assert curves >= 4
    assert book.cells[5].outputs[0].text == "False False\n"


def test_a_run_shows_its_layer_last_reading_and_curve():
    text = shown(open_run(DATA / "lm_repeat200k.jsonl"))
    assert "lm_repeat200k.jsonl" in text
    assert "150, steps 0 to 1,490" in text
    assert "step 1,490" in text


def test_undefined_readings_are_gaps_and_are_counted(tmp_path):
    lars = [0.5, 0.6, None, 0.6, 0.5]
    run = write(
        tmp_path / "run.jsonl",
        [{"step": i, "lar": lar, "reason": None if lar else "inputs are zero"} for i, lar in enumerate(lars)],
    )
    assert "1 readings" in shown(run)
    assert len(re.findall("<polyline", run._repr_html_())) == 2
    last = write(tmp_path / "last.jsonl", [{"step": 0, "lar": None, "reason": "inputs are zero"}])
    assert "- at the last (inputs are zero)" in shown(last)
    assert "<svg" not in last._repr_html_()


def test_no_extreme_of_a_long_run_is_lost(tmp_path):
    values = [0.5] * 5000
    values[1234], values[4321] = 0.123, 0.987
    run = write(tmp_path / "run.jsonl", [{"step": i, "lar": lar} for i, lar in enumerate(values)])
    html = run._repr_html_()
    assert ">0.987<" in html
    assert ">0.123<" in html
    assert len(html) < 20_000


def test_a_run_that_is_empty_damaged_or_not_read_yet_says_so(tmp_path, write_run, monkeypatch):
    empty = write_run(lars=[])
    assert "none yet" in shown(empty)
    damaged = write_run("damaged")
    with (damaged.path / "readings.jsonl").open("a") as log:
        log.write("nonsense\n{}\n")
    assert "damaged:" in shown(open_run(damaged.path))
    with pytest.raises(RunError):
        open_run(damaged.path).plot()
    monkeypatch.setattr("logalign.notebook.SHOWN_AT_ONCE", 10)
    long = open_run(write_run("long").path)
    assert "not read yet" in shown(long)
    assert "readings" not in vars(long)
    assert len(long.readings) == 20
    assert "20, steps 0 to 190" in shown(long)


def test_names_reasons_and_layers_are_text(tmp_path, write_run):
    reading = Reading(step=1, site=HOSTILE, lar=None, reason=HOSTILE)
    assert HOSTILE in shown(Readings({HOSTILE: reading}, main=HOSTILE))
    folder = "<script>alert(1)<&script><img src=x onerror=alert(1)>"
    run = write_run(folder, sites=(HOSTILE,), meta={"main": HOSTILE})
    text = shown(run)
    assert folder in text
    assert HOSTILE in text
    verdict = Verdict(
        outcome="overfitting",
        regime="decline",
        step=3,
        since_step=1,
        reason=HOSTILE,
        suggestion=HOSTILE,
        evidence={HOSTILE: 1.0},
        basis=(HOSTILE,),
        limits=(HOSTILE,),
    )
    assert shown(verdict).count(HOSTILE) == 5
    title = run.plot().layout.title.text
    assert "<" not in title
    assert "&lt;script&gt;" in title


def test_a_verdict_shows_what_the_terminal_says():
    verdict = diagnose(DATA / "lm_repeat200k.jsonl", baseline=DATA / "lm_fresh.jsonl")
    text = shown(verdict)
    for each in (verdict.headline(), verdict.reason, verdict.suggestion, *verdict.basis, *verdict.limits):
        assert each in text
    assert SHOWN[verdict.outcome].color in verdict._repr_html_()


def test_spectra_of_any_library_show_and_undefined_ones_too():
    import torch

    weight, inputs = np.diag([3.0, 2.0, 1.0, 0.0]), np.random.default_rng(0).normal(size=(9, 4))
    found = spectra(weight, inputs)
    assert f"{found.weight_participation:.4g}" in shown(found)
    assert shown(spectra(torch.tensor(weight), torch.tensor(inputs))) == shown(found)
    assert "-" in shown(spectra(np.zeros((4, 4)), inputs))
    wide = spectra(np.random.default_rng(0).normal(size=(10, 2000)), np.random.default_rng(1).normal(size=(5, 2000)))
    assert len(wide._repr_html_()) < 12_000


def test_plot_draws_what_was_recorded(tmp_path, write_run):
    k = 64 ** (2 * (1 - 0.7))
    records = [{"step": i, "lar": 0.7, "lar_centered": 0.6, "effective_dim": k, "val_loss": 2.0} for i in range(9)]
    run = write(tmp_path / "run.jsonl", records)
    figure = run.plot()
    curves = {curve.name: curve for curve in figure.data}
    assert set(curves) == {"LAR, plain", "LAR, centered", "k", "loss, held out"}
    columns = run.columns()
    np.testing.assert_array_equal(curves["LAR, plain"].y, columns["lar"])
    np.testing.assert_array_equal(curves["k"].x, columns["step"])
    assert figure.layout.yaxis2.type == "log"
    two = write_run("two", sites=("unembedding", "layer"))
    assert two.plot(site="layer").layout.title.text.endswith(": layer")
    with pytest.raises(InputError, match="expected readings of the layer 'none', found layer, unembedding"):
        two.plot(site="none")
    none = write_run("undefined", lars=[None, None])
    assert none.plot().layout.title.text.endswith("undefined: unembedding")
    with pytest.raises(InputError):
        write_run("empty", lars=[]).plot()


def test_plot_draws_drift_first_with_its_band_its_gaps_and_a_line_at_zero(tmp_path):
    run = open_run(write_log(tmp_path / "run.jsonl", gaps=[30]))
    figure = run.plot()
    band, curve = figure.data[:2]
    assert [each.name for each in figure.data] == [None, "drift (nats a pass)", "LAR, plain", "loss, training"]
    columns = run.columns()
    np.testing.assert_array_equal(curve.y, columns["drift"])
    low, high = (columns["drift"] + side * 2 * columns["drift_error"] for side in (-1, 1))
    expected = [*high[12:30], *low[12:30][::-1], np.nan, *high[31:], *low[31:][::-1], np.nan]
    np.testing.assert_allclose(np.array(band.y, dtype=float), expected)
    assert [(shape.y0, shape.y1, shape.yref) for shape in figure.layout.shapes] == [(0, 0, "y")]
    without = write(tmp_path / "without.jsonl", [{"step": i, "lar": 0.5} for i in range(9)]).plot()
    assert [each.name for each in without.data] == ["LAR, plain"]
    assert not without.layout.shapes


def test_a_run_shows_drift_where_its_last_reading_has_it(tmp_path):
    log = write_log(tmp_path / "run.jsonl")
    last = open_run(log).readings[-1]
    assert f"{last.drift:.3f} ± {last.drift_error:.3f} nats a pass" in shown(open_run(log))
    assert "nats a pass" not in shown(open_run(write_log(tmp_path / "gap.jsonl", gaps=[59])))


def test_plot_of_a_long_run_keeps_its_extremes(tmp_path):
    values = [0.5] * 50_000
    values[12345] = 0.9
    run = write(tmp_path / "run.jsonl", [{"step": i, "lar": lar} for i, lar in enumerate(values)])
    [curve] = run.plot().data
    assert len(curve.y) <= 2000
    assert curve.x[np.argmax(curve.y)] == 12345


def test_without_plotly_the_command_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r'run\.plot\(\) needs plotly.*: pip install "logalign\[report\]"'):
        logalign.open_run(DATA / "lm_fresh.jsonl").plot()
