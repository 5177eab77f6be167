"""The model card of a pipeline: what a person who finds the repository on the Hub wants to know and to run."""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

_MARK = "\n<!-- made by imagenet64_diffusion, digest "

# Given by the data and the run, not by the recipe.
_NOT_OF_THE_RECIPE = ("sample_size", "in_channels", "num_class_embeds", "num_train_timesteps", "dropout")


def write_model_card(
    pipeline: ClassConditionalPipeline,
    folder: str | Path,
    *,
    repo_id: str | None = None,
    samples: Image.Image | None = None,
    training_facts: Mapping[str, Any] | None = None,
    eval_results: Sequence[EvalResult] = (),
    datasets: Sequence[str] = (),
    license: str = "apache-2.0",
) -> Path:
    """Writes ``README.md``, and ``samples.png`` where samples are given, to a pipeline's folder.

    ``pipeline.save_pretrained(folder, push_to_hub=True, repo_id=...)`` uploads both with the pipeline.

    Args:
        pipeline: What the card is about; its facts are read from its configs.
        folder: Where to; what is there of these names is replaced.
        repo_id: ``"user/name"`` on the Hub, for the card's code. Pushing the folder fills it in where it is not known
            yet.
        samples: A picture of drawn images, such as `pictures.image_grid` makes.
        training_facts: What to say of the training: name -> value.
        eval_results: Measured numbers. ``metric_args`` should hold all that is needed to compare them: number of
            images, steps, guidance, reference, seed.
        datasets: Ids on the Hub of what it was trained on.
        license: Of the whole repository, as the Hub calls it. The source files in it are Apache-2.0.

    Returns:
        The card's file.
    """
    folder = Path(folder)
    if samples is not None:
        with atomic_file(folder / SAMPLES_NAME) as writing:
            samples.save(writing)
    card = create_model_card(
        pipeline,
        repo_id=repo_id,
        has_samples=samples is not None,
        training_facts=training_facts,
        eval_results=eval_results,
        datasets=datasets,
        license=license,
    )
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
    """The card of a pipeline; arguments as for `write_model_card`.

    Args:
        has_samples: Whether ``samples.png`` lies beside the card.
    """
    conditional = pipeline.unet.config.num_class_embeds is not None
    name = "Pixel-space diffusion" if repo_id is None else repo_id.rpartition("/")[2]
    tags = ["diffusion", "pixel-space", "ddpm", "ddim"]
    if conditional:
        tags = ["class-conditional", "classifier-free-guidance", *tags]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        # the Hub has no task of its own for images of classes; it counts them here, because no text is read
        pipeline_tag="unconditional-image-generation",
        tags=tags,
        datasets=list(datasets) or None,
        metrics=sorted({result.metric_type for result in eval_results}) or None,
        model_name=name if eval_results else None,
        eval_results=list(eval_results) or None,
    )
    sections = [
        _introduction(pipeline, name, has_samples),
        _use(pipeline, repo_id or UNKNOWN_REPO_ID),
        "## The model\n\n" + _table(("", ""), _facts(pipeline).items()),
    ]
    if training_facts:
        sections.append("## Training\n\n" + _table(("", ""), training_facts.items()))
    if eval_results:
        sections.append("## Evaluation\n\n" + _evaluation(eval_results))
    sections += [_limits(pipeline), _PAPERS]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
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
    files = sorted(CONFIG_DIR.glob("*.json")) + sorted(CONFIG_DIR.glob("original/*.json"))
    for file in files:
        recipe = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name in recipe if not name.startswith("_") and name not in _NOT_OF_THE_RECIPE]
        if all(_comparable(recipe[name]) == _comparable(unet_config.get(name)) for name in names):
            return file.relative_to(CONFIG_DIR).with_suffix("").as_posix()
    return None


