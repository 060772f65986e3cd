import io

from rich.console import Console

from logalign.diagnosis.outcome import OUTCOMES, SHOWN
from logalign.diagnosis.verdict import Verdict
from logalign.report.terminal import print_verdict


def printed(verdict, *, width=60, verbose=False, **options):
    file = io.StringIO()
    console = Console(file=file, width=width, **options)
    print_verdict(verdict, name="runs/[first]", console=console, verbose=verbose)
    return file.getvalue()


def verdict(**fields):
    given = {
        "outcome": "overfitting",
        "regime": "decline",
        "step": 1490,
        "since_step": 670,
        "reason": "LAR is 0.067 below the baseline, more than the 0.035 that mark overfitting.",
        "suggestion": "Stop.",
        "evidence": {"deviation": 0.0667, "epoch": 15.37, "head_norm_growth": None},
        "basis": ("plain LAR [of one run]",),
        "limits": ("first", "second"),
    }
    return Verdict(**(given | fields))


def test_all_of_a_verdict_is_printed_and_wrapped():
    lines = [line.rstrip() for line in printed(verdict(), verbose=True).splitlines()]
    assert lines == [
        "runs/[first]: overfitting (decline regime) at step 1,490, since step 670",
        "why: LAR is 0.067 below the baseline, more than the 0.035",
        "     that mark overfitting.",
        "what to do: Stop.",
        "",
        "evidence    value",
        "deviation  0.0667",
        "epoch       15.37",
        "",
        "rests on",
        "- plain LAR [of one run]",
        "",
        "limits",
        "- first",
        "- second",
    ]


def test_numbers_and_limits_are_printed_only_where_they_are_asked_for():
    assert printed(verdict()).splitlines()[-1].rstrip() == "what to do: Stop."


def test_what_is_not_there_takes_no_lines():
    text = printed(verdict(evidence={}, basis=(), limits=()), verbose=True)
    assert "evidence" not in text
    assert "rests on" not in text
    assert "limits" not in text


def test_colors_only_on_a_terminal():
    assert "\x1b[" not in printed(verdict())
    assert "\x1b[1;31moverfitting" in printed(verdict(), force_terminal=True, color_system="standard")
    assert set(SHOWN) == set(OUTCOMES)
