"""The table of docs/trackers.md and the code name the same numbers."""

import re
from pathlib import Path

from logalign.diagnosis.verdict import OUTCOMES
from logalign.trackers.metrics import JUDGED, LAYER, PREFIX, STEP, TRAINING, VERDICT_CODES, VERDICT_TEXT

PAGE = Path(__file__).parent.parent.parent / "docs" / "trackers.md"


def rows():
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ")
    ]


def test_the_page_has_every_name_in_the_order_of_the_code():
    named = [row[0].strip("`") for row in rows() if re.fullmatch(rf"`{PREFIX}\w+`", row[0]) and len(row) == 3]
    expected = [*(PREFIX + name for name in (*LAYER, *TRAINING, *JUDGED, "verdict")), VERDICT_TEXT, STEP]
    assert named == expected
    assert len(LAYER) == 11, "the page says how many names other layers have"


def test_the_page_has_the_codes_of_verdicts():
    codes = {row[1]: int(row[0]) for row in rows() if re.fullmatch(r"-?\d", row[0])}
    assert codes == dict(VERDICT_CODES)
    assert set(codes) == set(OUTCOMES)
