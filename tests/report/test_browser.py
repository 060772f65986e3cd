"""The report in a real Chromium: it draws, zooms, hovers and prints, asks for nothing and runs nothing foreign."""

import base64
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from logalign.report.run_report import write_run_report
from tests.drifts import write_log

DATA = Path(__file__).parent.parent / "data"
HOSTILE = "<script>document.title = 'script ran'</script><img src=x onerror=\"document.title = 'handler ran'\">"
HOSTILE_LABEL = "<b>bold</b><a href='https://example.org'>x</a></script><script>document.title = 1</script>&amp;"
HELD = "[...document.querySelectorAll('.chart')].filter(chart => chart.id !== 'chart-spectra')"


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        if os.environ.get("CI"):
            pytest.fail("CI must have chromium and chromedriver: .ci/run installs them")
        pytest.skip("needs chromium and chromedriver on the path")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1000,1400",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield session
    finally:
        session.quit()


@pytest.fixture
def browser(session):
    session.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    color_scheme(session, "light")
    # Leave the page before, or the browser's own start page, and forget what it asked for.
    session.get("about:blank")
    for kind in ("performance", "browser"):
        session.get_log(kind)
    return session


def color_scheme(browser, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def requests_of(session) -> list[str]:
    """Every address that the page asked for, out of the browser's own log."""
    messages = [json.loads(entry["message"])["message"] for entry in session.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


def opened(browser, page: Path) -> None:
    """Open a report and wait until its charts are drawn."""
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(lambda it: it.execute_script("return document.documentElement.dataset.ready"))
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"


def ranges(browser) -> list[list[float]]:
    """The range of every step axis, to nine digits."""
    found = browser.execute_script(f"return {HELD}.map(chart => chart._fullLayout.xaxis.range)")
    return [[float(f"{end:.9g}") for end in each] for each in found]


def with_everything(write_run):
    """A run with several layers, spectra and names that want to do harm."""
    meta = {
        "sites": {"unembedding": dict.fromkeys(("module", "kind", "how", "mask"), HOSTILE) | {"tied_to": [HOSTILE]}}
    }
    lars = [0.5, None, *(0.6 - 0.001 * i + 0.002 * (i % 3) for i in range(60))]
    run = write_run(
        HOSTILE_LABEL.replace("/", "_"),
        lars=lars,
        sites=("unembedding", HOSTILE_LABEL),
        meta={**meta, "settings": {HOSTILE: HOSTILE}},
        val_loss=3.0,
        weight_participation=20.0,
        input_participation=10.0,
        coherence=0.5,
    )
    (run.path / "spectra").mkdir()
    p = np.arange(64, 0, -1.0) / 2080
    for step in (0, 100, 300):
        vectors = {f"{site}.{part}": p for site in ("unembedding", HOSTILE_LABEL) for part in "pq"}
        save_file(vectors, run.path / "spectra" / f"step-{step:08d}.safetensors")
    return run


def test_report_opens_whole_and_hostile_text_is_inert(browser, write_run, tmp_path):
    run = with_everything(write_run)
    page = write_run_report([run], tmp_path / "report.html")
    opened(browser, page)
    assert browser.title == f"Log-alignment ratio: {run.path.name}"
    assert browser.get_log("browser") == []
    asked = [url for url in requests_of(browser) if not url.startswith(("data:", "blob:"))]
    assert asked == [page.as_uri()]
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
    assert [chart.get_attribute("id").removeprefix("chart-") for chart in charts] == [
        "lar", "outcome", "effective_dim", "shares", "loss",
        "weight_participation", "input_participation", "coherence", "layers", "spectra",
    ]  # fmt: skip
    for chart in charts:
        assert chart.is_displayed()
        assert chart.size["width"] > 500
        assert chart.size["height"] > 150
        assert chart.find_elements(By.CSS_SELECTOR, "svg.main-svg")
    assert not any(figure.is_displayed() for figure in browser.find_elements(By.CSS_SELECTOR, ".static"))
    facts = browser.find_elements(By.CSS_SELECTOR, "section dl")[-1].text
    assert HOSTILE in facts
    assert browser.find_elements(By.CSS_SELECTOR, "img, main script, main svg a, main svg b") == []
    # A layer's name stands in its chart as it was given.
    names = browser.find_elements(By.CSS_SELECTOR, "#chart-layers .ytick")
    assert HOSTILE_LABEL[:14] in " ".join(name.text for name in names)
    assert [option.text for option in Select(browser.find_element(By.ID, "spectra-layer")).options][1] == HOSTILE_LABEL


def test_injected_scripts_do_not_run_even_where_escaping_failed(browser, write_run, tmp_path):
    page = write_run_report([write_run()], tmp_path / "report.html")
    broken = page.read_text().replace("<main>", f"<main>{HOSTILE}<iframe src='https://example.org/'></iframe>", 1)
    page.write_text(broken)
    opened(browser, page)
    assert browser.title == "Log-alignment ratio: run"
    told = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in told
    assert "https://example.org/" not in [url for url in requests_of(browser) if "chrome-error" not in url]


def test_zooming_one_panel_zooms_all_and_going_back_does_too(browser, tmp_path):
    page = write_run_report(
        [DATA / "lm_repeat200k.jsonl"], tmp_path / "report.html", baseline=[DATA / "lm_fresh.jsonl"]
    )
    opened(browser, page)
    (whole,) = {tuple(each) for each in ranges(browser)}
    chart = browser.find_element(By.CSS_SELECTOR, "#chart-loss .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element_with_offset(chart, -100, 5).click_and_hold().move_by_offset(
        120, 0
    ).release().perform()
    WebDriverWait(browser, 20).until(lambda it: all(tuple(each) != whole for each in ranges(it)))
    (zoomed,) = {tuple(each) for each in ranges(browser)}
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    ActionChains(browser).double_click(chart).perform()
    WebDriverWait(browser, 20).until(lambda it: {tuple(each) for each in ranges(it)} == {whole})
    # The keyboard's way back.
    browser.execute_script("Plotly.relayout(document.getElementById('chart-lar'), {'xaxis.range': [100, 200]})")
    WebDriverWait(browser, 20).until(lambda it: {tuple(each) for each in ranges(it)} == {(100.0, 200.0)})
    reset = browser.find_element(By.ID, "reset")
    assert reset.is_enabled()
    reset.send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda it: {tuple(each) for each in ranges(it)} == {whole})
    assert not reset.is_enabled()
    assert browser.get_log("browser") == []


def test_hovering_tells_the_step_and_all_forms_together(browser, tmp_path):
    opened(browser, write_run_report([DATA / "lm_repeat200k.jsonl"], tmp_path / "report.html"))
    chart = browser.find_element(By.CSS_SELECTOR, "#chart-lar .nsewdrag")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(browser).move_to_element(chart).perform()
    WebDriverWait(browser, 20).until(lambda it: it.find_elements(By.CSS_SELECTOR, "#chart-lar .hoverlayer .legend"))
    told = browser.find_element(By.CSS_SELECTOR, "#chart-lar .hoverlayer").text
    step = int(re.search(r"step ([\d,]+)", told)[1].replace(",", ""))
    (reading,) = (
        each
        for each in map(json.loads, (DATA / "lm_repeat200k.jsonl").read_text().splitlines())
        if each["step"] == step
    )
    assert f"plain: {reading['lar']:.4g}" in told
    assert f"centered (both): {reading['lar_centered']:.4g}" in told


def test_drift_is_the_first_chart_with_zero_in_sight_and_its_band_has_the_gaps_of_the_curve(browser, tmp_path):
    log = write_log(tmp_path / "run.jsonl", gaps=[16])
    below_zero = log.read_text().splitlines(keepends=True)[:20]
    log.write_text("".join(below_zero))
    opened(browser, write_run_report([log], tmp_path / "report.html"))
    charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
    assert [chart.get_attribute("id") for chart in charts][:2] == ["chart-drift", "chart-lar"]
    low, high = browser.execute_script("return document.getElementById('chart-drift')._fullLayout.yaxis.range")
    assert low < -0.3 < 0 < high
    readings = [json.loads(line) for line in below_zero]
    band, curve, gain = browser.execute_script(
        "return document.getElementById('chart-drift').data.map(({ x, y, visible }) => ({ x, y, visible }))"
    )
    assert (curve["visible"], gain["visible"]) == (True, "legendonly")
    assert curve["y"] == [each.get("drift") and float(f"{each['drift']:.7g}") for each in readings]
    first, second = [readings[i]["step"] for i in range(12, 16)], [readings[i]["step"] for i in range(17, 20)]
    assert band["x"] == [*first, *first[::-1], None, *second, *second[::-1], None]
    assert band["y"][0] == pytest.approx(readings[12]["drift"] + 2 * readings[12]["drift_error"], rel=1e-6)
    assert band["y"][7] == pytest.approx(readings[12]["drift"] - 2 * readings[12]["drift_error"], rel=1e-6)
    assert browser.get_log("browser") == []


def test_runs_are_aligned_on_what_both_recorded(browser, tmp_path):
    page = write_run_report([DATA / "lm_repeat200k.jsonl", DATA / "lm_fresh.jsonl"], tmp_path / "report.html")
    opened(browser, page)
    buttons = browser.find_elements(By.CSS_SELECTOR, "[data-axis]")
    assert [button.text for button in buttons] == ["step", "tokens", "epoch"]
    assert ranges(browser)[0][1] == pytest.approx(1490, rel=0.05)
    buttons[2].click()
    WebDriverWait(browser, 20).until(lambda it: all(each[1] < 20 for each in ranges(it)))
    assert [button.get_attribute("aria-pressed") for button in buttons] == ["false", "false", "true"]
    titles = browser.find_elements(By.CSS_SELECTOR, ".xtitle")
    assert {title.text for title in titles} == {"epoch"}


def test_slider_shows_the_spectra_of_its_step(browser, write_run, tmp_path):
    run = write_run()
    (run.path / "spectra").mkdir()
    for step, first in ((0, 0.5), (100, 0.9)):
        p = np.array([first, 1 - first])
        save_file({"unembedding.p": p, "unembedding.q": p}, run.path / "spectra" / f"step-{step:08d}.safetensors")
    opened(browser, write_run_report([run], tmp_path / "report.html"))
    shown = "return document.getElementById('chart-spectra').data.map(trace => trace.y[0])"
    assert browser.find_element(By.ID, "spectra-told").text == "step 100"
    assert browser.execute_script(shown) == [0.9, 0.9]
    browser.find_element(By.ID, "spectra-step").send_keys(Keys.ARROW_LEFT)
    WebDriverWait(browser, 20).until(lambda it: it.execute_script(shown) == [0.5, 0.5])
    assert browser.find_element(By.ID, "spectra-told").text == "step 0"


def test_report_fits_a_phone_in_light_and_dark_and_follows_a_change(browser, write_run, tmp_path):
    runs = [write_run("a" * 60), write_run("b" * 60)]
    for page in (
        write_run_report(runs, tmp_path / "two.html"),
        write_run_report([with_everything(write_run)], tmp_path / "one.html"),
    ):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        )
        color_scheme(browser, "light")
        opened(browser, page)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        charts = browser.find_elements(By.CSS_SELECTOR, ".chart")
        assert max(chart.rect["x"] + chart.rect["width"] for chart in charts) <= 390
        light = inks(browser)
        color_scheme(browser, "dark")
        WebDriverWait(browser, 20).until(lambda it, light=light: set(inks(it)).isdisjoint(light))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.get_log("browser") == []


