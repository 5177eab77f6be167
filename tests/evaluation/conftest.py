"""A stand-in for the published Inception, images, and a server of files."""

import functools
import http.server
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from imagenet64_diffusion.tests.hub.conftest import hub, online  # noqa: F401


class Mixed(torch.nn.Module):
    """Two branches on 17x17 places, of which the first is the one that sFID takes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Sequential(torch.nn.Conv2d(16, 9, 1), torch.nn.ReLU())
        self.tower = torch.nn.Conv2d(16, 7, 3, padding=1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv(features), self.tower(features)], 1)


class StandIn(torch.nn.Module):
    """Has the interface of the published TorchScript Inception, 2048 features and 10 classes, and random weights."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "conv": torch.nn.Conv2d(3, 16, 27, stride=17),
            "relu": torch.nn.ReLU(),
            "mixed_6": Mixed(),
            "conv_1": torch.nn.Conv2d(16, 2048, 3, stride=2),
            "pool2": torch.nn.AdaptiveAvgPool2d(1),
        }
        self.layers = torch.nn.Sequential(OrderedDict(layers))
        self.output = torch.nn.Linear(2048, 10)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        # pixel i of 299 lies at i * size / 299, without antialiasing
        height, width = img.size(2), img.size(3)
        rows = (torch.arange(299) * (height / 299.0) + 0.5) * (2.0 / height) - 1
        columns = (torch.arange(299) * (width / 299.0) + 0.5) * (2.0 / width) - 1
        grid = torch.stack([columns[None, :].expand(299, 299), rows[:, None].expand(299, 299)], dim=2)
        grid = grid[None].expand(img.size(0), -1, -1, -1)
        resized = F.grid_sample(img.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((resized - 128) / 128).reshape(-1, 2048)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight)
        return torch.softmax(logits if no_output_bias else logits + self.output.bias, 1)


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """The stand-in as a file, in a folder of its own and with the published name, where clean-fid looks for it."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have another format than the published one
        torch.manual_seed(0)
        network = StandIn()
        # as wide apart as real ones
        network.output.weight.data *= 8
        file = tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt"
        torch.jit.script(network.eval()).save(str(file))
    return file


def make_pixels(seed: int, count: int = 60, size: int = 64) -> torch.Tensor:
    """Blobs of many sizes and colours with some noise: uint8 (count, 3, size, size)."""
    rng = np.random.default_rng(seed)
    smooth = F.interpolate(torch.from_numpy(rng.uniform(0, 256, (count, 3, 6, 6))), size, mode="bicubic").numpy()
    noise = rng.normal(0, 30, (count, 3, size, size))
    return torch.from_numpy((smooth + noise).clip(0, 255).astype(np.uint8))


def write_images(folder: Path, pixels: torch.Tensor) -> list[Path]:
    """Writes PNG files that are named 0.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number}.png" for number in range(len(pixels))]
    for file, one in zip(files, pixels, strict=True):
        PIL.Image.fromarray(one.permute(1, 2, 0).numpy()).save(file)
    return files


class FileServer(http.server.ThreadingHTTPServer):
    """Serves a folder on this machine; ``requests`` are the paths that were asked for, ``cut_after`` is after how many
    bytes each connection breaks, and answers wait for ``may_answer``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.cut_after, self.may_answer = folder, [], None, threading.Event()
        self.may_answer.set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        self.server.may_answer.wait(timeout=60)
        if self.server.cut_after is None:
            super().do_GET()
            return
        content = (self.server.folder / self.path.lstrip("/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cut_after])

    def log_message(self, *_) -> None:
        """Keeps the requests out of the output of the tests."""


@pytest.fixture
def server(tmp_path) -> Iterator[FileServer]:
    """A server of an empty folder."""
    (tmp_path / "served").mkdir()
    with FileServer(tmp_path / "served") as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()
