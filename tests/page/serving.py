"""app.py as a process of its own, watched: what it writes and whom it calls."""

import json
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imagenet64_diffusion.tests.commands.processes import CommandProcess, wait_until


def main(argv: Sequence[str]) -> int:
    """app.py's, which writes down names and addresses of other machines that it looks up or connects to."""
    from imagenet64_diffusion.app import main

    def watch(event: str, arguments: Sequence[Any]) -> None:
        if event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[1] if event == "socket.connect" else arguments[0]
            host = host[0] if isinstance(host, tuple) else host
            # a path is a socket of this machine
            if not re.fullmatch(r"|localhost|127\.0\.0\.1|::1|0\.0\.0\.0|/.*", os.fsdecode(host or "")):
                with Path(os.environ["WATCHED"]).open("a") as file:
                    file.write(f"{event} {host}\n")

    sys.addaudithook(watch)
    tempfile.tempdir = None  # which TMPDIR says
    return main(argv)


class Server(CommandProcess):
    """A running page; its working directory, temporary folder and output are ``work``, ``temporary`` and ``log``.

    Names and addresses of other machines that it has looked up or connected to stand in ``watched``.
    """

    program = "tests.page.serving"

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        (folder / "work").mkdir()
        (folder / "temporary").mkdir()
        environment = {"TMPDIR": str(folder / "temporary"), "WATCHED": str(folder / "watched")}
        (folder / "watched").touch()
        super().__init__(arguments, folder / "log", environment, directory=folder / "work")
        wait_until(lambda: "the page is at" in self.output(), self)
        self.address = re.search(r"http://127\.0\.0\.1:\d+", self.output())[0] + "/"

    def terminate(self) -> int:
        """Tells it to end, and gives the exit code."""
        self.send(signal.SIGTERM)
        return self.end()

    def join_queue(self, data: list[Any]) -> str:
        """Asks for images without a browser, with whatever values; gives the address of the answer."""
        with urllib.request.urlopen(self.address + "config", timeout=30) as response:
            config = json.load(response)
        index = next(each["id"] for each in config["dependencies"] if len(each["inputs"]) == len(data))
        session = f"test{time.monotonic_ns()}"
        body = json.dumps({"data": data, "fn_index": index, "session_hash": session}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + "gradio_api/queue/join", body, headers)
        urllib.request.urlopen(request, timeout=30).close()
        return f"{self.address}gradio_api/queue/data?session_hash={session}"

    def answer(self, data: list[Any]) -> str:
        """What the page answers to a request without a browser: its messages."""
        with urllib.request.urlopen(self.join_queue(data), timeout=60) as stream:
            return stream.read().decode()
