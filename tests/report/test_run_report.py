import functools
import html
import json
import re
from pathlib import Path

import numpy as np
import pytest

from logalign import open_run
from logalign.errors import InputError, RunError
from logalign.report.folded import fold
from logalign.report.run_report import write_run_report
from tests.drifts import write_log


def text_of(path: Path) -> str:
    """The words of a page, without tags, styles and figures."""
    page = re.sub(r"<(style|svg|script).*?</\1>", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def test_report_of_one_run_names_the_layer_and_the_numbers(write_run, tmp_path):
    run = write_run("first")
    text = text_of(write_run_report([run.path], tmp_path / "report.html"))
    assert "Log-alignment ratio: first" in text
    assert "LAR was 0.500 at step 0 and 0.690 at step 190." in text
    assert "Layer lm_head (Linear, 512 × 64 outputs × inputs)" in text
    assert "How it was found GPT.get_output_embeddings()" in text
    assert "Weight tied to embedding.weight" in text
    assert "Loss mask forward argument 'labels'" in text
    assert "Readings 20, steps 0 to 190, one every 10 steps" in text
    assert "Undefined readings none" in text
    assert "Non-finite rows 0" in text
    assert "Share of tokens kept by the mask 90.0% in the median, 90.0% at the lowest" in text
    assert "Resumed never" in text
    assert "Warnings none" in text
    assert "Settings lr = 0.001" in text
    assert "Started 2023-11-14 22:13 UTC" in text
    assert "decline regime" in text
    assert "Why" in text
    assert "What to do" in text
    assert "slingshots" in text


def test_undefined_readings_are_counted_with_their_reasons(write_run, tmp_path):
    run = write_run(lars=[0.5, None, 0.6, None])
    text = text_of(write_run_report([run], tmp_path / "report.html"))
    assert "Undefined readings 2: the outputs hold NaN" in text
    assert "Non-finite rows 4" in text


def test_resumes_and_warnings_are_told(write_run, tmp_path):
    run = write_run()
    size = (run.path / "readings.jsonl").stat().st_size
    with (run.path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "resume", "time": 1.0, "step": 200, "readings_offset": size}) + "\n")
        file.write(json.dumps({"event": "warning", "time": 1.0, "step": 30, "message": "no mask <seen>"}) + "\n")
    text = text_of(write_run_report([run.path], tmp_path / "report.html"))
    assert "Resumed at step 200" in text
    assert "Warnings no mask <seen>" in text


def test_a_run_without_an_unembedding_is_about_its_main_site(write_run, tmp_path):
    run = write_run(sites=("blocks.0", "blocks.1"), meta={"main": "blocks.1"})
    assert "Site blocks.1" in text_of(write_run_report([run], tmp_path / "report.html"))


def test_a_run_with_no_defined_reading_is_reported_so(write_run, tmp_path):
    text = text_of(write_run_report([write_run(lars=[None, None])], tmp_path / "report.html"))
    assert "None of the 2 readings is defined" in text
    assert "undecidable" in text


def test_extremes_inside_the_run_are_said(write_run, tmp_path):
    text = text_of(write_run_report([write_run(lars=[0.5, 0.8, 0.4, 0.6])], tmp_path / "report.html"))
    assert "LAR was 0.500 at step 0 and 0.600 at step 30 (highest 0.800 at step 10, lowest 0.400 at step 20)." in text


def test_several_runs_are_laid_over_each_other_and_told_apart(write_run, tmp_path):
    runs = [write_run("a/run"), write_run("b/run", lars=[0.5, 0.4, 0.3])]
    page = write_run_report([run.path for run in runs], tmp_path / "report.html")
    text = text_of(page)
    assert "Log-alignment ratio: 2 runs" in text
    assert "LAR was 0.500 at step 0 and 0.690 at step 190." in text
    assert "LAR was 0.500 at step 0 and 0.300 at step 20." in text


def test_several_layers_get_a_figure_and_a_table(write_run, tmp_path):
    run = write_run(sites=("blocks.0.mlp", "unembedding"))
    text = text_of(write_run_report([run], tmp_path / "report.html"))
    assert "Site unembedding" in text
    assert "unembedding lm_head 512 × 64 190 0.69" in text
    assert "blocks.0.mlp blocks.0.mlp 512 × 64 190 0.69" in text


