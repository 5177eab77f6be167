"""A headless Chromium, and what a person does with the page."""

import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest


# for each change of the pictures: the first one, the number of them, and what the status line says
_RECORD = """
window.seen = [];
const look = () => {
  const images = [...document.querySelectorAll('#images img')];
  window.seen.push([images.map(each => each.src), document.querySelector('#status').innerText]);
};
const all = {subtree: true, childList: true, attributes: true, characterData: true};
new MutationObserver(look).observe(document.querySelector('#result'), all);
"""
# what is there of an earlier request is not taken for an answer
_FORGET = """
window.seen = [];
document.querySelectorAll('#status .again, #status .problem').forEach(each => each.className = 'earlier');
"""


def find_browser() -> tuple[str, str]:
    """Chromium and its driver; skips the test where one of them, or selenium, is missing."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("the page is tested in Chromium, which is missing: apt-get install chromium chromium-driver")
    if importlib.util.find_spec("selenium") is None:
        pytest.skip('the page is tested with selenium, which is missing: pip install "imagenet64-diffusion[test]"')
    return browser, driver


class Browser:
    """Chromium without a window, whose names of other machines than this one lead nowhere."""

    def __init__(self, downloads: Path):
        from selenium import webdriver

        program, driver = find_browser()
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.downloads = downloads
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def open(self, address: str, width: int = 1280, height: int = 900) -> None:
        """Opens the page on a screen of that size in pixels."""
        self.driver.get("about:blank")
        self.logs("browser")
        self.logs("performance")
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        self.driver.get(address)
        self.wait(lambda: self.find("#generate").is_displayed())
        self.driver.execute_script(_RECORD)

    def find(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """Every element of a CSS selector."""
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        return self.find(selector).text

    def wait(self, what: Callable[[], Any], seconds: float = 30) -> Any:
        """Waits until it is true, or no longer fails because something is not there yet."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while True:
            try:
                if found := what():
                    return found
            except WebDriverException:
                pass
            if time.monotonic() > end:
                raise TimeoutError(f"waited {seconds} seconds; the page says:\n{self.text('body')}")
            time.sleep(0.05)

    def fill(self, selector: str, value: object) -> None:
        """Types into a field in the place of what is there."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"{selector} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE if value == "" else str(value))
        self.leave(field)

    def leave(self, field: Any) -> None:
        """Takes the cursor out of a field."""
        self.driver.execute_script("arguments[0].blur()", field)

    def choose(self, selector: str, search: str) -> None:
        """Searches in a list and takes the first that is found."""
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"{selector} input")
        field.click()
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(search)
        options = "ul[role=listbox] li"
        self.wait(lambda: self.all(options) and all(search in each.text for each in self.all(options)))
        self.find(options).click()
        self.leave(field)

    def clear_classes(self) -> None:
        """Takes all classes away."""
        while removing := self.all("#classes .token-remove:not(.remove-all)"):
            number = len(removing)
            removing[-1].click()
            self.wait(lambda n=number: len(self.all("#classes .token-remove:not(.remove-all)")) < n)

    def take(self, selector: str, choice: str) -> None:
        """Takes one of several choices that stand side by side."""
        next(each for each in self.all(f"{selector} label") if each.text == choice).click()

    def generate(self) -> None:
        """Presses Generate and waits for the end, good or bad."""
        self.driver.execute_script(_FORGET)
        self.find("#generate").click()
        self.wait(lambda: self.all("#status .problem") or self.all("#status .again"))

    def seen(self) -> list[tuple[list[str], str]]:
        """What there was to see since the last `generate`: sources of the images, and the status line."""
        return [tuple(each) for each in self.driver.execute_script("return window.seen")]

    def downloaded(self, selector: str, name: str) -> bytes:
        """What a download button gives."""
        file = self.downloads / name
        file.unlink(missing_ok=True)
        self.find(selector).click()
        self.wait(lambda: file.is_file() and not list(self.downloads.glob("*.crdownload")))
        return file.read_bytes()

    def logs(self, kind: str) -> list[dict[str, Any]]:
        """What Chromium has logged since the last call: ``browser`` for the console, ``performance`` for requests."""
        return self.driver.get_log(kind)

    def requests(self) -> list[str]:
        """The addresses asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.logs("performance")]
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, file: Path) -> None:
        """What the screen shows, as a PNG."""
        self.driver.save_screenshot(str(file))

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.driver.quit()
