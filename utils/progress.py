"""Progress bars, on a terminal and in a file."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(**options: Any) -> tqdm:
    """tqdm's; a file, such as a job's, gets a line now and then."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 10, **options)
