"""Serves a web page that generates images of chosen classes and shows how they come out of noise."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.utils.command_line import StoppedBySignalError, run_command


def serve(options: AppOptions) -> None:
    """Serves the page until a signal tells the process to end, StoppedBySignalError.

    Its files are in a temporary folder, which is removed in the end. ValueError or OSError if a model cannot be opened
    or the address is taken, ImportError if gradio is not installed.
    """

    def stop(number: int, frame: Any) -> None:
        raise StoppedBySignalError(number, "")

    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, stop))
        # Gradio looks at these when it is imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="imagenet64-page-"))
        stack.callback(os.environ.pop, "GRADIO_TEMP_DIR")
        try:
            import gradio  # noqa: F401
        except ImportError as error:
            raise ImportError('the page needs gradio: pip install "imagenet64-diffusion[app]"') from error
        # torch and diffusers take seconds to import, which --help should not
        from imagenet64_diffusion.page.layout import STYLE, THEME, build_page
        from imagenet64_diffusion.page.model_cache import ModelCache
        from imagenet64_diffusion.page.request import end_all

        page = build_page(ModelCache(options))
        stack.callback(end_all)
        stack.callback(page.close, verbose=False)
        address: dict[str, Any] = {"server_name": options.host, "server_port": options.port}
        look: dict[str, Any] = {"theme": THEME, "css_paths": STYLE, "footer_links": [], "quiet": True}
        running: dict[str, Any] = {"ssr_mode": False, "enable_monitoring": False, "prevent_thread_lock": True}
        # max_file_size is one byte: nothing is uploaded to this page
        page.launch(share=options.share or None, max_file_size=1, **address, **look, **running)
        print(f"the page is at {page.share_url or page.local_url}", flush=True)
        threading.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-app; returns the exit code."""
    example = "--model outputs/demo/model your-name/your-model --port 7860"
    return run_command(AppOptions, serve, __doc__, argv, example=example)


if __name__ == "__main__":
    sys.exit(main())