def inks(browser) -> list[str]:
    """The colors of page and of the charts' texts."""
    charts = browser.execute_script(f"return {HELD}.map(chart => chart.layout.font.color)")
    return [browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"), *charts]


def test_print_shows_static_figures_whole(browser, write_run, tmp_path):
    color_scheme(browser, "dark")
    page = write_run_report([with_everything(write_run)], tmp_path / "report.html")
    opened(browser, page)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    # The width between the margins of a sheet of A4.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 670, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    figures = browser.find_elements(By.CSS_SELECTOR, ".static svg")
    assert len(figures) >= 8
    for figure in figures:
        assert figure.is_displayed()
        assert figure.rect["x"] + figure.rect["width"] <= 670
        assert 100 < figure.rect["height"] < 900
    assert not any(chart.is_displayed() for chart in browser.find_elements(By.CSS_SELECTOR, ".chart, .bar"))
    assert (
        browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color") == "rgba(255, 255, 255, 1)"
    )


def test_a_browser_that_cannot_unpack_shows_static_figures_and_says_why(browser, write_run, tmp_path):
    page = write_run_report([write_run()], tmp_path / "report.html")
    script = browser.execute_cdp_cmd(
        "Page.addScriptToEvaluateOnNewDocument", {"source": "delete window.DecompressionStream"}
    )
    try:
        browser.get(page.as_uri())
        WebDriverWait(browser, 20).until(lambda it: it.execute_script("return document.documentElement.dataset.ready"))
        assert "DecompressionStream" in browser.find_element(By.CSS_SELECTOR, ".fallback").text
        assert all(figure.is_displayed() for figure in browser.find_elements(By.CSS_SELECTOR, ".static"))
        assert not any(chart.is_displayed() for chart in browser.find_elements(By.CSS_SELECTOR, ".chart, .bar"))
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_report_without_scripts_is_whole(browser, write_run, tmp_path):
    page = write_run_report([write_run()], tmp_path / "report.html")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page.as_uri())
        assert browser.find_element(By.CSS_SELECTOR, ".fallback").is_displayed()
        assert all(figure.is_displayed() for figure in browser.find_elements(By.CSS_SELECTOR, ".static"))
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
