"""Screenshots of the page: python -m imagenet64_diffusion.tests.page.screenshots --output_dir outputs/page."""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.page.browser import Browser
from imagenet64_diffusion.tests.page.serving import Server


WIDE, NARROW = (1280, 900), (390, 844)


def take_screenshots(output_dir: Path, model: str) -> Iterator[Path]:
    """Writes the screenshots one by one.

    Args:
        output_dir: Where to.
        model: Pipeline folder or Hub id.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(Server(folder, "--model", model))
        browser = stack.enter_context(Browser(folder))
        for name, size in (("wide", WIDE), ("narrow", NARROW)):

            def save(what: str, name: str = name) -> Path:
                file = output_dir / f"{name}_{what}.png"
                browser.screenshot(file)
                return file

            browser.open(server.address, *size)
            yield save("begin")
            browser.fill("#steps", 60)
            browser.find("#generate").click()
            browser.wait(lambda: "step 2" in browser.text("#status"))
            yield save("drawing")
            browser.wait(lambda: browser.all("#status .again"))
            yield save("finished")
            browser.fill("#steps", 20)
            browser.fill("#per-class", 4)
            browser.fill("#seed", -3)
            browser.generate()
            yield save("error")
            browser.fill("#seed", 3)
            browser.fill("#per-class", 1)
            browser.take("#compare", "two guidance scales")
            browser.generate()
            yield save("beside")
            browser.find("#settings").location_once_scrolled_into_view  # noqa: B018
            yield save("settings")
            browser.open(server.address + "?__theme=dark", *size)
            browser.generate()
            yield save("dark")
            browser.fill("#per-class", 1)
            browser.clear_classes()
            browser.generate()
            yield save("dark_error")
            browser.find("#classes input").click()
            browser.wait(lambda: browser.all("ul[role=listbox] li"))
            time.sleep(0.5)  # it fades in
            yield save("dark_classes")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/page"), help="Where the screenshots go.")
    parser.add_argument("--model", default=str(DIGITS), help="Pipeline folder or Hub id; default: the digits.")
    options = parser.parse_args()
    for file in take_screenshots(options.output_dir, options.model):
        print(file)


if __name__ == "__main__":
    main()
