import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from logalign.errors import InputError
from logalign.report.figures import lar_figure
from logalign.report.page import Section, write_page

DATA = {"step": np.arange(5), "lar": np.linspace(0.5, 0.7, 5)}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is closed and not open."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def write(path, **arguments) -> str:
    given = {"title": "A run", "lead": "It went well.", "sections": [], "facts": {}}
    return write_page(path, **(given | arguments)).read_text(encoding="utf-8")


def test_page_is_well_formed_and_says_what_it_was_given(tmp_path):
    sections = [Section("Curves", "Look.\n\n- one\n  and more\n- two", lar_figure(DATA))]
    page = Page(write(tmp_path / "page.html", sections=sections, facts={"Layer": "lm_head"}))
    text = " ".join(" ".join(page.text).split())
    for expected in ("A run", "It went well.", "Curves", "Look.", "one and more", "two", "Layer", "lm_head"):
        assert expected in text
    assert page.tags.count("li") == 2
    assert page.tags.count("svg") == 1


def test_page_loads_nothing_and_holds_no_script(tmp_path):
    html = write(tmp_path / "page.html", sections=[Section("Curves", "", lar_figure(DATA))])
    page = Page(html)
    assert "script" not in page.tags
    assert "default-src 'none'" in html
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(http" not in html
    assert "@import" not in html


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "--><script>x()</script>", "{{ 7 * 7 }}"]
)
def test_text_is_inert_wherever_it_stands(tmp_path, hostile):
    figure = lar_figure(DATA, DATA, labels=[hostile, "other"])
    figure.set_label(hostile)
    section = Section(hostile, f"{hostile}\n\n- {hostile}", figure, [{hostile: hostile}])
    html = write(tmp_path / "p.html", title=hostile, lead=hostile, sections=[section], facts={hostile: hostile})
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(hostile) == 10
    assert ("div", "aria-label", hostile) in page.attributes


def test_ids_are_unique_over_all_figures_and_every_reference_has_its_target(tmp_path):
    sections = [Section(str(i), "", lar_figure(DATA)) for i in range(3)]
    html = write(tmp_path / "page.html", sections=sections)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)) > 0
    targets = re.findall(r'href="#([^"]+)"', html) + re.findall(r"url\(#([^)]+)\)", html)
    assert targets
    assert set(targets) <= set(ids)


def test_figure_has_words_for_those_who_do_not_see_it(tmp_path):
    sections = [
        Section("Curves", "", lar_figure(DATA)),
        Section("Curves", "", lar_figure(DATA), alt="A line that rises"),
    ]
    page = Page(write(tmp_path / "page.html", sections=sections))
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    assert labels == [
        "Line chart of the log-alignment ratio over training steps, plain and centered.",
        "A line that rises",
    ]


def test_table_shows_four_digits_and_a_dash_for_what_is_missing(tmp_path):
    rows = [
        {"run": "a", "LAR": 0.123456, "steps": 12_345, "tied": True},
        {"run": "b", "LAR": float("nan"), "steps": np.int64(7), "k": np.float32(2.5)},
    ]
    html = write(tmp_path / "page.html", sections=[Section("Runs", "", table=rows)])
    header = re.findall(r"<th[^>]*>([^<]*)</th>", html)
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", html)
    assert header == ["run", "LAR", "steps", "tied", "k"]
    assert cells == ["a", "0.1235", "12,345", "yes", "–", "b", "–", "7", "–", "2.5"]


def test_the_same_page_is_the_same_bytes(tmp_path):
    first, second = (
        write(tmp_path / name, sections=[Section("Curves", "", lar_figure(DATA))]) for name in ("a.html", "b.html")
    )
    assert first == second


def test_older_page_is_replaced_and_folders_are_made(tmp_path):
    path = tmp_path / "deep" / "er" / "page.html"
    write(path, title="first")
    assert "second" in write(path, title="second")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_one_clear_error(tmp_path):
    with pytest.raises(InputError, match="is a folder: give a name such as"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*page\.html: .*choose another place"):
        write(tmp_path / "file" / "page.html")


@pytest.mark.parametrize(("package", "module"), [("matplotlib", "figures"), ("jinja2", "page"), ("matplotlib", "page")])
def test_missing_package_is_named_with_the_command_that_installs_it(package, module):
    code = f"import sys; sys.modules[{package!r}] = None; import logalign.report.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("logalign.errors.MissingExtraError")
    assert 'pip install "logalign[report]"' in last


def test_template_is_shipped_beside_the_module():
    import logalign.report

    assert (Path(logalign.report.__file__).parent / "page.html").is_file()
