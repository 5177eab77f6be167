"""The page as Gradio's components and what happens when they are used."""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .app_options import AppOptions
from .downloads import FILE_NAMES
from .generation import generate as generate_images
from .markup import note, problem
from .model_cache import ModelCache, facts, title
from .request import (
    MAX_SEED,
    NOTHING,
    OWN_SCHEDULER,
    TWO_SCALES,
    TWO_SCHEDULERS,
    Form,
    scheduler_names,
    takes_eta,
)


TITLE = "Class-conditional diffusion in pixels"
_HINT = '<p class="hint">Choose classes and press Generate.</p>'
_DOWNLOAD_LABELS = ("Image grid (PNG)", "Animation (GIF)", "Manifest (JSON)", "Everything (ZIP)")
# Copies of the downloads go when they are this old, in seconds, give or take a third.
_KEEP_DOWNLOADS = 1800
# on a narrow screen the images stand below the button
_SHOW_IMAGES = "() => { if (innerWidth <= 820) document.querySelector('#result').scrollIntoView(); }"
_NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED + 1})"


def build_page(models: ModelCache, limits: AppOptions) -> gr.Blocks:
    """The page, ready to be launched.

    Raises:
        ValueError, OSError: If the model that it begins with cannot be opened.
    """
    first = models.names[0]
    pipeline = models.pipeline(first)
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_KEEP_DOWNLOADS // 3, _KEEP_DOWNLOADS)) as page:
        about = gr.HTML(_about(facts(first, pipeline)), elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                model = gr.Dropdown(
                    [(title(name), name) for name in models.names],
                    value=first,
                    label="Model",
                    info="A name of the list, a folder of this machine, or a Hub id." if models.takes_any else None,
                    allow_custom_value=models.takes_any,
                    visible=models.takes_any or len(models.names) > 1,
                    elem_id="model",
                )
                classes = gr.Dropdown(**_classes(pipeline), label="Classes", elem_id="classes")
                with gr.Row(elem_id="seed-row"):
                    per_class = gr.Number(2, label="Images per class", min_width=60, elem_id="per-class")
                    seed = gr.Number(0, label="Seed", min_width=60, elem_id="seed")
                    new_seed = gr.Button("New seed", size="sm", min_width=80, elem_id="new-seed")
                compare = gr.Radio(
                    [NOTHING, TWO_SCHEDULERS, TWO_SCALES], value=NOTHING, label="Compare", elem_id="compare"
                )
                other_scheduler = gr.Dropdown(
                    _schedulers(), value="DPMSolverMultistepScheduler", label="Other scheduler", visible=False
                )
                other_scale = gr.Number(5, label="Other guidance scale", visible=False, elem_id="other-scale")
                with gr.Row():
                    generate = gr.Button(
                        "Generate", variant="primary", size="md", min_width=140, scale=2, elem_id="generate"
                    )
                    stop = gr.Button("Stop", size="md", min_width=80, elem_id="stop")
            with gr.Column(elem_id="result"):
                status = gr.HTML(elem_id="status")
                images = gr.HTML(_HINT, elem_id="images")
                with gr.Row(elem_id="downloads"):
                    downloads = [
                        gr.DownloadButton(
                            label,
                            interactive=False,
                            size="sm",
                            min_width=100,
                            elem_id=f"download-{Path(name).suffix[1:]}",
                        )
                        for label, name in zip(_DOWNLOAD_LABELS, FILE_NAMES, strict=True)
                    ]
            with gr.Column(elem_id="settings"):
                scale = gr.Slider(0, 10, 2.5, step=0.1, label="Guidance scale", info="Up to 1 is no guidance.")
                steps = gr.Number(20, label="Steps", info=f"From 1 to {limits.max_steps}.", elem_id="steps")
                scheduler = gr.Dropdown(_schedulers(), value=OWN_SCHEDULER, label="Scheduler", elem_id="scheduler")
                eta = gr.Slider(
                    0, 1, 0, step=0.05, label="Eta", info="0 is deterministic (DDIM), 1 as random as DDPM.",
                    visible=takes_eta(pipeline, OWN_SCHEDULER), elem_id="eta",
                )  # fmt: skip
                begin = gr.Slider(0, 1, 0, step=0.05, label="Guidance begins", info="At this fraction of the steps.")
                end = gr.Slider(0, 1, 1, step=0.05, label="Guidance ends")

        # in the order of Form
        controls = [
            model, classes, per_class, seed, compare, other_scheduler, other_scale, scale, steps, scheduler, eta,
            begin, end,
        ]  # fmt: skip

        def on_generate(*values: Any) -> Iterator[list[Any]]:
            # closing this closes what it yields from, which ends the work
            for view in generate_images(Form(*values), models, limits):
                yield [
                    view.status,
                    gr.skip() if view.images is None else view.images,
                    *_offered(view.files, len(downloads)),
                ]

        def on_model(name: Any, scheduler_name: str, other: str, shown: str) -> list[Any]:
            try:
                opened = models.pipeline(name)
            except (ValueError, OSError) as error:
                return [gr.skip(), gr.skip(), gr.skip(), problem(str(error))]
            return [
                _about(facts(name, opened)),
                gr.Dropdown(**_classes(opened)),
                _eta_shown(opened, scheduler_name, other, shown),
                note(""),
            ]

        def on_scheduler(name: Any, scheduler_name: str, other: str, shown: str) -> Any:
            try:
                return _eta_shown(models.pipeline(name), scheduler_name, other, shown)
            except (ValueError, OSError):
                return gr.skip()

        running = generate.click(
            on_generate,
            controls,
            [status, images, *downloads],
            show_progress="minimal",
            show_progress_on=[status],
            preprocess=False,  # all that comes is checked in one place
            trigger_mode="once",
            concurrency_limit=limits.max_concurrent,
            concurrency_id="sampling",
            api_visibility="private",
        )
        generate.click(None, None, None, js=_SHOW_IMAGES, **quiet)
        # afterwards, or a last image that was on its way would have the last word
        stop.click(None, None, None, cancels=[running], **quiet).then(lambda: note("Stopped."), None, status, **quiet)
        new_seed.click(None, None, seed, js=_NEW_SEED, **quiet)
        chosen = [model, scheduler, other_scheduler, compare]
        model.change(on_model, chosen, [about, classes, eta, status], preprocess=False, **quiet)
        gr.on(
            [scheduler.change, other_scheduler.change, compare.change],
            on_scheduler,
            chosen,
            eta,
            preprocess=False,
            **quiet,
        )
        compare.change(
            lambda shown: [gr.Dropdown(visible=shown == TWO_SCHEDULERS), gr.Number(visible=shown == TWO_SCALES)],
            compare,
            [other_scheduler, other_scale],
            **quiet,
        )
    return page.queue(max_size=limits.max_queue, default_concurrency_limit=limits.max_concurrent, api_open=False)


def _offered(files: list[Path] | None, number: int) -> list[Any]:
    """Updates of the download buttons, see `View.files`."""
    if files is None:
        return [gr.skip()] * number
    if not files:
        return [gr.DownloadButton(value=None, interactive=False)] * number
    return [gr.DownloadButton(value=str(file), interactive=True) for file in files]


def _about(line: str) -> str:
    return f"<h1>{TITLE}</h1><p>{html.escape(line)}</p>"


def _classes(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    """Choices of the classes of a model, and those it begins with."""
    num_classes = pipeline.unet.config.num_class_embeds
    names = pipeline.config.id2label or {}
    choices = []
    for number in range(num_classes or 0):
        name = names.get(number, f"class {number}")
        choices.append((name if name == str(number) else f"{name} ({number})", str(number)))
    begin_with = choices if len(choices) <= 10 else choices[:4]
    return {
        "choices": [*choices, ("no class", "null")],
        "value": [value for _, value in begin_with],
        "multiselect": True,
        "visible": num_classes is not None,
        "info": "Type to search by name or number.",
    }


def _schedulers() -> list[tuple[str, str]]:
    return [("the model's own", OWN_SCHEDULER)] + [
        (name.removesuffix("Scheduler"), name) for name in scheduler_names()
    ]


def _eta_shown(pipeline: ClassConditionalPipeline, scheduler: str, other: str, shown: str) -> Any:
    chosen = [scheduler, other] if shown == TWO_SCHEDULERS else [scheduler]
    return gr.Slider(visible=any(takes_eta(pipeline, name) for name in chosen))
