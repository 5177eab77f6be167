"""What a repository on the Hub gets beside the model: a card with its facts, and everything in one commit."""

import hashlib
import inspect
import json
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from PIL import Image

from ..configs import CONFIG_DIR
from ..schedulers.original_schedule import original_cosine_betas
from ..utils.atomic_write import atomic_file
from .noise_kinds import VariancePreserving
from .pipeline_class_conditional import ClassConditionalPipeline


logger = logging.get_logger(__name__)

CARD_NAME, SAMPLES_NAME = "README.md", "samples.png"
# Stands in the card's code where the id is not known yet; pushing the folder puts the id in its place.
UNKNOWN_REPO_ID = "your-name/your-model"
_MARK = "\n<!-- made by imagenet64_diffusion, digest "
# Given by the data and the run, not by the recipe.
_NOT_OF_THE_RECIPE = ("sample_size", "in_channels", "num_class_embeds", "num_train_timesteps", "dropout")

_PAPERS = {
    True: {
        "2006.11239": "DDPM",
        "2102.09672": "learned variance",
        "2010.02502": "DDIM",
        "2202.00512": "velocity prediction",
    },
    False: {"2206.00364": "noise levels and sampler", "2312.02696": "EDM2"},
}


def write_model_card(
    pipeline: ClassConditionalPipeline, folder: str | Path, *, samples: Image.Image | None = None, **facts: Any
) -> Path:
    """Writes ``README.md``, and ``samples.png`` where samples are given, to a pipeline's folder; the card's file.

    ``pipeline.save_pretrained(folder, push_to_hub=True, repo_id=...)`` uploads both with the pipeline.

    Args:
        pipeline: What the card is about.
        folder: Where it is saved.
        samples: A grid of images, such as `image_grid` makes.
        facts: ``repo_id``, ``"user/name"`` on the Hub, for the card's code; pushing a folder fills it in where it is
            not known. ``training_facts``: what to say of the training, name -> value. ``eval_results``: scores, whose
            ``metric_args`` should hold all that is needed to compare them (number of images, steps, guidance,
            reference, seed). ``datasets``: ids on the Hub. ``license``: that of the repository, as the Hub calls it.
    """
    card = create_model_card(pipeline, has_samples=samples is not None, **facts)
    if samples is not None:
        with atomic_file(Path(folder) / SAMPLES_NAME) as writing:
            samples.save(writing)
    with atomic_file(Path(folder) / CARD_NAME) as writing:
        card.save(writing)
    return Path(folder) / CARD_NAME


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
    """The card of a pipeline; the arguments are the facts of `write_model_card`."""
    unet, noise, id2label = pipeline.unet.config, pipeline.scheduler.config, pipeline.config.id2label or {}
    num_classes, null_class, betas = pipeline.num_classes, pipeline.null_class, noise.get("trained_betas")
    conditional, has_timesteps = num_classes is not None, pipeline.noise_kind is VariancePreserving
    name = "Pixel-space diffusion" if repo_id is None else repo_id.rpartition("/")[2]
    # by name where the first name of a class stands for it alone, else by id
    shown = {index: id2label.get(index, "").split(",")[0].strip() for index in range(min(2, num_classes or 0))}
    labels = [label if pipeline.labels.get(label) == index else index for index, label in shown.items()]
    card = ModelCard.from_template(
        ModelCardData(
            license=license,
            library_name="diffusers",
            # the Hub has no task of its own for images of classes; it counts them here, because no text is read
            pipeline_tag="unconditional-image-generation",
            tags=["class-conditional"] * conditional
            + ["classifier-free-guidance"] * (null_class is not None)
            + ["diffusion", "pixel-space", *(("ddpm", "ddim") if has_timesteps else ("edm",))],
            datasets=list(datasets) or None,
            metrics=sorted({result.metric_type for result in eval_results}) or None,
            model_name=name if eval_results else None,
            eval_results=list(eval_results) or None,
        ),
        template_path=str(Path(__file__).with_name("model_card_template.md")),
        name=name,
        repo_id=repo_id or UNKNOWN_REPO_ID,
        conditional=conditional,
        samples_name=SAMPLES_NAME if has_samples else None,
        labels=[*(json.dumps(label, ensure_ascii=False) for label in labels), *["None"] * (null_class is not None)],
        guidance_scale=2.0 if pipeline.guidance_unet is not None else 5.0 if null_class is not None else None,
        has_timesteps=has_timesteps,
        predicts_variance=unet.get("out_channels", 2 * unet.in_channels) == 2 * unet.in_channels and has_timesteps,
        papers=_PAPERS[has_timesteps]
        | ({"2207.12598": "classifier-free guidance"} if null_class is not None else {})
        | ({"2406.02507": "autoguidance"} if pipeline.guidance_unet is not None else {}),
        pipeline=pipeline,
        unet=unet,
        noise=noise,
        is_original_noise=bool(betas) and np.allclose(betas, original_cosine_betas(len(betas)), rtol=1e-5, atol=0),
        recipe=recipe_name(unet),
        defaults={key: each.default for key, each in inspect.signature(type(pipeline).__call__).parameters.items()},
        training_facts=training_facts,
        scores=eval_results,
    )
    return ModelCard(_sealed(str(card).rstrip() + "\n"))


