"""The model card of a pipeline: what a person who finds the repository on the Hub wants to know and to run."""

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..configs import CONFIG_DIR
from ..schedulers.original_schedule import original_cosine_betas
from ..utils.atomic_write import atomic_file
from .pipeline_class_conditional import ClassConditionalPipeline


CARD_NAME = "README.md"
SAMPLES_NAME = "samples.png"
# Stands in the card's code where the id is not known yet; pushing the folder puts the id in its place.
UNKNOWN_REPO_ID = "your-name/your-model"

_TEMPLATE = Path(__file__).with_name("model_card_template.md")

_MARK = "\n<!-- made by imagenet64_diffusion, digest "

# Given by the data and the run, not by the recipe.
_NOT_OF_THE_RECIPE = ("sample_size", "in_channels", "num_class_embeds", "num_train_timesteps", "dropout")


def write_model_card(
    pipeline: ClassConditionalPipeline, folder: str | Path, *, samples: Image.Image | None = None, **facts: Any
) -> Path:
    """Writes ``README.md``, and ``samples.png`` where samples are given, to a pipeline's folder.

    ``pipeline.save_pretrained(folder, push_to_hub=True, repo_id=...)`` uploads both with the pipeline.

    Args:
        pipeline: What the card is about; its facts are read from its configs.
        folder: Where to; what is there of these names is replaced.
        samples: A grid of generated images, such as `image_grid` makes.
        facts: The further arguments of `create_model_card`.

    Returns:
        The card's file.
    """
    folder = Path(folder)
    card = create_model_card(pipeline, has_samples=samples is not None, **facts)
    if samples is not None:
        with atomic_file(folder / SAMPLES_NAME) as writing:
            samples.save(writing)
    with atomic_file(folder / CARD_NAME) as writing:
        card.save(writing)
    return folder / CARD_NAME


def create_model_card(
    pipeline: ClassConditionalPipeline,
    *,
    repo_id: str | None = None,
    has_samples: bool = False,
    training_facts: Mapping[str, Any] | None = None,
    eval_results: Sequence[EvalResult] = (),
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
) -> ModelCard:
    """The card of a pipeline.

    Args:
        pipeline: What the card is about.
        repo_id: ``"user/name"`` on the Hub, for the card's code. Pushing a folder fills it in where it is not known.
        has_samples: Whether ``samples.png`` lies beside the card.
        training_facts: What to say of the training: name -> value.
        eval_results: Scores. ``metric_args`` should hold all that is needed to compare them: number of images, steps,
            guidance, reference, seed.
        datasets: Ids on the Hub of what it was trained on.
        license: Of the whole repository, as the Hub calls it. The source files in it are Apache-2.0.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    classes = unet.config.num_class_embeds
    conditional = classes is not None
    name = "Pixel-space diffusion" if repo_id is None else repo_id.rpartition("/")[2]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        # the Hub has no task of its own for images of classes; it counts them here, because no text is read
        pipeline_tag="unconditional-image-generation",
        tags=["class-conditional", "classifier-free-guidance"] * conditional
        + ["diffusion", "pixel-space", "ddpm", "ddim"],
        datasets=list(datasets) or None,
        metrics=sorted({result.metric_type for result in eval_results}) or None,
        model_name=name if eval_results else None,
        eval_results=list(eval_results) or None,
    )
    arguments, again = "num_inference_steps=50, generator=torch.Generator().manual_seed(0)", "num_inference_steps=15"
    if conditional:
        labels = [*_example_labels(pipeline), None]
        shown = "[" + ", ".join("None" if x is None else json.dumps(x, ensure_ascii=False) for x in labels) + "]"
        scale = f"guidance_scale={inspect.signature(type(pipeline).__call__).parameters['guidance_scale'].default}"
        arguments = f"""
    {shown},  # class ids or names; None is an image without class
    {scale},
    num_inference_steps=50,
    generator=[torch.Generator().manual_seed(seed) for seed in range({len(labels)})],
