"""The report in a real Chromium: it opens, shows its figures, asks the network for nothing and runs no script."""

import json
import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By

from logalign.report.run_report import write_run_report

HOSTILE = "<script>document.title = 'script ran'</script><img src=x onerror=\"document.title = 'handler ran'\">"


@pytest.fixture
def browser(tmp_path):
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
        f"--user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        # Leave the browser's own start page and forget what it asked for.
        session.get("about:blank")
        session.get_log("performance")
        yield session
    finally:
        session.quit()


def requests_of(session) -> list[str]:
    """Every address that the page asked for, out of the browser's own log."""
    messages = [json.loads(entry["message"])["message"] for entry in session.get_log("performance")]
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


def test_report_opens_whole_and_hostile_text_is_inert(browser, write_run, tmp_path):
    site = {"module": HOSTILE, "kind": HOSTILE, "how": HOSTILE, "tied_to": [HOSTILE], "mask": HOSTILE}
    run = write_run("run", meta={"sites": {"unembedding": site}, "settings": {HOSTILE: HOSTILE}}, val_loss=3.0)
    page = write_run_report([run], tmp_path / "report.html")

    browser.get(page.as_uri())

    assert browser.title == "Log-alignment ratio: run"
    assert browser.get_log("browser") == []
    asked = [url for url in requests_of(browser) if not url.startswith("data:")]
    assert asked == [page.as_uri()]
    figures = browser.find_elements(By.CSS_SELECTOR, ".figure svg")
    assert len(figures) == 3
    for figure in figures:
        assert figure.is_displayed()
        assert figure.size["width"] > 500
        assert figure.size["height"] > 150
    assert HOSTILE in browser.find_element(By.TAG_NAME, "dl").text
    assert browser.find_elements(By.CSS_SELECTOR, "script, img") == []


def test_report_fits_a_phone_in_light_and_dark(browser, write_run, tmp_path):
    page = write_run_report([write_run("a" * 60), write_run("b" * 60)], tmp_path / "report.html")
    grounds = []
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
        )
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        browser.get(page.as_uri())
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width == 360
        grounds.append(browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"))
    light, dark = grounds
    assert light != dark
