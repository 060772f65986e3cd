import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from logalign.errors import InputError
from logalign.report import interactive
from logalign.report.run_report import write_run_report


def scripts(html: str) -> list[tuple[str, str]]:
    """(attributes, content) of every script element, as an HTML parser cuts them."""
    return re.findall(r"<script([^>]*)>(.*?)</script>", html, flags=re.DOTALL)


def test_only_two_scripts_can_run_and_nothing_is_loaded(write_run, tmp_path):
    html = write_run_report([write_run()], tmp_path / "report.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    policy = policy.replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy
    assert "http:" not in policy
    (data, _), (packed, library), (own, code) = scripts(html)
    assert "application/json" in data
    assert "text/plain" in packed
    assert own == ""
    unpacked = gzip.decompress(base64.b64decode(library)).decode()
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    assert allowed == [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in (code, unpacked)]
    assert not re.search(r'(src|href)="(?!data:|#)', re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL))


def test_data_end_no_script_whatever_stands_in_them():
    hostile = "</script><script>x()</script><!-- & ]]> \u2028"
    text = interactive.embedded_json({hostile: [hostile]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {hostile: [hostile]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        interactive.embedded_json([float("nan")])


def test_the_same_run_is_the_same_bytes(write_run, tmp_path):
    run = write_run()
    first, second = (write_run_report([run], tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_figures_are_written_at_paper_quality(write_run, tmp_path):
    run = write_run(val_loss=3.0, sites=("unembedding", "blocks.0"))
    write_run_report([run], tmp_path / "report.html", figures=tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"lar.png", "lar.svg", "loss.png", "effective_dim.svg", "outcome.png", "layers.svg"} <= names
    assert {name.rsplit(".")[0] for name in names if name.endswith("png")} == {
        name.rsplit(".")[0] for name in names if name.endswith("svg")
    }
    with Image.open(tmp_path / "figures" / "lar.png") as image:
        assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert image.width == 7.5 * 300


def test_figures_that_cannot_be_written_are_one_clear_error(write_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write figures into .*choose another folder"):
        write_run_report([write_run()], tmp_path / "report.html", figures=tmp_path / "file")


def test_missing_plotly_is_named_with_the_command_that_installs_it():
    code = (
        "import sys; sys.modules['plotly'] = None\n"
        "from logalign.report.interactive import plotly_script\n"
        "plotly_script()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert 'a report needs plotly: pip install "logalign[report]"' in done.stderr


def test_template_and_script_are_shipped_beside_the_module():
    folder = Path(interactive.__file__).parent
    assert (folder / "report.html").is_file()
    assert (folder / "report.js").is_file()
