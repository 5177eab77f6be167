"""What a click on Generate does: checks, live pictures, files."""

import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from .app_options import AppOptions
from .downloads import captions, write_downloads
from .drawing import AbandonedError, Drawing, Step
from .markup import done, gallery, note, problem, progress, side_by_side
from .request import Form, read_form
from .shelf import ModelShelf


# More pictures in a second would be work for the browser and no pleasure.
_SECONDS_BETWEEN_PICTURES = 0.15


@dataclass(frozen=True)
class View:
    """What the page shows next; None leaves a part as it is.

    A browser may leave out views that follow one another quickly, so that each has to be whole.

    Attributes:
        status: HTML of the line that says how far it is or what went wrong.
        pictures: HTML.
        files: The downloads, which are copied before the next view is asked for; empty takes those before away.
    """

    status: str
    pictures: str | None = None
    files: list[Path] | None = None


def draw(form: Form, shelf: ModelShelf, limits: AppOptions) -> Generator[View, None, None]:
    """Draws what a form asks for. Whatever goes wrong is shown, and nothing is raised."""
    view = None
    try:
        with closing(_draw(form, shelf, limits)) as views:
            for view in views:
                yield view
    except AbandonedError:
        return
    except (ValueError, OSError) as error:
        yield _failed(view, str(error))
    except Exception as error:
        # what the person cannot mend is for whoever serves the page to read
        traceback.print_exc(file=sys.stderr)
        yield _failed(view, f"Drawing failed ({type(error).__name__}): whoever serves this page finds more in its log")


def _failed(last: View | None, sentence: str) -> View:
    """What stays when something goes wrong: before it began, the pictures and files of the request before."""
    return View(problem(sentence)) if last is None else View(problem(sentence), last.pictures, files=[])


def _draw(form: Form, shelf: ModelShelf, limits: AppOptions) -> Generator[View, None, None]:
    drawings = [Drawing(request) for request in read_form(form, shelf, limits)]
    titles = [drawing.request.title for drawing in drawings]
    all_captions = [captions(drawing) for drawing in drawings]
    started = shown = time.monotonic()

    def pictures(steps: list[Step], finished: bool) -> str:
        galleries = [
            gallery(step.pixels, names, drawing.request.options.seed, finished, beside=len(drawings) > 1)
            for step, names, drawing in zip(steps, all_captions, drawings, strict=True)
        ]
        return side_by_side(galleries, titles)

    steps: list[Step] = []
    with ExitStack() as stack:
        for steps in _together([stack.enter_context(closing(drawing.steps())) for drawing in drawings]):
            if time.monotonic() - shown >= _SECONDS_BETWEEN_PICTURES or steps[0].number == 1:
                shown = time.monotonic()
                furthest = max(steps, key=lambda step: step.total)
                yield View(progress(furthest.number, furthest.total), pictures(steps, finished=False), files=[])
    seconds = time.monotonic() - started

    final = pictures(steps, finished=True)
    yield View(note("writing the files"), final, files=[])
    number = sum(len(drawing.images) for drawing in drawings)
    said = f"{number} image{'s' if number > 1 else ''} in {seconds:.1f} seconds"
    with tempfile.TemporaryDirectory(prefix="imagenet64-") as folder:
        files = write_downloads(drawings, Path(folder))
        yield View(done(said, [drawing.request.options for drawing in drawings]), final, files)


def _together(iterators: Sequence[Iterator[Step]]) -> Iterator[list[Step]]:
    """The steps of several drawings, of each the one that it has come to."""
    current: list[Step | None] = [None] * len(iterators)
    for steps in itertools.zip_longest(*iterators):
        current = [new or old for new, old in zip(steps, current, strict=True)]
        yield [step for step in current if step is not None]
