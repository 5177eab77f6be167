"""A headless Chromium, and what a person does with the page."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


# for each change of the images: their sources, and what the status line says
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


class Browser:
    """Chromium without a window, which finds no other machine than this one; skips the test where it is missing."""

    def __init__(self, downloads: Path):
        webdriver = pytest.importorskip("selenium.webdriver", reason='pip install "imagenet64-diffusion[test]"')
        program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        driver = shutil.which("chromedriver")
        if program is None or driver is None:
            pytest.skip("the page is tested in Chromium, which is missing: apt-get install chromium chromium-driver")
        options = webdriver.ChromeOptions()
        options.binary_location = program
        only_here = "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", only_here):
            options.add_argument(f"--{argument}")
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.downloads = downloads
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))

    def open(self, address: str, width: int = 1280, height: int = 900) -> None:
        """Opens the page on a screen of that size in pixels."""
        self.driver.get("about:blank")
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(address)
        self.wait(lambda: self.find("#generate").is_displayed())
        self.driver.execute_script(_RECORD)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [each.text for each in self.all(selector)]

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def wait(self, what: Callable[[], Any]) -> Any:
        """Waits until it is true, or no longer fails because something is not there yet."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, 60, 0.05, [WebDriverException]).until(lambda _: what())

    def fill(self, selector: str, value: object) -> None:
        """Types into a field in the place of what is there, and leaves it."""
        field = self.find(f"{selector} input")
        # Control and A, then Delete
        field.send_keys("\ue009", "a")
        field.send_keys(str(value) or "\ue017")
        self.driver.execute_script("arguments[0].blur()", field)

    def choose(self, selector: str, search: str) -> None:
        """Searches in a list and takes the first that is found."""
        field, options = self.find(f"{selector} input"), "ul[role=listbox] li"
        field.click()
        field.send_keys("\ue009", "a")
        field.send_keys(search)
        self.wait(lambda: self.all(options) and all(search in text for text in self.texts(options)))
        self.find(options).click()
        self.driver.execute_script("arguments[0].blur()", field)

    def compare(self, choice: str) -> None:
        next(each for each in self.all("#compare label") if each.text == choice).click()

    def generate(self) -> None:
        """Presses Generate and waits for the end, good or bad."""
        self.driver.execute_script(_FORGET)
        self.find("#generate").click()
        self.wait(lambda: self.all("#status .problem, #status .again"))

    def seen(self) -> list[tuple[list[str], str]]:
        """What there was to see since the last `generate`: sources of the images, and the status line."""
        return self.driver.execute_script("return window.seen")

    def downloaded(self, kind: str) -> bytes:
        """What the download button for png, gif, json or zip gives."""
        for file in self.downloads.iterdir():
            file.unlink()
        self.find(f"#download-{('png', 'gif', 'json', 'zip').index(kind)}").click()
        [file] = self.wait(lambda: not [*self.downloads.glob("*.crdownload")] and [*self.downloads.glob(f"*.{kind}")])
        return file.read_bytes()
