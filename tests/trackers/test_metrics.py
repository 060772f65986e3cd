"""The table of docs/trackers.md and the code name the same numbers."""

import re
from pathlib import Path

from logalign.diagnosis.detector import Detector
from logalign.diagnosis.outcome import OUTCOMES, SHOWN
from logalign.runs.reading import REVISIT_FIELDS, Reading, Readings
from logalign.trackers.metrics import (
    JUDGED,
    LAYER,
    PREFIX,
    REVISITS,
    STEP,
    TRAINING,
    VERDICT_TEXT,
    metrics,
)
from tests.drifts import NO_DRIFT_YET, revisit_fields

PAGE = Path(__file__).parent.parent.parent / "docs" / "trackers.md"


def rows():
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]


def test_the_page_has_every_name_in_the_order_of_the_code():
    named = [row[0].strip("`") for row in rows() if re.fullmatch(rf"`{PREFIX}\w+`", row[0]) and len(row) == 3]
    expected = [*(PREFIX + name for name in (*LAYER, *TRAINING, *REVISITS, *JUDGED, "verdict")), VERDICT_TEXT, STEP]
    assert named == expected
    assert len(LAYER) == 11, "the page says how many names other layers have"


def test_the_page_has_the_codes_of_verdicts():
    codes = {row[1]: int(row[0]) for row in rows() if re.fullmatch(r"-?\d", row[0])}
    assert codes == {outcome: shown.code for outcome, shown in SHOWN.items()}
    assert set(codes) == set(OUTCOMES)


def test_drift_is_shown_once_with_the_main_layer_and_left_out_where_there_is_none():
    fields = revisit_fields(9, 10)
    assert set(fields) == set(REVISITS) == {name for name in REVISIT_FIELDS if name != "drift_reason"}
    main, other = Reading(step=20, lar=0.5, **fields), Reading(step=20, lar=0.4, site="other", **fields)
    values = metrics(Readings({"unembedding": main, "other": other}, main="unembedding"), Detector().verdict)
    assert {name: value for name, value in values.items() if name.rpartition("/")[2] in REVISITS} == {
        PREFIX + name: value for name, value in fields.items()
    }
    early = Reading(step=20, lar=0.5, drift_reason=NO_DRIFT_YET, revisited=0)
    values = metrics(Readings({"unembedding": early}, main="unembedding"), Detector().verdict)
    assert set(values) == {PREFIX + "lar", PREFIX + "revisited", PREFIX + "verdict"}
