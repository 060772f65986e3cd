"""`logalign spectra` as it is typed: tables, JSON, runs, and one line for each mistake."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import logalign
from logalign.checkpoints import spectra_of
from logalign.cli import app
from tests.checkpoints.conftest import gpt2, llama


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """Run `logalign spectra` in a folder of its own, on a terminal of a known width."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "dumb")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, ["spectra", *map(str, arguments)])


@pytest.fixture
def series(saved):
    for seed, step in enumerate((20, 100)):
        saved(llama(seed), f"run/checkpoint-{step}")
    return "run"


def cells(line):
    return line.split()


def test_the_head_of_one_checkpoint(cli, saved):
    saved(gpt2(), "small")
    result = cli("small")
    assert result.exit_code == 0
    (head,) = spectra_of("small").weights
    lines = result.stdout.splitlines()
    assert lines[:2] == [
        "small: a safetensors file, GPT2LMHeadModel, stored as F32",
        "head: transformer.wte.weight (the embedding 'wte', which the head is tied to: config.json says "
        "tie_word_embeddings)",
    ]
    assert [cells(line) for line in lines[2:5]] == [
        ["stable", "LAR"],
        ["weight", "m", "x", "n", "norm", "d_p", "rank", "at", "most"],
        [
            "transformer.wte",
            "290",
            "x",
            "16",
            f"{head.norm:.4g}",
            f"{head.participation:.1f}",
            f"{head.stable_rank:.1f}",
            f"{head.lar_bound:.3f}",
        ],
    ]
    for expected in ("participation ratio", "no inputs can align better than this", "LAR itself needs inputs: --text"):
        assert expected in result.stdout


def test_every_weight(cli, saved):
    saved(gpt2(), "small")
    result = cli("small", "--all")
    assert "8 stored as [n, m] (Conv1D), shown as m x n" in result.stdout
    assert "left out: 18 of other than two axes" in result.stdout
    assert ["transformer.h.1.mlp.c_proj", "16", "x", "64"] in [cells(line)[:4] for line in result.stdout.splitlines()]


def test_a_series_is_one_table_and_a_run(cli, series):
    result = cli(series, "-o", "weights")
    assert result.exit_code == 0
    assert [cells(line)[:2] for line in result.stdout.splitlines()[4:6]] == [
        ["20", "checkpoint-20"],
        ["100", "checkpoint-100"],
    ]
    assert result.stdout.endswith("run: weights (draw it with: logalign report weights)\n")
    run = logalign.open_run("weights")
    assert [reading.step for reading in run.readings] == [20, 100]
    assert cli("run/checkpoint-100", "run/checkpoint-20", "-o", "turned").exit_code == 0
    assert [reading.step for reading in logalign.open_run("turned").readings] == [20, 100]
    assert run.meta["settings"]["checkpoints"] == ["run/checkpoint-20", "run/checkpoint-100"]
    assert run.meta["model"] == "LlamaForCausalLM"


def test_checkpoints_with_heads_of_other_names_have_a_table_each(cli, series, saved):
    saved(gpt2(), "small")
    result = cli("run/checkpoint-20", "small")
    assert result.stdout.count("\nhead: ") == 2
    assert cli("run/checkpoint-20", "run/checkpoint-100").stdout.count("\nhead: ") == 1


def test_dtypes_have_a_column_where_they_differ(cli, tmp_path):
    save_file({"lm_head.weight": torch.eye(3), "b.weight": torch.eye(3).bfloat16()}, tmp_path / "x.safetensors")
    lines = cli("x.safetensors", "--all").stdout.splitlines()
    assert lines[0] == "x.safetensors: a safetensors file"
    assert [cells(line)[:5] for line in lines[4:6]] == [["lm_head", "3", "x", "3", "F32"], ["b", "3", "x", "3", "BF16"]]


def test_json(cli, series):
    result = cli(series, "--layers", "*.up_proj", "--layers", "unembedding", "--json")
    records = json.loads(result.stdout)
    assert [record["step"] for record in records] == [20, 100]
    expected = spectra_of("run/checkpoint-20", layers=["*.up_proj", "unembedding"])
    assert records[0]["weights"] == [weight.record() for weight in expected.weights]
    assert len(records[0]["weights"]) == 3


def test_true_lar_on_a_text(cli, series, tokenizer, text):
    for step in (20, 100):
        tokenizer.save_pretrained(f"run/checkpoint-{step}")
    result = cli(series, "--text", text, "--tokens", 60, "-o", "weights")
    assert result.exit_code == 0, result.stderr
    readings = logalign.open_run("weights").readings
    for line, reading in zip(result.stdout.splitlines()[4:6], readings, strict=True):
        assert cells(line)[-2:] == [f"{reading.lar:.3f}", f"{reading.effective_dim:.1f}"]
        assert None not in (reading.lar_centered, reading.coherence, reading.weight_participation)
        assert reading.tokens == 60
    (first, _) = json.loads(cli(series, "--text", text, "--tokens", 60, "--json").stdout)
    assert first["weights"][0]["lar"] == readings[0].lar


def test_a_weight_that_is_not_finite_is_told_and_is_no_error(cli, saved):
    model = llama()
    model.lm_head.weight.data[3, 4] = torch.nan
    saved(model, "broken")
    result = cli("broken")
    assert result.exit_code == 0
    assert cells(result.stdout.splitlines()[4])[-4:] == ["-"] * 4
    assert "broken: lm_head.weight: 1 stored rows of the weight hold a NaN or an infinity\n" in result.stdout


def test_names_of_tensors_are_not_taken_for_markup(cli, tmp_path):
    save_file({"[red]x[/red].weight": torch.eye(3), "lm_head.weight": torch.eye(3)}, tmp_path / "x.safetensors")
    assert "[red]x[/red] " in cli("x.safetensors", "--all").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected a safetensors file, a folder of Transformers"),
        (["run", "nowhere"], "nowhere: expected a safetensors file"),
        (["run", "--layers", "nothing"], "expected a 2-D weight that matches 'nothing', found none; near matches: "),
        (["run", "--text", "nothing.txt"], "nothing.txt: expected a text file in UTF-8"),
        (["run", "run/checkpoint-20", "-o", "x"], "found one given twice"),
        (["run/checkpoint-20", "-o", "run/checkpoint-20/config.json"], "expected a folder that can be written"),
    ],
)
def test_a_mistake_is_one_line_and_status_1(cli, series, arguments, message):
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_safetensors_files_need_no_framework(series):
    program = (
        "import sys; from logalign.cli import app\n"
        "app(['spectra', 'run', '--all', '-o', 'weights'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_help(cli):
    result = cli("--help")
    for option in ("CHECKPOINT...", "--layers", "--all", "--text", "--model", "--tokens", "--out", "--json"):
        assert option in result.stdout
