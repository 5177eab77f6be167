"""The page as Gradio's components and what happens when they are used."""

import contextlib
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ..pipelines.generation import class_caption
from ..pipelines.loading import scheduler_names
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .generation import generate
from .markup import note
from .model_cache import ModelCache, facts, title
from .request import MAX_SEED, NOTHING, OWN_SCHEDULER, TWO_SCALES, TWO_SCHEDULERS, can_be_guided, takes_eta


TITLE = "Class-conditional diffusion in pixels"
STYLE = Path(__file__).with_name("style.css")
# with fonts that the visitor's machine has: nothing is fetched from elsewhere
_FONT = ("system-ui", "Segoe UI", "Roboto", "Arial", "sans-serif")
THEME = gr.themes.Base(
    primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_FONT, font_mono="monospace"
)
THEME.set(body_background_fill="*neutral_50", input_background_fill="white", input_border_color="*neutral_300")
THEME.set(input_background_fill_dark="*neutral_800", input_border_color_dark="*neutral_600")
_DOWNLOAD_LABELS = ("Image grid (PNG)", "Animation (GIF)", "Manifest (JSON)", "Everything (ZIP)")
# on a narrow screen the images stand below the button
_SHOW_IMAGES = "() => { if (innerWidth <= 820) document.querySelector('#result').scrollIntoView(); }"
_NEW_SEED = f"() => Math.floor(Math.random() * {MAX_SEED + 1})"
_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def build_page(models: ModelCache) -> gr.Blocks:
    """The page, ready to be launched; ValueError or OSError if the model that it begins with cannot be opened."""
    pipeline = models.pipeline(models.names[0])
    # copies of the downloads are looked at every 600 seconds, and become 1800 seconds old
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 1800)) as page:
        about = gr.HTML(_about(models.names[0], pipeline), elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="ask"):
                controls = _controls(models, pipeline)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", size="md", scale=2, elem_id="generate")
                    stop = gr.Button("Stop", size="md", min_width=80, elem_id="stop")
            with gr.Column(elem_id="result"):
                status = gr.HTML(elem_id="status")
                images = gr.HTML('<p class="hint">Choose classes and press Generate.</p>', elem_id="images")
                with gr.Row(elem_id="downloads"):
                    downloads = [
                        gr.DownloadButton(label, interactive=False, size="sm", min_width=100, elem_id=f"download-{i}")
                        for i, label in enumerate(_DOWNLOAD_LABELS)
                    ]
            with gr.Column(elem_id="settings"):
                controls |= _settings(models, pipeline)

        def on_generate(*values: Any) -> Iterator[list[Any]]:
            # closing this closes what it yields from, which ends the work
            for view in generate(dict(zip(controls, values, strict=True)), models):
                buttons: list[Any] = [gr.skip()] * len(downloads)
                if view.files is not None:
                    files: list[Any] = [str(file) for file in view.files] or [None] * len(downloads)
                    buttons = [gr.DownloadButton(value=file, interactive=file is not None) for file in files]
                yield [view.status, gr.skip() if view.images is None else view.images, *buttons]

        def on_model(name: Any) -> list[Any]:
            try:
                opened = models.pipeline(name)
            except (ValueError, OSError) as error:
                return [gr.skip(), gr.skip(), note(str(error), is_problem=True), *[gr.skip()] * 5]
            guided = gr.Slider(visible=can_be_guided(opened))
            schedulers: dict[str, Any] = {"choices": _schedulers(opened)}
            others = gr.Dropdown(value=opened.noise_kind.example, **schedulers)
            return [
                *(_about(name, opened), gr.Dropdown(**_classes(opened)), note("")),
                *(gr.Dropdown(value=OWN_SCHEDULER, **schedulers), others, guided, guided, guided),
            ]

        def on_choice(name: Any, scheduler: str, other: str, compare: str) -> list[Any]:
            schedulers = [scheduler, other] if compare == TWO_SCHEDULERS else [scheduler]
            eta: Any = gr.skip()
            with contextlib.suppress(ValueError, OSError):  # which on_model shows
                eta = gr.Slider(visible=any(takes_eta(models.pipeline(name), each) for each in schedulers))
            return [eta, gr.Dropdown(visible=compare == TWO_SCHEDULERS), gr.Number(visible=compare == TWO_SCALES)]

        shown: list[Any] = [status, images, *downloads]
        progress: dict[str, Any] = {"show_progress": "minimal", "show_progress_on": [status], "trigger_mode": "once"}
        # all that comes is checked in one place: preprocess=False
        asked = list(controls.values())
        running = start.click(on_generate, asked, shown, preprocess=False, api_visibility="private", **progress)
        start.click(None, None, None, js=_SHOW_IMAGES, **_QUIET)
        # afterwards, or a last image that was on its way would have the last word
        stopped = stop.click(None, None, None, cancels=[running], **_QUIET)
        stopped.then(lambda: note("Stopped."), None, status, **_QUIET)
        fitting = ("scheduler", "other_scheduler", "guidance_scale", "guidance_begin", "guidance_end")
        opened = [about, controls["class_labels"], status, *(controls[name] for name in fitting)]
        controls["model"].change(on_model, controls["model"], opened, preprocess=False, **_QUIET)
        chosen = [controls[name] for name in ("model", "scheduler", "other_scheduler", "compare")]
        hidden = [controls[name] for name in ("eta", "other_scheduler", "other_guidance_scale")]
        gr.on([each.change for each in chosen], on_choice, chosen, hidden, preprocess=False, **_QUIET)
    limits = models.options
    return page.queue(max_size=limits.max_queue, default_concurrency_limit=limits.max_concurrent, api_open=False)