def recipe_name(unet_config: Mapping[str, Any]) -> str | None:
    """The recipe in ``configs`` that a network was made by, such as ``"res_res"``; None for one of its own."""

    def of_the_recipe(config: Mapping[str, Any], names: Sequence[str]) -> str:
        # of the original's time encodings all are one
        values = json.dumps([config.get(name) for name in names if name not in _NOT_OF_THE_RECIPE])
        return re.sub(r"original_(interleaved|sine|alternating)", "original", values)

    for file in [*sorted(CONFIG_DIR.glob("*.json")), *sorted(CONFIG_DIR.glob("original/*.json"))]:
        recipe = json.loads(file.read_text(encoding="utf-8"))
        names = [name for name in recipe if not name.startswith("_")]
        if of_the_recipe(recipe, names) == of_the_recipe(unet_config, names):
            return file.relative_to(CONFIG_DIR).with_suffix("").as_posix()
    return None


def _sealed(text: str) -> str:
    """The text with a comment that tells later whether it is still as it was made."""
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->\n"


def _is_untouched(card: str) -> bool:
    return card == _sealed(card.rpartition(_MARK)[0])


def push_pipeline(pipeline: ClassConditionalPipeline, *args: Any, **kwargs: Any) -> CommitInfo:
    """Saves a pipeline and uploads it; further arguments are those of `DiffusionPipeline.push_to_hub`."""
    given = inspect.signature(DiffusionPipeline.push_to_hub).bind(pipeline, *args, **kwargs).arguments
    saving = {name: given.pop(name) for name in ("safe_serialization", "variant") if name in given}
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder, **saving)
        return push_folder(given.pop("self"), folder, **given)


def push_folder(
    pipeline: ClassConditionalPipeline,
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    leave_out: Collection[str] = (),
) -> CommitInfo:
    """Uploads a saved pipeline's folder in one commit, without hidden files and those at its top that are left out.

    A ``README.md`` in the repository stays if somebody has written or changed it, and gives way to the folder's if it
    was made here. Where neither has one, it is made of the pipeline.
    """
    api, folder = HfApi(token=token), Path(folder)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name.parts[0] not in leave_out and not any(p[0] == "." for p in name.parts)]
    additions: dict[str, str | bytes] = {name.as_posix(): str(folder / name) for name in names}  # or the content
    own = additions.pop(CARD_NAME, None)
    if subfolder is None:  # the card is for the root
        card = None if own is None else Path(str(own)).read_text(encoding="utf-8")
        if not api.file_exists(repo_id, CARD_NAME):
            card = card or str(create_model_card(pipeline, repo_id=repo_id))
        elif card is not None:
            with tempfile.TemporaryDirectory() as place:
                present = Path(api.hf_hub_download(repo_id, CARD_NAME, local_dir=place)).read_bytes()
            if not _is_untouched(present.decode("utf-8", "replace")):
                logger.warning(f"{repo_id} keeps its {CARD_NAME}, which somebody has written or changed; not {own!s}")
                card = None
        if card is not None:
            text = card.replace(UNKNOWN_REPO_ID, repo_id)
            additions[CARD_NAME] = (_sealed(text.rpartition(_MARK)[0]) if _is_untouched(card) else text).encode()
    prefix = "" if subfolder is None else f"{subfolder.strip('/')}/"
    # not upload_folder, which may spread what takes long over several commits
    return api.create_commit(
        repo_id,
        [CommitOperationAdd(prefix + name, content) for name, content in additions.items()],
        commit_message=commit_message or f"Upload {type(pipeline).__name__}",
        create_pr=create_pr,
    )
