"""Makes pipeline folders of published checkpoints: one checkpoint, or a folder of the original's."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..models.classifier_adm import ADMClassifierModel
from ..pipelines.model_card import CARD_NAME, push_folder, write_model_card
from ..pipelines.noise_kinds import EDMNoise
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import atomic_folder
from ..utils.nearest_names import perhaps
from . import network_pickles, original
from .original_pipelines import (
    MODEL_NAME,
    PARAMS_NAME,
    UNUSED_WEIGHTS_NAME,
    params_beside,
    read_original,
    training_state_path,
)
from .pickle_reader import is_finite, read_checkpoint, require
from .published import MANIFEST_NAME, family_of, read_published
from .sources import PROGRAMS, Source


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_OWN_NAMES = {"model_index.json", CARD_NAME, PARAMS_NAME, UNUSED_WEIGHTS_NAME, MANIFEST_NAME, "checkpoints"}
_OWN_NAMES |= {"unet", "scheduler", "guidance_unet", "classifier"}


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
    """Converts one published checkpoint and prints what there is to know about it.

    Nothing in the files is run. The folder is written atomically and replaces an earlier conversion, nothing else.

    Args:
        checkpoint: The original's ``model_*.pkl`` or ADM's ``*_diffusion.pt``, in either format of torch.save, or a
            pickle of EDM or EDM2.
        params: The original's ``model_params_*.json``, by default the one beside the checkpoint; for ADM the flags of
            its program, ``{"model": {...}, "classifier": {...}}`` or all in one, which released files do not need.
        output_dir: The pipeline folder to write.
        optimizer: The original's ``optim_*.pkl``; the folder then has a checkpoint from which the training resumes.
        time_embedding: Of the original's networks. ``"original_sine"`` samples as the original does, one image at a
            time; released checkpoints were trained with ``"original_alternating"``, those of its corrected code with
            ``"original_interleaved"``.
        id2label: Class names. ``"imagenet64"`` are those of ImageNet-64's own order, ``"imagenet"`` of the sorted
            WordNet ids, both where there are 1000 classes, else numbers; ``"auto"`` is the first for the original's
            checkpoints and the second for all others. Or ``"numbers"`` or None, a file of names, or the names.
        family: ``"original"``, ``"adm"``, ``"edm"`` or ``"edm2"``; ``"auto"`` is what the checkpoint holds.
        guidance_checkpoint: A second, weaker or unconditional network of the same kind, for guidance.
        classifier_checkpoint: ADM's ``*_classifier.pt``, for classifier guidance.
        dtype: What the weights are stored in, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        variant: Name of the files of weights, such as ``"fp16"``.
        finish_denoising: Whether the original's last step ends at the predicted image. It leaves noise of 0.03.
        push_to_hub: Hub id to upload the pipeline to, after the folder is complete.

    Returns:
        The pipeline, loaded from the folder.

    Raises:
        CheckpointError: A ValueError: a file or an option is not what it should be. Nothing has been written then.
    """
    require(output_dir is not None, "output_dir is None, but must be the folder to write")
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)  # type: ignore[arg-type]
    require(dtype in DTYPES, f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    plain = variant is None or re.fullmatch(r"[A-Za-z0-9_-]+", variant)
    require(plain, f"variant is {variant!r}, but must be made of letters and digits, such as fp16")
    families = ("auto", *PROGRAMS)
    known = family in families
    require(known, f"family is {family!r}, but must be one of {', '.join(families)}{perhaps(family, families)}")
    _check_replaceable(output_dir)

    found = read_checkpoint(checkpoint, network_pickles.read_pickle)
    held = family_of(checkpoint.name, found)
    require(family in ("auto", held), f"family is {family}, but {checkpoint.name} is one of {PROGRAMS[held].name}")
    others = {"guidance_checkpoint": guidance_checkpoint, "classifier_checkpoint": classifier_checkpoint}
    given = {name: None if file is None else Path(file) for name, file in others.items()}
    if held == "original":
        _refuse(held, **given)
        files = Path(params or params_beside(checkpoint)), None if optimizer is None else Path(optimizer)
        source = read_original(checkpoint, found, *files, time_embedding, finish_denoising, id2label)
    else:
        _refuse(held, optimizer=optimizer, finish_denoising=finish_denoising or None)
        _refuse(held, time_embedding=None if time_embedding == "original_sine" else time_embedding)
        flags = None if params is None else Path(params)
        source = read_published(checkpoint, found, flags, id2label, **given)
    del found
    _write(source, held, checkpoint, output_dir, DTYPES[dtype], variant)
    del source
    # a pipeline of which nothing lies in the checkpoint's file
    converted = ClassConditionalPipeline.from_pretrained(output_dir, variant=variant, dtype=DTYPES[dtype])
    if push_to_hub is not None:
        # without the optimizer's state, twice the size of the model and of use to one person
        push_folder(converted, output_dir, push_to_hub, leave_out=("checkpoints",))
        print(f"  uploaded   {push_to_hub}")
    return converted


def _refuse(family: str, **options: Any) -> None:
    for name, value in options.items():
        program = PROGRAMS[family].name
        require(value is None, f"{name} is {value}, but does not go with a checkpoint of {program}: leave it out")


def _write(
    source: Source, family: str, checkpoint: Path, output_dir: Path, dtype: torch.dtype, variant: str | None
) -> None:
    """Writes the folder and prints the report."""
    pipeline, program = source.pipeline, PROGRAMS[family]
    labels = pipeline.config.id2label
    with atomic_folder(output_dir) as writing:
        source.write_more(writing)
        # sigma 1, or the middle of the training's timesteps
        timestep = 0.0 if pipeline.noise_kind is EDMNoise else pipeline.scheduler.config.num_train_timesteps // 2
        for role, component in pipeline.components.items():
            if isinstance(component, ModelMixin):
                _cast_and_check(component, dtype, timestep, f"{checkpoint.name} ({role})")
        pipeline.save_pretrained(writing, variant=variant)
        facts = {"converted from": f"{checkpoint.name} of {program.name}", **source.card_facts}
        facts |= {"published sampler": program.sampler} if program.sampler else {}
        write_model_card(pipeline, writing, training_facts=facts, license=program.license)
    report = dict(source.report)
    report["classes"] = f"{len(labels)}, named {labels[0]}, ..., {labels[len(labels) - 1]}" if labels else "none"
    report["licence"] = program.license
    report["checked"] = f"all {source.num_weights} weights accounted for, shapes right, one forward pass finite"
    print(f"converted {checkpoint} to {output_dir}")
    print("\n".join(f"  {name:10} {words}" for name, words in report.items() if words), flush=True)


def _check_replaceable(output_dir: Path) -> None:
    """Refuses a folder that holds anything but an earlier conversion."""
    usual = output_dir.name not in ("", "..") and not output_dir.is_file()
    require(usual, f"output_dir is {output_dir}, but must be the name of a new folder")
    held = {path.name for path in output_dir.glob("*") if path.suffix != ".py"}
    if held & {PARAMS_NAME, MANIFEST_NAME}:
        # training may have resumed there
        own = training_state_path(original.read_params(output_dir / PARAMS_NAME)) if PARAMS_NAME in held else None
        held -= _OWN_NAMES
        held |= {
            f"checkpoints/{path.name}" for path in output_dir.glob("checkpoints/*") if path != output_dir / (own or "")
        }
    require(not held, f"output_dir is {output_dir}, which holds {min(held, default='')}, but must be new or its own")


def _cast_and_check(network: ModelMixin, dtype: torch.dtype, timestep: float, name: str) -> None:
    kept = network._keep_in_fp32_modules or []
    for key, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.is_floating_point() and not any(part in key for part in kept):
            tensor.data = tensor.data.to(dtype)
        require(is_finite(tensor), f"{name}: {key} holds numbers too large for {dtype}: take another dtype")
    config, size = network.config, network.config.sample_size
    if not isinstance(network, ADMClassifierModel):
        # as small as the network takes, with two by two cells in its middle: CPUs are slow at half precision
        levels = len(config.get("block_out_channels") or config.channel_mult)
        size = min(2 ** (levels + 1), size)
    sample = torch.randn(1, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    classes = {"class_labels": torch.zeros(1, dtype=torch.int64)} if config.get("num_class_embeds") else {}
    with torch.no_grad():
        (output,) = network(sample.to(dtype), timestep, **classes, return_dict=False)
    require(is_finite(output), f"the prediction of {name} is not finite: its weights are no trained model's")


def convert_folder(folder: Path, output_dir: Path, **options: Any) -> None:
    """Converts every ``model_*e_*s.pkl`` below a folder with the files beside it; an error counts what failed."""
    checkpoints = [path for path in sorted(folder.rglob("model_*.pkl")) if MODEL_NAME.fullmatch(path.name)]
    require(checkpoints, f"checkpoint is {folder}, which holds no model_...e_...s.pkl")
    rows: list[str] = []
    num_failed = 0
    for checkpoint in checkpoints:
        name, source = checkpoint.stem.removeprefix("model_"), checkpoint.relative_to(folder)
        target, optimizer = output_dir / source.parent / name, checkpoint.with_name(f"optim_{name}.pkl")
        given = optimizer if optimizer.is_file() else None
        try:
            unet = convert_checkpoint(checkpoint, params_beside(checkpoint), target, given, **options).unet
            rows.append(f"{source!s:40} converted  {unet.num_parameters() / 1e6:7.1f} M  {target}")
        except (ValueError, OSError) as error:
            rows.append(f"{source!s:40} failed     {error}")
            num_failed += 1
    print("\ncheckpoint" + " " * 31 + "result     parameters or what is wrong", *rows, sep="\n", flush=True)
    require(not num_failed, f"{num_failed} of {len(rows)} checkpoints could not be converted")
