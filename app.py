"""Serves a web page that generates images of chosen classes and shows how they come out of noise."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.utils.command_line import StoppedBySignalError, run_command


def serve(options: AppOptions) -> None:
    """Serves the page until the process is told to end, see `AppOptions`.

    Files are written to a temporary folder, which is removed in the end, and to the Hub's cache where a Hub id is
    opened.

    Raises:
        ValueError, OSError: If a model cannot be opened or the address is taken.
        ImportError: If gradio is not installed.
        StoppedBySignalError: When it is told to end.
    """
    with _process_settings():
        _serve(options)


def _serve(options: AppOptions) -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError('the page needs gradio: pip install "imagenet64-diffusion[app]"') from error
    # torch and diffusers take seconds to import, which --help should not
    import torch

    from imagenet64_diffusion.page.generation import end_all
    from imagenet64_diffusion.page.layout import build_page
    from imagenet64_diffusion.page.model_cache import ModelCache
    from imagenet64_diffusion.page.style import CSS, make_theme
    from imagenet64_diffusion.utils.devices import best_device, find_device
    from imagenet64_diffusion.utils.memory import keep_freed_memory

    device = find_device(options.device or best_device())
    if device.type == "cpu":
        keep_freed_memory()
    models = ModelCache(
        options.model, options.takes_any_model, device, getattr(torch, options.dtype), options.max_loaded_models
    )
    page = build_page(models, options)
    try:
        page.launch(
            server_name=options.host,
            server_port=options.port,
            share=options.share or None,
            theme=make_theme(),
            css=CSS,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            max_file_size=1,  # byte: nothing is uploaded to this page
            prevent_thread_lock=True,
            quiet=True,
        )
        print(f"the page is at {page.share_url or page.local_url}", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        end_all()


@contextlib.contextmanager
def _process_settings() -> Iterator[None]:
    """A temporary folder for all that the process writes, and an end by SIGTERM that cleans it up."""
    temporary, handler = tempfile.tempdir, signal.signal(signal.SIGTERM, _stop)
    try:
        with tempfile.TemporaryDirectory(prefix="imagenet64-page-") as folder:
            # what is offered for download is copied from one to the other
            requests, downloads = Path(folder, "requests"), Path(folder, "downloads")
            requests.mkdir()
            downloads.mkdir()
            # Gradio looks at these when it is imported
            tempfile.tempdir, os.environ["GRADIO_TEMP_DIR"] = str(requests), str(downloads)
            os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
            yield
    finally:
        tempfile.tempdir = temporary
        os.environ.pop("GRADIO_TEMP_DIR", None)
        signal.signal(signal.SIGTERM, handler)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    raise StoppedBySignalError(signal_number, "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-app; returns the exit code."""
    return run_command(
        AppOptions, serve, __doc__, argv, example="--model outputs/demo/model your-name/your-model --port 7860"
    )


if __name__ == "__main__":
    sys.exit(main())
