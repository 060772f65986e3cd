import itertools
import json

import pytest

from logalign.diagnosis.outcome import OUTCOMES, PRECEDENCE, SHOWN
from logalign.diagnosis.verdict import Episode, Verdict, combined
from logalign.errors import InputError


def verdict(outcome="healthy", *, regime="decline", since_step=10, **fields):
    given = {"step": 40, "reason": f"{regime} reason.", "suggestion": f"{outcome} suggestion."}
    return Verdict(outcome=outcome, regime=regime, since_step=since_step, **(given | fields))


def test_record_is_strict_json_and_keeps_everything():
    found = verdict("overfitting", evidence={"a": 1, "b": None, "c": 0.5}, basis=("one",), limits=("two", "three"))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record == {
        "outcome": "overfitting",
        "regime": "decline",
        "step": 40,
        "since_step": 10,
        "is_alarm": True,
        "reason": "decline reason.",
        "suggestion": "overfitting suggestion.",
        "evidence": {"a": 1, "b": None, "c": 0.5},
        "basis": ["one"],
        "limits": ["two", "three"],
        "held_out": None,
        "earlier": [],
        "sure": None,
    }


def test_text_for_people():
    found = verdict("memorizing", regime="grokking", step=12_000, evidence={"k": 40.62345, "none": None, "steps": 1200})
    assert str(found) == (
        "memorizing (grokking regime) at step 12,000, since step 10\n"
        "why: grokking reason.\n"
        "do: memorizing suggestion.\n"
        "evidence: k = 40.62, steps = 1,200"
    )
    assert verdict("undecidable", regime="unknown", step=None, since_step=None).headline() == "undecidable"
    assert verdict(regime="loss").headline() == "healthy (without LAR) at step 40, since step 10"
    assert verdict(regime="both").headline() == "healthy (both regimes) at step 40, since step 10"


@pytest.mark.parametrize(
    ("outcome", "status", "alarm"),
    [
        ("healthy", 0, False),
        ("approaching", 0, False),
        ("generalizing", 0, False),
        ("overfitting", 3, True),
        ("memorizing", 3, True),
        ("diverged", 3, True),
        ("undecidable", 4, False),
    ],
)
def test_exit_status_and_alarm(outcome, status, alarm):
    assert (verdict(outcome).exit_status, verdict(outcome).is_alarm) == (status, alarm)


@pytest.mark.parametrize(
    ("outcome", "earlier", "status"),
    [
        ("healthy", "overfitting", 3),
        ("undecidable", "overfitting", 3),
        ("generalizing", "overfitting", 3),
        ("generalizing", "memorizing", 0),
        ("healthy", "memorizing", 3),
    ],
)
def test_an_alarm_that_has_ended_is_part_of_the_verdict(outcome, earlier, status):
    found = verdict(outcome, earlier=(Episode(earlier, 50, 1246),))
    assert found.exit_status == status
    assert found.headline().endswith(f"since step 10; earlier {earlier} from step 50 to 1,246")
    assert found.record()["earlier"] == [{"outcome": earlier, "first": 50, "last": 1246}]


def test_every_outcome_has_a_status_and_a_place():
    assert set(SHOWN) == set(PRECEDENCE) == set(OUTCOMES)
    alarms = [outcome for outcome in PRECEDENCE if verdict(outcome).is_alarm]
    assert tuple(alarms) == PRECEDENCE[: len(alarms)]


def test_what_is_refused():
    with pytest.raises(InputError) as caught:
        verdict("fine")
    assert str(caught.value) == (
        "outcome: expected one of healthy, approaching, overfitting, memorizing, generalizing, diverged, "
        "undecidable, found 'fine'"
    )
    with pytest.raises(
        InputError, match="regime: expected one of grokking, decline, both, loss, unknown, found 'auto'"
    ):
        verdict(regime="auto")
    with pytest.raises(InputError, match="evidence 'k': expected a finite number or None, found nan"):
        verdict(evidence={"k": float("nan")})


@pytest.mark.parametrize(("first", "second"), [*itertools.permutations(OUTCOMES, 2)])
def test_both_regimes_the_stronger_outcome_stands(first, second):
    grokking = verdict(first, regime="grokking", evidence={"k": 1.0}, basis=("a", "b"), limits=("x",))
    decline = verdict(second, evidence={"deviation": 2.0}, basis=("b", "c"), limits=("x", "y"), since_step=20)
    both = combined(grokking, decline)
    stronger, weaker = sorted((grokking, decline), key=lambda each: PRECEDENCE.index(each.outcome))
    assert (both.outcome, both.regime, both.since_step) == (stronger.outcome, stronger.regime, stronger.since_step)
    assert both.suggestion == stronger.suggestion
    assert both.reason == f"{stronger.reason} The {weaker.regime} regime says {weaker.outcome}: {weaker.reason}"
    assert both.evidence == {"k": 1.0, "deviation": 2.0}
    assert sorted(both.basis) == ["a", "b", "c"]
    assert sorted(both.limits) == ["x", "y"]


def test_both_regimes_of_one_mind():
    both = combined(verdict(regime="grokking", since_step=None), verdict(since_step=20))
    assert (both.outcome, both.regime, both.since_step) == ("healthy", "both", 20)
    assert both.reason == "grokking reason. And: decline reason."
    same = combined(verdict(reason="same."), verdict(reason="same.", regime="grokking"))
    assert same.reason == "same."
    nothing = verdict("undecidable", regime="unknown", step=None, since_step=None)
    assert combined(nothing, nothing).since_step is None