def _controls(models: ModelCache, pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    """The controls of the first column."""
    info = "A name of the list, a folder of this machine, or a Hub id." if models.takes_any else None
    shown = models.takes_any or len(models.names) > 1
    others: dict[str, Any] = {"info": info, "allow_custom_value": models.takes_any, "visible": shown}
    names = [(title(name), name) for name in models.names]
    model = gr.Dropdown(names, value=models.names[0], label="Model", elem_id="model", **others)
    classes = gr.Dropdown(**_classes(pipeline), label="Classes", elem_id="classes")
    with gr.Row(elem_id="seed-row"):
        number = gr.Number(2, label="Images per class", min_width=60, elem_id="per-class")
        seed = gr.Number(0, label="Seed", min_width=60, elem_id="seed")
        new_seed = gr.Button("New seed", size="sm", min_width=80, elem_id="new-seed")
    new_seed.click(None, None, seed, js=_NEW_SEED, **_QUIET)
    compare = gr.Radio([NOTHING, TWO_SCHEDULERS, TWO_SCALES], value=NOTHING, label="Compare", elem_id="compare")
    example = pipeline.noise_kind.example
    other = gr.Dropdown(_schedulers(pipeline), value=example, label="Other scheduler", visible=False)
    other_scale = gr.Number(5, label="Other guidance scale", visible=False, elem_id="other-scale")
    controls = {"model": model, "class_labels": classes, "num_images_per_label": number, "seed": seed}
    return controls | {"compare": compare, "other_scheduler": other, "other_guidance_scale": other_scale}


def _settings(models: ModelCache, pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    """The controls of the last column."""
    eta, shown = "0 is deterministic (DDIM), 1 as random as DDPM.", takes_eta(pipeline, OWN_SCHEDULER)
    guided = can_be_guided(pipeline)
    steps, begin = f"From 1 to {models.options.max_steps}.", "At this fraction of the steps."
    return {
        "guidance_scale": gr.Slider(
            0, 10, 2.5, step=0.1, label="Guidance scale", info="Up to 1 is no guidance.", visible=guided
        ),
        "num_inference_steps": gr.Number(20, label="Steps", info=steps, elem_id="steps"),
        "scheduler": gr.Dropdown(_schedulers(pipeline), value=OWN_SCHEDULER, label="Scheduler", elem_id="scheduler"),
        "eta": gr.Slider(0, 1, 0, step=0.05, label="Eta", info=eta, visible=shown, elem_id="eta"),
        "guidance_begin": gr.Slider(0, 1, 0, step=0.05, label="Guidance begins", info=begin, visible=guided),
        "guidance_end": gr.Slider(0, 1, 1, step=0.05, label="Guidance ends", visible=guided),
    }


def _about(name: str, pipeline: ClassConditionalPipeline) -> str:
    return f"<h1>{TITLE}</h1><p>{html.escape(facts(name, pipeline))}</p>"


def _classes(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    """Choices of the classes of a model, and those it begins with."""
    num_classes = pipeline.num_classes
    names = {str(number): class_caption(pipeline, number) for number in range(num_classes or 0)}
    choices = [(name if name == number else f"{name} ({number})", number) for number, name in names.items()]
    return {
        "choices": [*choices, *[("no class", "null")] * (pipeline.null_class is not None)],
        "value": list(names)[: 10 if len(names) <= 10 else 4],
        "multiselect": True,
        "visible": num_classes is not None,
        "info": "Type to search by name or number.",
    }


def _schedulers(pipeline: ClassConditionalPipeline) -> list[tuple[str, str]]:
    own, names = ("the model's own", OWN_SCHEDULER), scheduler_names(pipeline.noise_kind)
    return [own, *((name.removesuffix("Scheduler"), name) for name in names)]
