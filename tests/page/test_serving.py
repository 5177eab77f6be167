"""The page as a process, asked by programs that are no browsers and mean no good."""

import urllib.error
import urllib.request

import pytest

from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.page.forms import GOOD
from imagenet64_diffusion.tests.page.serving import Server


def data(**changes):
    """What a browser sends for a form."""
    return list(GOOD._replace(**{"model": str(DIGITS), "classes": ["3"], **changes}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "/etc"}, "Model is &#x27;/etc&#x27;, but this page has the digits of this package and "),
        ({"classes": ["eleven"]}, "there is no class named &#x27;eleven&#x27;"),
        ({"steps": 10**9}, "Steps is 1000000000, but must be a whole number from 1 to 1000"),
        ({"seed": {"a": [1]}}, "Seed is {&#x27;a&#x27;: [1]}, but must be a whole number"),
        ({"scheduler": "../../x"}, "Scheduler is &#x27;../../x&#x27;, which this page does not have"),
        ({"classes": ["3"] * 100_000}, "This is 200,000 images, but a request may ask for 36"),
    ],
)
def test_values_that_the_page_does_not_offer(server, changes, sentence):
    assert sentence in server.answer(data(**changes))
    assert "Traceback" not in server.log


def test_a_good_request(server):
    answer = server.answer(data())
    assert "2 images in " in answer
    assert "grid.png" in answer


@pytest.mark.parametrize("path", ["/etc/hostname", "{DIGITS}/model_index.json", "{folder}/log"])
def test_files_of_the_server_are_not_given_away(server, path):
    path = path.format(DIGITS=DIGITS, folder=server.folder)
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(f"{server.address}gradio_api/file={path}", timeout=30)
    assert raised.value.code == 403


def test_nothing_is_uploaded(server):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\nmuch\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(server.address + "gradio_api/upload", body, headers), timeout=30)
    assert raised.value.code == 413


def test_a_full_queue_and_the_end_in_the_midst_of_it(tmp_path, tiny_model):
    """Everything is written below one folder, which goes with the process."""
    arguments = ["--model", tiny_model, "--max_queue", 2, "--max_concurrent", 1, "--max_evaluations", 100_000]
    with Server(tmp_path, *arguments) as server:
        assert "3 images in " in server.answer(data(model=str(tiny_model), classes=["all"], images_per_class=1))
        [folder] = (tmp_path / "temporary").glob("imagenet64-page-*")
        assert len(list((folder / "downloads").glob("*/*"))) == 4
        assert list((folder / "requests").iterdir()) == []

        long = data(model=str(tiny_model), classes=["all"], images_per_class=10, steps=1000)
        for _ in range(2):  # one is drawn, one or two wait
            server.join_queue(long)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            [server.join_queue(long) for _ in range(2)]
        assert server.stop() == 143
        assert "Traceback" not in server.log
    assert list((tmp_path / "temporary").iterdir()) == []
    assert list((tmp_path / "work").iterdir()) == []


def test_an_address_that_is_taken(server, capsys):
    from imagenet64_diffusion.app import main

    port = server.address.rstrip("/").rpartition(":")[2]
    assert main(["--port", port]) == 2
    assert port in capsys.readouterr().err
