"""The page in a real browser, as a person uses it."""

import io
import json
import zipfile
from urllib.parse import urlparse

import pytest
from PIL import Image

from imagenet64_diffusion.tests.page.browser import Browser


@pytest.fixture(autouse=True)
def no_complaints(browser, server):
    """No errors in the console, and no other machine is asked for anything, by the browser or by the server."""
    yield
    complaints = [entry["message"] for entry in browser.logs("browser") if entry["level"] == "SEVERE"]
    assert complaints == []
    hosts = {urlparse(address).netloc for address in browser.requests() if address.startswith(("http", "ws"))}
    assert hosts == {urlparse(server.address).netloc}
    assert server.calls == []


def test_it_opens_with_the_digits(browser):
    assert "32x32 pixels, grey · 10 classes" in browser.text("#head")
    assert len(browser.all("#classes .token")) == 10


def test_draw_a_class_that_is_searched_for(browser):
    browser.clear_classes()
    browser.choose("#classes", "7")
    browser.fill("#per-class", 3)
    browser.fill("#steps", 30)
    browser.generate()
    seen = browser.seen()
    # the same three images, other pixels, while the steps are counted
    between = [sources for sources, status in seen if "step " in status and sources]
    assert len({sources[0] for sources in between}) >= 2
    assert all(len(sources) == 3 for sources in between)
    images = browser.all("#images img")
    assert [image.get_attribute("alt") for image in images] == ["7, seed 0", "7, seed 1", "7, seed 2"]
    assert images[0].size["width"] % 32 == 0
    assert browser.text("#images figcaption") == "7"
    assert "3 images in " in browser.text("#status")

    with Image.open(io.BytesIO(browser.downloaded("#download-png", "grid.png"))) as grid:
        assert grid.format == "PNG"
    with Image.open(io.BytesIO(browser.downloaded("#download-gif", "denoising.gif"))) as animation:
        assert (animation.format, animation.n_frames) == ("GIF", 30)
    manifest = json.loads(browser.downloaded("#download-json", "manifest.json"))
    assert [(image["class_label"], image["seed"]) for image in manifest["images"]] == [(7, 0), (7, 1), (7, 2)]
    assert manifest["options"]["num_inference_steps"] == 30
    archive = zipfile.ZipFile(io.BytesIO(browser.downloaded("#download-zip", "everything.zip")))
    assert archive.testzip() is None
    assert "00002.png" in archive.namelist()


def test_bad_input_shows_a_sentence_and_the_page_goes_on(browser):
    browser.fill("#steps", 0)
    browser.generate()
    assert browser.text("#status .problem") == "Steps is 0, but must be a whole number from 1 to 1000"
    browser.fill("#steps", "")
    browser.generate()
    assert browser.text("#status .problem").startswith("Steps is empty")
    browser.fill("#steps", 3)
    browser.fill("#seed", "1.5")
    browser.generate()
    assert browser.text("#status .problem").startswith("Seed is 1.5, but must be a whole number")
    browser.fill("#seed", 4)
    browser.fill("#per-class", 40)
    browser.generate()
    assert browser.text("#status .problem").startswith("Images per class is 40, but must be")
    browser.fill("#per-class", 1)
    browser.generate()
    assert not browser.all("#status .problem")
    assert len(browser.all("#images img")) == 10


def test_side_by_side(browser):
    browser.fill("#per-class", 1)
    browser.fill("#steps", 5)
    browser.take("#compare", "two schedulers")
    browser.generate()
    sides = browser.all("#images .side")
    assert [side.find_element("css selector", "h2").text for side in sides] == [
        "EtaDDIMScheduler of the model",
        "DPMSolverMultistepScheduler",
    ]
    assert [len(side.find_elements("css selector", "img")) for side in sides] == [10, 10]
    assert abs(sides[0].location["y"] - sides[1].location["y"]) < 2
    manifest = json.loads(browser.downloaded("#download-json", "manifest.json"))
    assert manifest["left"]["images"] == manifest["right"]["images"]

    browser.take("#compare", "two guidance scales")
    browser.wait(lambda: browser.find("#other-scale").is_displayed())
    browser.fill("#other-scale", 6)
    browser.generate()
    assert [each.text for each in browser.all("#images .side h2")] == ["guidance 2.5", "guidance 6"]


def test_stop(browser):
    browser.fill("#steps", 240)
    browser.find("#generate").click()
    browser.wait(lambda: "step " in browser.text("#status"))
    browser.find("#stop").click()
    browser.wait(lambda: browser.text("#status") == "Stopped.")
    # the next one begins at once, and the one that was stopped does not come back
    browser.fill("#steps", 3)
    browser.generate()
    assert browser.all("#status .again")
    assert all("of 240" not in status for _, status in browser.seen())


def test_eta_is_there_where_it_has_an_effect(browser):
    assert browser.find("#eta").is_displayed()
    browser.choose("#scheduler", "UniPC")
    browser.wait(lambda: not browser.all("#eta"))
    browser.choose("#scheduler", "DDIM")
    browser.wait(lambda: browser.all("#eta"))


def test_new_seed(browser):
    before = browser.find("#seed input").get_attribute("value")
    browser.find("#new-seed").click()
    browser.wait(lambda: browser.find("#seed input").get_attribute("value") != before)


def test_another_model(browser):
    browser.choose("#model", "tiny")
    browser.wait(lambda: "16x16 pixels, grey · 3 classes" in browser.text("#head"))
    assert "goldfish (1)" in browser.text("#classes")
    browser.fill("#steps", 2)
    browser.generate()
    names = [each.text for each in browser.all("#images figcaption")]
    assert names[1:] == ["goldfish", "crane"]


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser, server, width):
    browser.open(server.address, width, 844)
    browser.fill("#steps", 2)
    browser.take("#compare", "two schedulers")
    for choice in ("two schedulers", "nothing"):
        browser.take("#compare", choice)
        browser.generate()
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert all(image.size["width"] % 32 == 0 for image in browser.all("#images img"))
    tops = [browser.find(f"#{name}").location["y"] for name in ("ask", "result", "settings")]
    assert tops == sorted(tops) or width > 820
    assert tops[1] < 844  # the pictures begin on the first screen


def test_every_control_has_a_name(browser):
    """For who listens to the page: Chromium's own idea of it."""
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = ("button", "textbox", "combobox", "slider", "spinbutton", "radio", "listbox", "searchbox")
    nameless = [
        node["role"]["value"]
        for node in tree
        if not node.get("ignored") and node["role"]["value"] in controls and not node.get("name", {}).get("value")
    ]
    assert nameless == []


def test_two_people_at_once(browser, server, tmp_path_factory):
    """In two browsers, with different schedulers."""
    with Browser(tmp_path_factory.mktemp("second")) as second:
        second.open(server.address)
        for each, steps, scheduler in ((browser, 40, "Euler"), (second, 5, "UniPC")):
            each.fill("#per-class", 1)
            each.fill("#steps", steps)
            each.choose("#scheduler", scheduler)
        browser.find("#generate").click()
        second.generate()
        browser.wait(lambda: browser.all("#status .again"))
        manifests = [json.loads(each.downloaded("#download-json", "manifest.json")) for each in (browser, second)]
    assert [manifest["options"]["num_inference_steps"] for manifest in manifests] == [40, 5]
    assert manifests[0]["scheduler"]["class"].startswith("Euler")
    assert manifests[1]["scheduler"]["class"] == "UniPCMultistepScheduler"
