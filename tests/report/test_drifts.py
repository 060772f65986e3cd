import pytest

from logalign import open_run
from logalign.common.markup import measured
from logalign.diagnosis.ranking import rank
from logalign.report.drifts import FALLS, LEVEL, RISES, Drift, drifts_of
from logalign.runs.reading import Reading
from tests.drifts import write_log


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-0.03127, 0.01024, "-0.031 ± 0.010"),
        (0.5, 0.25, "0.50 ± 0.25"),
        (12.3, 25.0, "12 ± 25"),
        (1e-9, 1e-9, "0.000000 ± 0.000000"),
        (0.1234567, None, "0.1235"),
        (0.1234567, 0.0, "0.1235"),
    ],
)
def test_a_number_has_the_digits_of_its_error(value, error, expected):
    assert measured(value, error) == expected


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.021, 0.01, RISES),
        (-0.021, 0.01, FALLS),
        (0.019, 0.01, LEVEL),
        (-0.019, 0.01, LEVEL),
        (0.0, None, FALLS),
        (1e-3, None, RISES),
    ],
)
def test_a_direction_is_told_beyond_two_errors(value, error, expected):
    assert Drift(value=value, error=error).direction == expected


def test_a_reading_without_drift_has_none():
    assert Drift.of(Reading(step=0, lar=0.5, drift_error=0.1)) is None
    assert Drift.of(None) is None
    assert Drift.of(Reading(step=0, lar=0.5, drift=0.0)) == Drift(value=0.0)


def test_runs_are_given_drift_at_the_last_reading_up_to_where_they_are_compared(tmp_path):
    runs = [
        open_run(write_log(tmp_path / "long.jsonl", of=60)),
        open_run(write_log(tmp_path / "short.jsonl", of=40, seed=1)),
        open_run(write_log(tmp_path / "gap.jsonl", of=60, gaps=[39])),
    ]
    ranking = rank(runs)
    found = dict(zip([each.run for each in ranking.runs], drifts_of(ranking), strict=True))
    assert found == {run.name: Drift.of(run.readings[39]) for run in runs}
    assert found[runs[2].name] is None
    assert found[runs[0].name] != Drift.of(runs[0].readings[-1])
