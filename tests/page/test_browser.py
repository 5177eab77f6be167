"""The page in a real browser, as a person uses it."""

import io
import json
import zipfile
from urllib.parse import urlparse

import pytest
from PIL import Image


@pytest.fixture(params=[1280])
def browser(request, chromium, server):
    """The page just opened; no errors in the console, and nobody asks another machine for anything."""
    chromium.open(server.address, request.param)
    yield chromium
    assert [entry for entry in chromium.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in chromium.driver.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    hosts = {urlparse(address).netloc for address in sent if address.startswith(("http", "ws"))}
    assert hosts == {urlparse(server.address).netloc}
    assert (server.folder / "watched").read_text() == ""


def test_generate_a_class_that_is_searched_for(browser):
    assert "32x32 pixels, grey · 10 classes" in browser.text("#head")
    assert len(browser.all("#classes .token")) == 10
    browser.find("#classes .remove-all").click()
    browser.wait(lambda: not browser.all("#classes .token"))
    browser.choose("#classes", "7")
    browser.fill("#per-class", 3)
    browser.fill("#steps", 30)
    browser.generate()
    # the same three images, other pixels, while the steps are counted
    between = [sources for sources, status in browser.seen() if "step " in status and sources]
    assert len({sources[0] for sources in between}) >= 2
    assert all(len(sources) == 3 for sources in between)
    images = browser.all("#images img")
    assert [image.get_attribute("alt") for image in images] == ["7, seed 0", "7, seed 1", "7, seed 2"]
    assert browser.texts("#images figcaption") == ["7"]
    assert "3 images in " in browser.text("#status")

    assert Image.open(io.BytesIO(browser.downloaded("png"))).format == "PNG"
    assert Image.open(io.BytesIO(browser.downloaded("gif"))).n_frames == 30
    manifest = json.loads(browser.downloaded("json"))
    assert [(image["class_label"], image["seed"]) for image in manifest["images"]] == [(7, 0), (7, 1), (7, 2)]
    assert manifest["options"]["num_inference_steps"] == 30
    archive = zipfile.ZipFile(io.BytesIO(browser.downloaded("zip")))
    assert archive.testzip() is None
    assert "00002.png" in archive.namelist()


def test_side_by_side_after_bad_input(browser):
    browser.fill("#per-class", 1)
    browser.compare("two schedulers")
    browser.fill("#steps", "")
    browser.generate()
    assert browser.text("#status .problem").startswith("Steps is empty, but must be a whole number from 1 to 1000")
    browser.fill("#steps", 5)
    browser.generate()
    titles = ["EtaDDIMScheduler of the model", "UniPCMultistepScheduler"]
    assert browser.texts("#images .side h2") == titles
    assert [len(browser.all(f"#images .side:nth-child({side}) img")) for side in (1, 2)] == [10, 10]
    left, right = browser.all("#images .side")
    assert abs(left.location["y"] - right.location["y"]) < 2
    manifest = json.loads(browser.downloaded("json"))
    assert manifest["left"]["images"] == manifest["right"]["images"]

    browser.compare("two guidance scales")
    browser.wait(lambda: browser.find("#other-scale").is_displayed())
    browser.fill("#other-scale", 6)
    browser.generate()
    assert browser.texts("#images .side h2") == ["guidance 2.5", "guidance 6"]


def test_stop(browser):
    browser.fill("#steps", 240)
    browser.find("#generate").click()
    browser.wait(lambda: "step " in browser.text("#status"))
    browser.find("#stop").click()
    browser.wait(lambda: browser.text("#status") == "Stopped.")
    # the next one begins as soon as Gradio takes a click again, and the one that was stopped does not come back
    browser.fill("#steps", 3)
    browser.driver.execute_script("window.seen = []")
    browser.wait(lambda: browser.find("#generate").click() or browser.text("#status") != "Stopped.")
    browser.wait(lambda: browser.all("#status .again"))
    assert all("of 240" not in status for _, status in browser.seen())


def test_controls_have_names_and_follow_the_model_and_the_scheduler(browser):
    # for who listens to the page: Chromium's own idea of it
    tree = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = ("button", "textbox", "combobox", "slider", "spinbutton", "radio", "listbox", "searchbox")
    shown = [node for node in tree if not node.get("ignored") and node["role"]["value"] in controls]
    assert len(shown) > 15
    assert all(node.get("name", {}).get("value") for node in shown)

    assert browser.find("#eta").is_displayed()
    browser.choose("#scheduler", "UniPC")
    browser.wait(lambda: not browser.all("#eta"))
    browser.choose("#scheduler", "DDIM")
    browser.wait(lambda: browser.all("#eta"))
    browser.find("#new-seed").click()
    browser.wait(lambda: browser.find("#seed input").get_attribute("value") != "0")
    browser.choose("#model", "tiny")
    browser.wait(lambda: "16x16 pixels, grey · 3 classes" in browser.text("#head"))
    browser.fill("#steps", 2)
    browser.generate()
    assert browser.texts("#images figcaption")[1:] == ["goldfish", "crane"]


@pytest.mark.parametrize("browser", [390, pytest.param(1280, marks=pytest.mark.soak)], indirect=True)
def test_nothing_is_wider_than_the_screen(browser):
    width = browser.driver.execute_script("return innerWidth")
    browser.fill("#steps", 2)
    for choice in ("two schedulers", "nothing"):
        browser.compare(choice)
        browser.generate()
        assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width
    assert all(image.size["width"] % 32 == 0 for image in browser.all("#images img"))
    tops = [browser.find(f"#{name}").location["y"] for name in ("ask", "result", "settings")]
    assert tops == sorted(tops) or width > 820
    assert tops[1] < 900  # the images begin on the first screen
