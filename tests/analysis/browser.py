"""A real Chromium for the tests of the report, headless, with a profile of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

MISSING = (
    "the report is tested in Chromium, and {} is not there; CI runs it; on Debian: "
    "apt-get install -y chromium chromium-driver"
)
needs_browser = pytest.mark.skipif(
    importlib.util.find_spec("selenium") is None,
    reason="Selenium is only in the main environment (Python 3.11): `make test` runs this",
)
ENTER, ESCAPE, DOWN, END, HOME = "\ue007", "\ue00c", "\ue015", "\ue010", "\ue011"
RIGHT, TAB = "\ue014", "\ue004"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def start_browser(profile: Path) -> Any:
    """A driver. Without a browser the test is skipped, but in CI it fails: nothing else runs it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = _path_of("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    service = webdriver.ChromeService(executable_path=_path_of("chromedriver"))
    return webdriver.Chrome(options, service)


def _path_of(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING.format(program))
    return path


class Report:
    """A report in the browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(
        self, file: Path, *, width: int = 1300, height: int = 1000, theme: str = "light"
    ) -> None:
        """Open `file` as a person would who has never seen it."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(file.as_uri())
        self.run("localStorage.clear()")
        assert self.run("return document.documentElement.dataset.ready") == "true"

    def run(self, script: str, *args: Any) -> Any:
        """What a script in the page returns."""
        return self.driver.execute_script(script, *args)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that can be seen."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])]"
            ".filter((e) => e.checkVisibility()).map((e) => e.textContent.trim())",
            selector,
        )
        return found

    def click(self, selector: str, number: int = 0) -> None:
        """A real click, which fails if something covers the element."""
        element = self.driver.find_elements("css selector", selector)[number]
        self.run("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def go_to(self, view: str) -> None:
        """Change the part of the address that holds the view."""
        self.driver.execute_async_script(
            "const done = arguments[1]; addEventListener('hashchange', () => setTimeout(done), "
            "{ once: true }); location.hash = arguments[0]",
            view,
        )

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a select."""
        self.run(
            "const select = document.querySelector(arguments[0]); select.value = arguments[1];"
            "select.dispatchEvent(new Event('change'))",
            selector,
            value,
        )

    def keys(self, *keys: str) -> None:
        """Type, wherever the focus is."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def lines(self, metric: str = "loss") -> list[int]:
        """The channels whose training is drawn, in order; -1 is the whole run."""
        found: list[int] = self.run(
            "return [...document.querySelectorAll(`[data-metric=${arguments[0]}] path.line"
            ":not(.other):not(.raw)`)].map((e) => Number(e.dataset.channel)).sort((a, b) => a - b)",
            metric,
        )
        return found

    def read(self, key: str, metric: str = "loss") -> str:
        """What a chart says aloud when a key is pressed in it."""
        plot = self.driver.find_element("css selector", f"[data-metric={metric}] .plot")
        plot.send_keys(key)
        live = self.driver.find_element("css selector", f"[data-metric={metric}] .live")
        return str(live.get_property("textContent"))

    def complaints(self) -> list[str]:
        """What the console says."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Every address that was asked for since the page was opened."""
        entries = self.driver.get_log("performance")
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
