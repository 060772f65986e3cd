"""A demo's folder: runs of different settings never mix, and nothing of the user's is removed."""

import pytest

from logalign.demos.folder import check, claim
from logalign.errors import InputError, RunError

SETTINGS = {"steps": 10, "noise": 0.4}


def claimed(out):
    claim(out, demo="label-noise", settings=SETTINGS, runs=["clean"])
    (out / "clean").mkdir()
    (out / "clean" / "readings.jsonl").write_text("{}\n")
    (out / "report.html").write_text("old")


def test_the_same_settings_may_come_back(tmp_path):
    out = tmp_path / "deep" / "demo"
    claimed(out)
    claim(out, demo="label-noise", settings=dict(SETTINGS), runs=["clean"])
    assert (out / "clean" / "readings.jsonl").exists()


def test_other_settings_are_named(tmp_path):
    claimed(tmp_path / "demo")
    with pytest.raises(InputError, match=r"other settings: noise 0\.4 there and 0\.2 here; begin anew with --fresh"):
        claim(tmp_path / "demo", demo="label-noise", settings={"steps": 10, "noise": 0.2}, runs=["clean"])


def test_fresh_removes_what_the_demo_wrote_and_nothing_else(tmp_path):
    out = tmp_path / "demo"
    claimed(out)
    (out / "notes.txt").write_text("mine")
    claim(out, demo="label-noise", settings={"steps": 10, "noise": 0.2}, runs=["clean"], fresh=True)
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "notes.txt"]
    with pytest.raises(InputError, match=r"noise 0\.2 there and 0\.4 here"):
        check(out, demo="label-noise", settings=SETTINGS)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="expected a new or empty folder, found other files in it"):
        claim(tmp_path, demo="label-noise", settings=SETTINGS, runs=["clean"], fresh=fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("fresh", [False, True])
def test_the_folder_of_another_demo_is_left_alone(tmp_path, fresh):
    claimed(tmp_path / "demo")
    with pytest.raises(InputError, match="expected the demo grokking, found the demo label-noise"):
        claim(tmp_path / "demo", demo="grokking", settings=SETTINGS, runs=["clean"], fresh=fresh)
    assert (tmp_path / "demo" / "clean").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(InputError, match="expected a folder for the demo, found a file"):
        check(tmp_path / "demo", demo="label-noise", settings=SETTINGS)


def test_a_damaged_record(tmp_path):
    (tmp_path / "demo.json").write_text('{"demo": ')
    with pytest.raises(RunError, match="found damage"):
        check(tmp_path, demo="label-noise", settings=SETTINGS)


def test_check_writes_nothing(tmp_path):
    check(tmp_path / "demo", demo="label-noise", settings=SETTINGS)
    assert not (tmp_path / "demo").exists()
