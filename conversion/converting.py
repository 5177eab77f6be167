"""Makes pipeline folders of published checkpoints: one checkpoint, or a folder of the original's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin

from ..data.class_names import class_names
from ..models.classifier_adm import ADMClassifierModel
from ..pipelines.model_card import CARD_NAME, push_folder, write_model_card
from ..pipelines.noise_kinds import EDMNoise
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import atomic_folder
from . import original
from .families import Source, check_value
from .network_pickles import read_pickle
from .pickle_reader import is_finite, read_checkpoint, require
from .published import MANIFEST_NAME, family_of, read_published


class Program(NamedTuple):
    """A program whose checkpoints are converted, the licence of its weights, and how it samples where published."""

    name: str
    license: str
    class_order: str
    sampler: str | None = None


_NVIDIAS = "cc-by-nc-sa-4.0"
PROGRAMS = {
    # the original program's licence is for its weights too
    "original": Program("the original program", "mit", "imagenet64"),
    "adm": Program("ADM (guided-diffusion)", "mit", "imagenet", "250 steps, classifier_scale 1.0"),
    "edm": Program("EDM", _NVIDIAS, "imagenet", "256 steps, S_churn 40, S_min 0.05, S_max 50, S_noise 1.003"),
    "edm2": Program("EDM2", _NVIDIAS, "imagenet", "32 steps without churn"),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# All that a conversion may have written, but for the code of its networks.
_OWN_NAMES = {"model_index.json", CARD_NAME, MANIFEST_NAME, original.PARAMS_NAME, original.UNUSED_WEIGHTS_NAME}
_OWN_NAMES |= {"unet", "scheduler", "guidance_unet", "classifier", "checkpoints"}


def convert_checkpoint(
    checkpoint: str | Path,
    params: str | Path | None = None,
    output_dir: str | Path | None = None,
    optimizer: str | Path | None = None,
    time_embedding: str = "original_sine",
    id2label: str | Path | Mapping[Any, str] | Sequence[str] | None = "auto",
    *,
    family: str = "auto",
    guidance_checkpoint: str | Path | None = None,
    classifier_checkpoint: str | Path | None = None,
    dtype: str = "float32",
    variant: str | None = None,
    finish_denoising: bool = False,
    push_to_hub: str | None = None,
) -> ClassConditionalPipeline:
    """Converts one published checkpoint, prints what there is to know about it, and gives the pipeline of the folder.

    Nothing in the files is run. The folder is written atomically and replaces an earlier conversion, nothing else.

    Args:
        checkpoint: The original's ``model_*.pkl``, ADM's ``*_diffusion.pt``, or a pickle of EDM or EDM2.
        params: The original's ``model_params_*.json``, by default the one beside the checkpoint; for ADM the flags of
            its program, ``{"model": {...}, "classifier": {...}}`` or all in one, which released files do not need.
        output_dir: The pipeline folder to write.
        optimizer: The original's ``optim_*.pkl``; the folder then has a checkpoint from which the training resumes.
        time_embedding: ``"original_sine"`` samples as the original does, one image at a time; its checkpoints were
            trained with ``"original_alternating"``, those of its corrected code with ``"original_interleaved"``.
        id2label: As `class_names` has it; ``"auto"`` is ``"imagenet64"``, ImageNet-64's own order, for the original's
            checkpoints, and ``"imagenet"``, that of the sorted WordNet ids, for all others.
        family: ``"original"``, ``"adm"``, ``"edm"`` or ``"edm2"``; ``"auto"`` is what the checkpoint holds.
        guidance_checkpoint: A second, weaker or unconditional network of the same kind, for guidance.
        classifier_checkpoint: ADM's ``*_classifier.pt``, for classifier guidance.
        dtype: What the weights are stored in, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        variant: Name of the files of weights, such as ``"fp16"``.
        finish_denoising: Whether the original's last step ends at the predicted image. It leaves noise of 0.03.
        push_to_hub: Hub id to upload the pipeline to, after the folder is complete.

    Raises:
        ValueError: A file or an option is not what it should be. Nothing has been written then.
    """
    require(output_dir is not None, "output_dir is None, but must be the folder to write")
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)  # type: ignore[arg-type]
    check_value("dtype", dtype, tuple(DTYPES))
    plain = re.fullmatch(r"[A-Za-z0-9_-]+", "none" if variant is None else variant)
    require(plain, f"variant is {variant!r}, but must be made of letters and digits, such as fp16")
    check_value("family", family, ("auto", *PROGRAMS))
    _check_replaceable(output_dir)

    name, found = checkpoint.name, read_checkpoint(checkpoint, read_pickle)
    held = family_of(name, found)
    program = PROGRAMS[held]
    require(family in ("auto", held), f"family is {family}, but {name} is one of {program.name}")
    guides = {"guidance_checkpoint": guidance_checkpoint, "classifier_checkpoint": classifier_checkpoint}
    if held == "original":
        _refuse(program, **guides)
        source = original.read_original(checkpoint, found, params, optimizer, time_embedding, finish_denoising)
    else:
        chosen = time_embedding if time_embedding != "original_sine" else None
        _refuse(program, optimizer=optimizer, finish_denoising=finish_denoising or None, time_embedding=chosen)
        source = read_published(name, found, params, **guides)
    del found
    labels = class_names(id2label, source.components["unet"].config.num_class_embeds, program.class_order)
    pipeline = ClassConditionalPipeline(id2label=labels, guide_variance=held == "original", **source.components)
    with atomic_folder(output_dir) as writing:
        source.write_more(writing)
        _cast_and_check(pipeline, DTYPES[dtype], name)
        pipeline.save_pretrained(writing, variant=variant)
        published = {"published sampler": program.sampler} if program.sampler else {}
        facts = {"converted from": f"{name} of {program.name}", **source.card_facts, **published}
        write_model_card(pipeline, writing, training_facts=facts, license=program.license)
    _print_report(f"converted {checkpoint} to {output_dir}", source, program, labels)
    del pipeline, source
    # a pipeline of which nothing lies in the checkpoint's file
    converted = ClassConditionalPipeline.from_pretrained(output_dir, variant=variant, dtype=DTYPES[dtype])
    if push_to_hub is not None:
        # without the optimizer's state, twice the size of the model and of use to one person
        push_folder(converted, output_dir, push_to_hub, leave_out=("checkpoints",))
        print(f"  uploaded   {push_to_hub}")
    return converted


def _refuse(program: Program, **options: Any) -> None:
    for option, value in options.items():
        whose = f"a checkpoint of {program.name}"
        require(value is None, f"{option} is {value}, but does not go with {whose}: leave it out")


def _print_report(title: str, source: Source, program: Program, labels: dict[int, str] | None) -> None:
    report = {
        **source.report,
        "published": f"sampled with {program.sampler}" if program.sampler else "",
        "classes": f"{len(labels)}, named {labels[0]}, ..., {labels[len(labels) - 1]}" if labels else "none",
        "licence": program.license,
        "checked": f"all {source.num_weights} weights accounted for, shapes right, one forward pass finite",
    }
    print(title, *(f"  {name:10} {words}" for name, words in report.items() if words), sep="\n", flush=True)


def _check_replaceable(output_dir: Path) -> None:
    """Refuses a folder that holds anything but an earlier conversion."""
    usual = output_dir.name not in ("", "..") and not output_dir.is_file()
    require(usual, f"output_dir is {output_dir}, but must be the name of a new folder")
    held = {path.name for path in output_dir.glob("*") if path.suffix != ".py"}
    if held & {original.PARAMS_NAME, MANIFEST_NAME}:
        # training may have resumed there
        params = output_dir / original.PARAMS_NAME
        own = output_dir / original.training_state_path(original.read_params(params)) if params.is_file() else None
        states = {f"checkpoints/{path.name}" for path in output_dir.glob("checkpoints/*") if path != own}
        held = held - _OWN_NAMES | states
    require(not held, f"output_dir is {output_dir}, which holds {min(held, default='')}, but must be new or its own")


def _cast_and_check(pipeline: ClassConditionalPipeline, dtype: torch.dtype, name: str) -> None:
    """Gives the weights of all networks their dtype, and sees that one prediction of each is finite."""
    # sigma 1, or the middle of the training's timesteps
    timestep = 0.0 if pipeline.noise_kind is EDMNoise else pipeline.scheduler.config.num_train_timesteps // 2
    networks = {role: each for role, each in pipeline.components.items() if isinstance(each, ModelMixin)}
    for role, network in networks.items():
        kept, name_of_it = network._keep_in_fp32_modules or [], f"{name} ({role})"
        for key, tensor in (*network.named_parameters(), *network.named_buffers()):
            if tensor.is_floating_point() and not any(part in key for part in kept):
                tensor.data = tensor.data.to(dtype)
            fits = is_finite(tensor)
            require(fits, f"{name_of_it}: {key} holds numbers too large for {dtype}: take another dtype")
        config, size = network.config, network.config.sample_size
        if not isinstance(network, ADMClassifierModel):
            # as small as the network takes, with two by two cells in its middle: CPUs are slow at half precision
            size = min(2 ** (len(config.get("block_out_channels") or config.channel_mult) + 1), size)
        sample = torch.randn(1, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
        classes = {"class_labels": torch.zeros(1, dtype=torch.int64)} if config.get("num_class_embeds") else {}
        with torch.no_grad():
            (output,) = network(sample.to(dtype), timestep, **classes, return_dict=False)
        fits = is_finite(output)
        require(fits, f"the prediction of {name_of_it} is not finite: its weights are no trained model's")


def convert_folder(folder: Path, output_dir: Path, **options: Any) -> None:
    """Converts every ``model_*e_*s.pkl`` below a folder with the files beside it; an error counts what failed."""
    checkpoints = [path for path in sorted(folder.rglob("model_*.pkl")) if original.MODEL_NAME.fullmatch(path.name)]
    require(checkpoints, f"checkpoint is {folder}, which holds no model_...e_...s.pkl")
    rows: list[str] = []
    num_failed = 0
    for checkpoint in checkpoints:
        name, source = checkpoint.stem.removeprefix("model_"), checkpoint.relative_to(folder)
        target, optimizer = output_dir / source.parent / name, checkpoint.with_name(f"optim_{name}.pkl")
        given = optimizer if optimizer.is_file() else None
        try:
            unet = convert_checkpoint(checkpoint, original.params_beside(checkpoint), target, given, **options).unet
            rows.append(f"{source!s:40} converted  {unet.num_parameters() / 1e6:7.1f} M  {target}")
        except (ValueError, OSError) as error:
            rows.append(f"{source!s:40} failed     {error}")
            num_failed += 1
    print("\ncheckpoint" + " " * 31 + "result     parameters or what is wrong", *rows, sep="\n", flush=True)
    require(not num_failed, f"{num_failed} of {len(rows)} checkpoints could not be converted")