"""
        again = f"{shown}, {scale}, num_inference_steps=15"
    scores = [
        (
            result.metric_name or result.metric_type,
            result.metric_value,
            result.dataset_name,
            ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items()),
        )
        for result in eval_results
    ]
    # at the noisiest timesteps an error of a noise prediction is multiplied beyond repair; leading steps begin below
    predicts_noise = scheduler.config.get("prediction_type", "epsilon") == "epsilon"
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id or UNKNOWN_REPO_ID,
        conditional=conditional,
        what=f"{_image_size(pipeline)} images" + (f" of {classes:,} classes" if conditional else ""),
        has_samples=has_samples,
        samples_name=SAMPLES_NAME,
        arguments=arguments,
        again=again,
        spacing=', timestep_spacing="leading"' if predicts_noise else "",
        facts=_table(("", ""), _facts(pipeline).items()),
        training=_table(("", ""), training_facts.items()) if training_facts else "",
        evaluation=_table(("metric", "value", "data", "how it was evaluated"), scores) if eval_results else "",
    )
    card.text = card.text.rstrip() + "\n"
    card.text += _mark(str(card))
    return card


def is_untouched(card: str) -> bool:
    """Whether the text of a card is one that `create_model_card` made and nobody has changed since."""
    text, found, _ = card.rpartition(_MARK)
    return bool(found) and card == text + _mark(text)


def with_repo_id(card: str, repo_id: str) -> str:
    """The text of a card that was made before the repository's id was known, with the id in it."""
    text = card.rpartition(_MARK)[0] if is_untouched(card) else card
    filled_in = text.replace(UNKNOWN_REPO_ID, repo_id)
    return filled_in + _mark(filled_in) if is_untouched(card) else filled_in


def _mark(text: str) -> str:
    """A comment that tells later whether the text above it is as it was made."""
    return f"{_MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def recipe_name(unet_config: Mapping[str, Any]) -> str | None:
    """The recipe in ``configs`` that a network was made by, such as ``"res_res"``, or None for one of its own.

    Image size, channels, classes, timesteps and drop-out do not matter; of the original's time encodings all are one.
    """
    for file in [*sorted(CONFIG_DIR.glob("*.json")), *sorted(CONFIG_DIR.glob("original/*.json"))]:
        recipe = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name in recipe if not name.startswith("_") and name not in _NOT_OF_THE_RECIPE]
        if all(_comparable(recipe[name]) == _comparable(unet_config.get(name)) for name in names):
            return file.relative_to(CONFIG_DIR).with_suffix("").as_posix()
    return None


def _comparable(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("original_"):
        return "original"
    return list(value) if isinstance(value, tuple) else value


def _example_labels(pipeline: ClassConditionalPipeline, count: int = 2) -> list[int | str]:
    """Classes for the examples: by name where the first name of a class stands for it alone, else by id."""
    id2label, ids = pipeline.config.id2label or {}, range(min(count, pipeline.unet.config.num_class_embeds))
    names = [id2label.get(index, "").split(",")[0].strip() for index in ids]
    return [name if pipeline.labels.get(name) == index else index for index, name in enumerate(names)]


def _image_size(pipeline: ClassConditionalPipeline) -> str:
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = pipeline.unet.config.in_channels
    return f"{height}x{width} {({1: 'grey', 3: 'RGB'}).get(channels, f'{channels}-channel')}"


def _facts(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    config, scheduler = pipeline.unet.config, pipeline.scheduler
    recipe, count = recipe_name(config), pipeline.unet.num_parameters()
    call = inspect.signature(type(pipeline).__call__).parameters
    told = ["num_inference_steps", "eta"]
    facts = {
        "recipe": f"`{recipe}`" if recipe else "its own",
        "layers at every resolution": ", ".join(config.layer_types).replace("_", " "),
        "widths": f"{config.stem_channels} at the stem, then {', '.join(map(str, config.block_out_channels))}",
        "parameters": f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}",
        "images": _image_size(pipeline),
    }
    if config.num_class_embeds is not None:
        names = list((pipeline.config.id2label or {}).values())
        shown = f" ({'; '.join(names[:3])}{'; …' * (len(names) > 3)})" if names else " without names"
        facts["classes"] = f"{config.num_class_embeds:,}{shown}, and the null class"
        facts["class attention"] = config.class_attention_type
        told += ["guidance_scale", "guidance_interval"]
    prediction = scheduler.config.get("prediction_type", "epsilon")
    predicts = {"epsilon": "the noise", "sample": "the image"}.get(prediction, "the velocity")
    return facts | {
        "time embedding": config.time_embedding_type,
        "timesteps": f"{scheduler.config.num_train_timesteps:,}",
        "the network predicts": f"{predicts} (`{prediction}`), and the variance between its bounds (`learned_range`)",
        "noise schedule": _noise_schedule(scheduler.config),
        "stored scheduler": f"`{type(scheduler).__name__}`",
        "guidance of the variance": "yes, as the original program" if pipeline.config.guide_variance else "no",
        "defaults of a call": ", ".join(f"`{name}={call[name].default}`" for name in told),
    }


def _noise_schedule(config: Mapping[str, Any]) -> str:
    betas = config.get("trained_betas")
    if betas is not None:
        same = np.allclose(betas, original_cosine_betas(len(betas)), rtol=1e-5, atol=0)
        return ("the original program's cosine, " if same else "") + "stored as `trained_betas`"
    schedule = config.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":
        return f"cosine (`{schedule}`)"
    return f"`{schedule}`, beta from {config['beta_start']:g} to {config['beta_end']:g}"


def _table(header: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines)
