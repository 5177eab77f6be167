"""app.py as a process of its own, watched: what it writes and whom it calls."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any


ROOT = Path(__file__).parents[2]
# Python runs this before anything else: names and addresses that are not this machine's are written down
_WATCH = """
import os, sys

def watch(event, arguments):
    if event == "socket.connect":
        host = arguments[1][0] if isinstance(arguments[1], tuple) else "localhost"
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{event} {host}\\n")

sys.addaudithook(watch)
"""


class Server:
    """A running page.

    Attributes:
        address: Where it is.
        folder: Its working directory ``work``, its temporary folder ``temporary``, and its output ``log``.
    """

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        for name in ("work", "temporary", "watch"):
            (folder / name).mkdir()
        (folder / "watch" / "sitecustomize.py").write_text(_WATCH)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
        environment |= {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(folder / "watch"), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(folder / "temporary"),
            "WATCHED": str(folder / "watched"),
        }
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "app.py"), *map(str, arguments)],
                cwd=folder / "work",
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.address = self._wait_for_address()

    @property
    def log(self) -> str:
        """What it has written to its terminal."""
        return (self.folder / "log").read_text()

    @property
    def calls(self) -> list[str]:
        """Names and addresses of other machines that it has looked up or connected to."""
        watched = self.folder / "watched"
        return watched.read_text().splitlines() if watched.exists() else []

    def join_queue(self, data: list[Any]) -> str:
        """Asks for a drawing without a browser, with whatever values; returns the query by which the answer is had."""
        with urllib.request.urlopen(self.address + "config", timeout=30) as response:
            config = json.load(response)
        index = next(each["id"] for each in config["dependencies"] if len(each["inputs"]) == len(data))
        session = {"session_hash": f"test{time.monotonic_ns()}"}
        body = json.dumps({"data": data, "fn_index": index, **session}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + "gradio_api/queue/join", body, headers)
        urllib.request.urlopen(request, timeout=30).close()
        return urllib.parse.urlencode(session)

    def answer(self, data: list[Any]) -> str:
        """What the page answers to a request without a browser: its messages."""
        query = self.join_queue(data)
        with urllib.request.urlopen(f"{self.address}gradio_api/queue/data?{query}", timeout=60) as stream:
            return stream.read().decode()

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        """Ends it and returns the exit code."""
        self.process.send_signal(with_signal)
        return self.process.wait(timeout=30)

    def _wait_for_address(self) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if found := re.search(r"http://127\.0\.0\.1:\d+", self.log):
                return found[0] + "/"
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.process.kill()
        raise RuntimeError(f"the page did not start:\n{self.log}")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=30)