def test_plain_csv_file_is_enough(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("step,lar\n0,0.5\n10,0.55\n")
    text = text_of(write_run_report([log], tmp_path / "report.html"))
    assert "LAR was 0.500 at step 0 and 0.550 at step 10." in text
    assert "Non-finite rows not recorded" in text


def test_losses_are_drawn_where_they_were_recorded(write_run, tmp_path):
    with_loss = write_run_report([write_run("with", val_loss=3.0)], tmp_path / "with.html").read_text()
    without = write_run_report([write_run("without", loss=None)], tmp_path / "without.html").read_text()
    assert "<h2>Loss</h2>" in with_loss
    assert "<h2>Loss</h2>" not in without


def test_drift_stands_above_lar_where_a_reading_has_it_and_is_explained(write_run, tmp_path):
    log = write_log(tmp_path / "run.jsonl")
    page = write_run_report([log], tmp_path / "with.html", figures=tmp_path / "figures").read_text()
    assert 0 < page.index("<h2>Drift</h2>") < page.index("<h2>Log-alignment ratio</h2>")
    text = text_of(tmp_path / "with.html")
    assert (
        "Above zero, training on other samples raises a sample's loss; below zero, it still carries over to it" in text
    )
    assert "Passes over the data 10" in text
    assert {"drift.png", "drift.svg"} <= {path.name for path in (tmp_path / "figures").iterdir()}
    without = write_run_report([write_run("without")], tmp_path / "without.html").read_text()
    assert "<h2>Drift</h2>" not in without
    assert '"drift' not in without
    assert "Passes over the data" not in text_of(tmp_path / "without.html")


def test_several_runs_have_drift_in_their_table(write_run, tmp_path):
    runs = [write_log(tmp_path / "run.jsonl"), write_run("without").path]
    text = text_of(write_run_report(runs, tmp_path / "both.html"))
    last = open_run(runs[0]).readings[-1]
    assert "centered k drift (nats a pass) run.jsonl" in text
    assert f"{last.drift:.3f} ± {last.drift_error:.3f} without" in text


def test_bad_runs_are_one_clear_error(write_run, tmp_path):
    out = tmp_path / "report.html"
    run = write_run()
    with pytest.raises(InputError, match="expected 1 to 8 runs"):
        write_run_report([], out)
    with pytest.raises(InputError, match="the same one given twice"):
        write_run_report([run, run.path], out)
    with pytest.raises(RunError, match="found nothing there"):
        write_run_report([tmp_path / "none"], out)
    with pytest.raises(InputError, match="at least one reading"):
        write_run_report([write_run("empty", lars=[])], out)
    assert not out.exists()


ODD = {
    "no number": ['{"step": 0, "lar": NaN}', '{"step": 1, "lar": 1e999}', '{"step": 2, "lar": 0.5}'],
    "huge": ['{"step": 1, "lar": -1e30, "n": 64, "loss": 1e300}', '{"step": 9223372036854775807, "lar": 5, "n": 64}'],
    "zero": [json.dumps({"step": i, "lar": 0.5 + i / 100, "n": 0, "effective_dim": 0, "loss": 0}) for i in range(30)],
    "one input": [json.dumps({"step": i, "lar": 0.5, "n": 1, "m": 0}) for i in range(30)],
    "one reading": ['{"step": 3, "lar": 0.7}'],
    "steps that go back": [json.dumps({"step": i % 20, "lar": 0.5 + i / 100}) for i in range(30)],
    "another shape": [json.dumps({"step": i, "lar": 0.5 + i / 100, "n": 8 if i < 9 else 9}) for i in range(30)],
    "half a line": ['{"step": 0, "lar": 0.5}', '{"step": 1, "la'],
    "many layers": [json.dumps({"step": i, "lar": 0.5, "site": f"l{j}"}) for i in range(3) for j in range(250)],
}


@pytest.mark.parametrize("lines", ODD.values(), ids=ODD)
def test_odd_runs_are_drawn_without_a_warning(tmp_path, lines):
    log = tmp_path / "run.jsonl"
    log.write_text("\n".join(lines))
    page = write_run_report([log], tmp_path / "report.html", figures=tmp_path / "figures")
    assert "Log-alignment ratio: run.jsonl" in text_of(page)


def test_values_that_a_detector_passes_over_are_undefined_readings(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text('{"step": 0, "lar": 0.5, "effective_dim": 0}\n{"step": 1, "lar": 5.0, "effective_dim": 1e200}\n')
    page = write_run_report([log], tmp_path / "report.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert data["tables"]["r0"] == {"step": [0, 1], "lar": [0.5, None], "undefined": [None, 0.5]}


@pytest.mark.parametrize(
    "meta",
    [
        {"sites": [1], "settings": [2], "created": 1e300, "every": "x", "main": {"a": 1}, "logalign_version": {"x": 1}},
        {
            "sites": {
                "unembedding": {"module": 5, "kind": [1], "tied_to": "x", "how": {"a": 2}, "bias": "no", "mask": 7}
            }
        },
    ],
)
def test_a_description_of_other_types_is_shown_as_far_as_it_can_be(write_run, tmp_path, meta):
    assert "Facts" in text_of(write_run_report([write_run(meta=meta)], tmp_path / "report.html"))


def test_a_long_run_says_what_is_drawn_and_judged(write_run, tmp_path, monkeypatch):
    monkeypatch.setattr("logalign.report.shown.fold", functools.partial(fold, all_up_to=100, thinned_to=50))
    monkeypatch.setattr("logalign.report.run_report.ROWS", 100)
    monkeypatch.setattr("logalign.report.run_report.FEWEST_ROWS", 100)
    text = text_of(write_run_report([write_run(lars=[0.5 + i / 1000 for i in range(200)])], tmp_path / "report.html"))
    assert "The verdict was folded over 50 of 200 readings, evenly chosen" in text
    assert re.search(r"Drawn are \d+ of 200 readings", text)


def test_a_baseline_is_named_and_one_of_another_shape_refused(write_run, tmp_path):
    run, baseline = write_run("run"), write_run("baseline")
    text = text_of(write_run_report([run], tmp_path / "report.html", baseline=[baseline]))
    assert "Compared with the baseline run" in text
    with pytest.raises(InputError, match="baseline's shape"):
        write_run_report([write_run("other", n=32)], tmp_path / "report.html", baseline=[baseline])


def test_a_run_of_weights_alone_shows_weights_and_no_empty_chart(tmp_path):
    from safetensors.numpy import save_file

    from logalign.runs.reading import Reading
    from logalign.runs.writer import RunWriter

    writer = RunWriter(tmp_path / "weights", {"main": "unembedding", "sites": {}, "made_from": "checkpoints"})
    for step in (0, 10, 20):
        for site in ("unembedding", "mlp"):
            writer.append(
                Reading(
                    step=step,
                    site=site,
                    lar=None,
                    n=8,
                    m=16,
                    weight_participation=6.0 - step / 10,
                    reason="no inputs",
                    extra={"lar_bound": 0.6, "stable_rank": 3.0, "weight_norm": 2.0},
                )
            )
    writer.close()
    (tmp_path / "weights/spectra").mkdir()
    save_file({"mlp.p": np.full(8, 1 / 8)}, tmp_path / "weights/spectra/step-00000010.safetensors")
    figures = tmp_path / "figures"
    page = write_run_report([tmp_path / "weights"], tmp_path / "report.html", figures=figures)
    text = text_of(page)
    assert "what the weight alone allows at most" in text
    assert "stable rank" in page.read_text()
    assert "the map shows the spread of weights d_p" in text
    assert "activation spread d_q" not in page.read_text()
    assert "coherence c" not in page.read_text()
    assert {path.stem for path in figures.glob("*.svg")} >= {"lar", "drivers", "stable_rank", "layers", "spectra"}


def test_alarms_that_have_ended_stand_on_the_page(tmp_path):
    log = Path(__file__).parents[1] / "data" / "ft_prose_to_python.jsonl"
    page = write_run_report([log], tmp_path / "report.html").read_text()
    assert "<dt>Earlier</dt>" in page
    assert "Overfitting from step 230 to 660." in page