def _comparable(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("original_"):
        return "original"
    return list(value) if isinstance(value, tuple) else value


def _introduction(pipeline: ClassConditionalPipeline, name: str, has_samples: bool) -> str:
    classes = pipeline.unet.config.num_class_embeds
    what = f"{_image_size(pipeline)} images" + (f" of {classes:,} classes" if classes is not None else "")
    how = "in pixel space" + (", with classifier-free guidance" if classes is not None else "")
    text = f"# {name}\n\nDraws {what} by denoising {how}. A 🧨 diffusers pipeline."
    if has_samples:
        text += f"\n\n![Images drawn by this model]({SAMPLES_NAME})"
    return text


def _use(pipeline: ClassConditionalPipeline, repo_id: str) -> str:
    """Code that runs as it stands."""
    conditional = pipeline.unet.config.num_class_embeds is not None
    defaults = inspect.signature(type(pipeline).__call__).parameters
    if conditional:
        labels = [*_example_labels(pipeline), None]
        arguments = f"""
    {_python_list(labels)},  # class ids or names; None is an image without class
    guidance_scale={defaults["guidance_scale"].default},
    num_inference_steps=50,
    generator=[torch.Generator().manual_seed(seed) for seed in range({len(labels)})],
"""
        again = f"{_python_list(labels)}, guidance_scale={defaults['guidance_scale'].default}, num_inference_steps=15"
    else:
        arguments = "num_inference_steps=50, generator=torch.Generator().manual_seed(0)"
        again = "num_inference_steps=15"
    # at the noisiest timesteps an error of a noise prediction is multiplied beyond repair; leading steps begin below
    predicts_noise = pipeline.scheduler.config.get("prediction_type", "epsilon") == "epsilon"
    spacing = ', timestep_spacing="leading"' if predicts_noise else ""
    return f'''## Use

With diffusers alone:

```python
import torch
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
images = pipeline({arguments}).images
images[0].save("image.png")
```

`trust_remote_code=True` lets diffusers run the Python files of this repository. They import torch and diffusers only;
read them, and give the commit that you have read as `revision`.

Any diffusers scheduler takes the place of the stored one, on the same noise schedule:

```python
from diffusers import UniPCMultistepScheduler

pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config{spacing})
images = pipeline({again}).images
```

With the package `imagenet64_diffusion` installed, its own classes are used and no code is downloaded:

```python
from imagenet64_diffusion import ClassConditionalPipeline

pipeline = ClassConditionalPipeline.from_pretrained("{repo_id}")
```

Offline, diffusers loads code from a folder only. Run this once online; with `HF_HUB_OFFLINE=1` it finds the copy then:

```python
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

pipeline = DiffusionPipeline.from_pretrained(snapshot_download("{repo_id}"), trust_remote_code=True)
```'''


def _python_list(labels: list[Any]) -> str:
    """A list as a person writes it, with double quotes."""
    return (
        "[" + ", ".join("None" if label is None else json.dumps(label, ensure_ascii=False) for label in labels) + "]"
    )


def _example_labels(pipeline: ClassConditionalPipeline, count: int = 2) -> list[int | str]:
    """Classes for the examples: by name where the first name of a class stands for it alone, else by id."""
    id2label = pipeline.config.id2label or {}
    labels: list[int | str] = []
    for index in range(min(count, pipeline.unet.config.num_class_embeds)):
        name = id2label.get(index, "").split(",")[0].strip()
        labels.append(name if pipeline.labels.get(name) == index else index)
    return labels


def _image_size(pipeline: ClassConditionalPipeline) -> str:
    size = pipeline.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = pipeline.unet.config.in_channels
    return f"{height}x{width} {({1: 'grey', 3: 'RGB'}).get(channels, f'{channels}-channel')}"


def _facts(pipeline: ClassConditionalPipeline) -> dict[str, Any]:
    unet, scheduler = pipeline.unet, pipeline.scheduler
    config = unet.config
    recipe = recipe_name(config)
    layers = ", ".join(layer.replace("_", " ") for layer in config.layer_types)
    widths = ", ".join(str(width) for width in config.block_out_channels)
    facts = {
        "recipe": f"`{recipe}`" if recipe else "its own",
        "layers at every resolution": layers,
        "widths": f"{config.stem_channels} at the stem, then {widths}",
        "parameters": _millions(unet.num_parameters()),
        "images": _image_size(pipeline),
    }
    if config.num_class_embeds is not None:
        facts["classes"] = f"{config.num_class_embeds:,}{_class_names(pipeline)}, and the null class"
        facts["class attention"] = config.class_attention_type
    facts |= {
        "time embedding": config.time_embedding_type,
        "timesteps": f"{scheduler.config.num_train_timesteps:,}",
        "the network predicts": f"{_prediction(scheduler)}, and the variance between its bounds (`learned_range`)",
        "noise schedule": _noise_schedule(scheduler),
        "stored scheduler": f"`{type(scheduler).__name__}`",
        "guidance of the variance": "yes, as the original program" if pipeline.config.guide_variance else "no",
        "defaults of a call": _call_defaults(pipeline),
    }
    return facts


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


def _class_names(pipeline: ClassConditionalPipeline) -> str:
    names = list((pipeline.config.id2label or {}).values())
    if not names:
        return " without names"
    shown = "; ".join(names[:3])
    return f" ({shown}{'; …' if len(names) > 3 else ''})"


def _prediction(scheduler: Any) -> str:
    prediction = scheduler.config.get("prediction_type", "epsilon")
    return {"epsilon": "the noise (`epsilon`)", "sample": "the image (`sample`)"}.get(
        prediction, f"the velocity (`{prediction}`)"
    )


def _noise_schedule(scheduler: Any) -> str:
    config = scheduler.config
    if config.get("trained_betas") is not None:
        betas = [float(beta) for beta in config.trained_betas]
        original = [float(beta) for beta in original_cosine_betas(len(betas))]
        same = all(math.isclose(one, other, rel_tol=1e-5) for one, other in zip(betas, original, strict=True))
        return "the original program's cosine, stored as `trained_betas`" if same else "stored as `trained_betas`"
    schedule = config.get("beta_schedule", "linear")
    if schedule == "squaredcos_cap_v2":
        return "cosine (`squaredcos_cap_v2`)"
    return f"`{schedule}`, beta from {config.beta_start:g} to {config.beta_end:g}"


def _call_defaults(pipeline: ClassConditionalPipeline) -> str:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    names = ["num_inference_steps", "eta"]
    if pipeline.unet.config.num_class_embeds is not None:
        names += ["guidance_scale", "guidance_interval"]
    return ", ".join(f"`{name}={parameters[name].default}`" for name in names)


def _evaluation(eval_results: Sequence[EvalResult]) -> str:
    rows = [
        (
            result.metric_name or result.metric_type,
            result.metric_value,
            result.dataset_name,
            ", ".join(f"{name} {value}" for name, value in (result.metric_args or {}).items()),
        )
        for result in eval_results
    ]
    return _table(("metric", "value", "data", "how it was measured"), rows)


def _limits(pipeline: ClassConditionalPipeline) -> str:
    knows = " and knows the classes above alone" if pipeline.unet.config.num_class_embeds is not None else ""
    return (
        f"## Limits\n\nIt reads no text{knows}. It shows what its training data shows, with their gaps and prejudices."
    )


_PAPERS = """## Papers

[2006.11239](https://arxiv.org/abs/2006.11239) DDPM ·
[2102.09672](https://arxiv.org/abs/2102.09672) learned variance ·
[2010.02502](https://arxiv.org/abs/2010.02502) DDIM ·
[2207.12598](https://arxiv.org/abs/2207.12598) classifier-free guidance ·
[2202.00512](https://arxiv.org/abs/2202.00512) velocity prediction"""


def _table(header: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines)
