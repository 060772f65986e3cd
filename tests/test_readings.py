"""Readings: from energies to a line of strict JSON and back."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logalign import Energies, Reading, Readings
from logalign.errors import InputError
from logalign.runs.reading import FIELDS, reading_of_record

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**53)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
names = st.text("abc_xyz", min_size=1).filter(lambda name: name not in FIELDS)


def maybe(strategy):
    return st.none() | strategy


spectral = st.none() | st.tuples(numbers, numbers, numbers)


@st.composite
def readings(draw):
    plain = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim")
    fields = {name: draw(maybe(numbers)) for name in (*plain, "time", "kept", "epoch", "loss", "lr")}
    fields |= {name: draw(maybe(counts)) for name in ("n", "m", "tokens", "tokens_seen", "nonfinite")}
    found = draw(spectral)
    if found is not None:
        fields |= dict(zip(("weight_participation", "input_participation", "coherence"), found, strict=True))
    energies = {name: draw(maybe(numbers)) for name in ("weight", "input", "output")}
    return Reading(
        step=draw(counts),
        site=draw(texts),
        reason=draw(maybe(texts)),
        energies=draw(maybe(st.just(energies))),
        extra=draw(st.dictionaries(names, maybe(numbers), max_size=3)),
        **fields,
    )


@given(readings())
def test_a_reading_survives_its_line(reading):
    line = reading.line()
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert line.isascii()
    record = json.loads(line, parse_constant=pytest.fail)
    assert reading_of_record(record) == reading


def test_a_line_has_the_fields_of_the_format():
    record = Reading(step=3, lar=0.5, extra={"val_loss": 2.0}).record()
    assert list(record) == [
        "step", "site", "lar", "lar_vocab_centered", "lar_token_centered", "lar_centered", "effective_dim", "energies",
        "time", "n", "m", "tokens", "tokens_seen", "kept", "epoch", "loss", "loss_mean", "lr", "nonfinite", "reason",
        "val_loss",
    ]  # fmt: skip
    spectral = replace(Reading(step=3, lar=0.5), weight_participation=2.0, input_participation=3.0, coherence=0.5)
    assert set(spectral.record()) - set(record) == {"weight_participation", "input_participation", "coherence"}


def test_no_line_holds_a_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        Reading(step=0, lar=math.nan).line()


def test_from_energies():
    rng = np.random.default_rng(0)
    energies = Energies.of(rng.normal(size=(7, 5)), rng.normal(size=(4, 5)))
    reading = Reading.from_energies(energies, softmax=True, step=3, site="unembedding", loss=1.5)
    for name in (
        "lar",
        "lar_vocab_centered",
        "lar_token_centered",
        "lar_centered",
        "effective_dim",
        "n",
        "m",
        "tokens",
    ):
        assert getattr(reading, name) == getattr(energies, name), name
    assert reading.energies == {"weight": energies.weight, "input": energies.input, "output": energies.output}
    assert (reading.step, reading.loss, reading.reason, reading.nonfinite) == (3, 1.5, None, 0)
    hidden = Reading.from_energies(energies, softmax=False, step=3)
    assert (hidden.lar_vocab_centered, hidden.lar_centered) == (None, None)
    assert hidden.lar_token_centered == energies.lar_token_centered


def test_what_is_undefined_is_none_with_its_reason():
    inputs = np.ones((4, 5))
    inputs[1, 2] = np.nan
    reading = Reading.from_energies(Energies.of(np.ones((7, 5)), inputs), softmax=True, step=0)
    assert (reading.lar, reading.lar_centered, reading.effective_dim) == (None, None, None)
    assert reading.energies == {"weight": 35.0, "input": None, "output": None}
    assert (reading.nonfinite, reading.reason) == (1, "1 rows of weight, inputs or outputs hold a NaN or an infinity")
    json.loads(reading.line(), parse_constant=pytest.fail)


def test_records_of_other_programs():
    reading = reading_of_record({"step": 5.0, "lar": 0.5, "val_loss": 3, "n": 128.0, "note": "text", "ok": True})
    assert reading == Reading(step=5, lar=0.5, n=128, extra={"val_loss": 3})
    assert type(reading.step) is int
    assert type(reading.n) is int
    assert reading_of_record({"step": 0, "lar": math.nan, "loss": math.inf}) == Reading(step=0, lar=None)
    assert reading_of_record({"step": 0, "lar": None, "energies": None, "site": None}).site == "unembedding"


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({}, "expected a field 'step', found nothing"),
        ({"step": 1, "loss": 2.0}, "expected a field 'lar', found loss, step"),
        ({"step": -1, "lar": 0.5}, "step: expected a whole number from 0 on, found -1"),
        ({"step": 1.5, "lar": 0.5}, "step: expected a whole number from 0 on, found 1.5"),
        ({"step": None, "lar": 0.5}, "step: expected a whole number from 0 on, found None"),
        ({"step": math.inf, "lar": 0.5}, "step: expected a whole number from 0 on, found inf"),
        ({"step": True, "lar": 0.5}, "step: expected a number or null, found True"),
        ({"step": 1, "lar": "0.5"}, "lar: expected a number or null, found '0.5'"),
        ({"step": 1, "lar": 0.5, "site": 3}, "site: expected text or null, found 3"),
        ({"step": 1, "lar": 0.5, "energies": 3}, "energies: expected an object with weight, input, output, found 3"),
        (
            {"step": 1, "lar": 0.5, "energies": {"weight": 1.0, "input": 2.0, "output": "3"}},
            "energies.output: expected a number or null, found '3'",
        ),
    ],
)
def test_records_that_are_no_readings(record, text):
    with pytest.raises(InputError) as caught:
        reading_of_record(record)
    assert str(caught.value) == text


def test_readings_of_one_step():
    main, other = Reading(step=3, lar=0.5), Reading(step=3, lar=0.25, site="body")
    found = Readings({"unembedding": main, "body": other}, main="unembedding")
    assert found.main is main
    assert found["body"] is other
    assert (found.step, len(found), list(found)) == (3, 2, ["unembedding", "body"])
    assert repr(found) == "Readings(step 3; unembedding: lar 0.5, body: lar 0.25)"


def test_a_reading_cannot_be_changed():
    with pytest.raises(AttributeError):
        Reading(step=0, lar=0.5).lar = 0.6
