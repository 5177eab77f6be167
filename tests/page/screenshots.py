"""The screenshot of the README: python -m imagenet64_diffusion.tests.page.screenshots docs/images/page.png."""

import sys
import tempfile
from pathlib import Path

from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.page.browser import Browser
from imagenet64_diffusion.tests.page.serving import Server


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        server, browser = Server(Path(folder), "--model", DIGITS), Browser(Path(folder))
        # on a telephone: 390 844
        browser.open(server.address + "".join(sys.argv[4:]), *map(int, sys.argv[2:4]))
        browser.fill("#steps", 60)
        browser.generate()
        browser.driver.save_screenshot(sys.argv[1])
        browser.driver.quit()
        server.terminate()


if __name__ == "__main__":
    main()
