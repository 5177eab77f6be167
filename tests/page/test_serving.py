"""The page as a process, asked by programs that are no browsers and mean no good."""

import urllib.error
import urllib.request

import pytest

from imagenet64_diffusion.app import main
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.page.forms import GOOD
from imagenet64_diffusion.tests.page.serving import Server


def data(**changes):
    """What a browser sends for a form."""
    return list({**GOOD, "model": str(DIGITS), "class_labels": ["3"], **changes}.values())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "/etc"}, "Model is &#x27;/etc&#x27;, but this page has the digits of this package and "),
        ({"seed": {"a": [1]}}, "Seed is {&#x27;a&#x27;: [1]}, but must be a whole number"),
        ({"scheduler": "../../x"}, "Scheduler is &#x27;../../x&#x27;, which this model does not have"),
        ({"class_labels": ["3"] * 100_000}, "This is 200,000 images, but a request may ask for 36"),
    ],
)
def test_values_that_the_page_does_not_offer(server, changes, sentence):
    assert sentence in server.answer(data(**changes))
    assert "Traceback" not in server.output()


@pytest.mark.parametrize("path", ["/etc/hostname", "{DIGITS}/model_index.json", "{folder}/log"])
def test_files_of_the_server_are_not_given_away(server, path):
    path = path.format(DIGITS=DIGITS, folder=server.folder)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server.address}gradio_api/file={path}", timeout=30)


def test_nothing_is_uploaded(server):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.bin"\r\n\r\nmuch\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = urllib.request.Request(server.address + "gradio_api/upload", body, headers)
    with pytest.raises(urllib.error.HTTPError, match="413"):
        urllib.request.urlopen(upload, timeout=30)


def test_a_full_queue_and_the_end_in_the_midst_of_it(tmp_path, tiny_model):
    """Everything is written below one folder, which goes with the process."""
    pytest.importorskip("gradio")
    limits = ["--max_queue", 2, "--max_concurrent", 1, "--max_evaluations", 100_000]
    server = Server(tmp_path, "--model", tiny_model, *limits)
    everything = {"model": str(tiny_model), "class_labels": ["all"]}
    assert "3 images in " in server.answer(data(**everything, num_images_per_label=1))
    [folder] = (tmp_path / "temporary").iterdir()
    assert folder.name.startswith("imagenet64-page-")
    assert len(list(folder.glob("*/*"))) == 4

    long = data(**everything, num_images_per_label=10, num_inference_steps=1000)
    for _ in range(2):  # one is sampled, one or two wait
        server.join_queue(long)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        [server.join_queue(long) for _ in range(2)]
    assert server.terminate() == 143
    assert "Traceback" not in server.output()
    assert [*(tmp_path / "temporary").iterdir(), *(tmp_path / "work").iterdir()] == []


def test_an_address_that_is_taken(server, capsys):
    port = server.address.rstrip("/").rpartition(":")[2]
    assert main(["--port", port]) == 2
    assert port in capsys.readouterr().err
