"""From the original's checkpoint files to a pipeline folder: one checkpoint, or a folder of them."""

import dataclasses
import gc
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import CARD_NAME, write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..training.checkpoints import Progress, save_checkpoint
from ..utils.atomic_write import atomic_folder
from ..utils.nearest_names import perhaps
from .components import build_empty_unet, class_names, original_scheduler, recipe_of
from .errors import CheckpointError
from .original_optimizer import map_original_optimizer
from .original_params import read_params, unknown_params
from .original_weights import has_class_table, map_original_weights, original_weight_name, original_weight_shapes
from .safe_loading import load_optimizer, load_weights


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What the way back needs and our network has no place for. They lie beside the pipeline, which does not read them.
PARAMS_NAME = "original_params.json"
UNUSED_WEIGHTS_NAME = "original_unused_weights.safetensors"

_OWN_NAMES = {"model_index.json", CARD_NAME, PARAMS_NAME, UNUSED_WEIGHTS_NAME, "unet", "scheduler", "checkpoints"}
_MODEL_NAME = re.compile(r"model_(\d+e_\d+s)\.pkl")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        pipeline: The pipeline, loaded from the new folder.
        folder: The folder.
        num_parameters: How many parameters the network has.
        epoch: Epochs that it was trained for; None where the JSON does not say.
        step: Optimizer steps that it was trained for; None where the JSON does not say.
        seconds: How long the conversion took.
        report: What there is to know, line by line.
    """

    pipeline: ClassConditionalPipeline
    folder: Path
    num_parameters: int
    epoch: int | None
    step: int | None
    seconds: float
    report: list[str]


def convert_files(
    checkpoint: str | Path,
    params: str | Path,
    output_dir: str | Path,
    optimizer: str | Path | None = None,
    time_embedding: str = "original_sine",
    id2label: str | Path | Mapping[Any, str] | Sequence[str] = "imagenet64",
    dtype: str = "float32",
    variant: str | None = None,
    finish_denoising: bool = False,
) -> Conversion:
    """Converts one checkpoint. The arguments are those of `convert_checkpoint`.

    Raises:
        CheckpointError: If a file or an option is not what it should be; nothing has been written then.
    """
    start = time.perf_counter()
    checkpoint, params_file, output_dir = Path(checkpoint), Path(params), Path(output_dir)
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}{perhaps(dtype, DTYPES)}")
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise CheckpointError(f"variant is {variant!r}, but must be made of letters and digits, such as fp16")
    _check_replaceable(output_dir)

    read = _read(checkpoint, params_file, optimizer, time_embedding, id2label)
    content, classes, num_weights, num_unused = read.params, read.classes, len(read.shapes), len(read.unused)
    scheduler = original_scheduler(content, finish_denoising)
    step_folder = f"checkpoints/checkpoint-{content.get('step')}"
    with atomic_folder(output_dir) as writing:
        if read.optimizer_state is not None:
            _save_training_state(writing / step_folder, read, scheduler)
        _write(writing, read, scheduler, dtype, variant, checkpoint.name)
        # What was read lies in the checkpoint's file, which may be overwritten once nothing refers to it. A network
        # refers to itself, so that only the collector finds that it is no longer needed.
        del read
        gc.collect()
        pipeline = _load_and_check(writing, output_dir, variant, DTYPES[dtype])

    num_parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    seconds = time.perf_counter() - start
    noise = float(1 - scheduler.final_alpha_cumprod) ** 0.5
    ending = f"leaves noise of {noise:.2f}, as the original's does" if noise else "fully denoised"
    trained = [f"{name} {content[name]:,}" for name in ("epoch", "step") if name in content]
    report = [
        f"converted {checkpoint} to {output_dir} in {seconds:.1f} s",
        f"  network    {num_parameters:,} parameters, {recipe_of(pipeline.unet)}, {dtype}",
        f"  trained    {', '.join(trained) or 'not said'}",
        f"  classes    {classes}",
        f"  time       {time_embedding}",
        f"  schedule   the original's {content['beta_sched']}, {content['T']} timesteps, last step {ending}",
        f"  checked    all {num_weights} weights accounted for, shapes right, one forward pass finite",
    ]
    if num_unused:
        report.append(f"  kept       {num_unused} weights without effect, in {UNUSED_WEIGHTS_NAME}")
    if optimizer is not None:
        report.append(f"  optimizer  {output_dir / step_folder}, to go on with the training")
    if unknown_params(content):
        report.append(f"  not used   {', '.join(unknown_params(content))} of {params_file.name}")
    return Conversion(pipeline, output_dir, num_parameters, content.get("epoch"), content.get("step"), seconds, report)


@dataclasses.dataclass
class _Read:
    """A checkpoint's files, read and checked, with the network made of them."""

    params: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    labels: dict[int, str] | None
    classes: str
    unet: ClassConditionalUNet2DModel
    unused: dict[str, torch.Tensor]
    optimizer_state: dict[str, Any] | None


def _read(
    checkpoint: Path, params_file: Path, optimizer: str | Path | None, time_embedding: str, id2label: Any
) -> _Read:
    params = read_params(params_file)
    shapes = original_weight_shapes(params)
    labels, classes = class_names(id2label, params["num_classes"] if has_class_table(params) else None)
    unet = build_empty_unet(params, time_embedding, params_file.name)
    original = load_weights(checkpoint, shapes, params_file.name)
    optimizer_state = None
    if optimizer is not None:
        if params.get("step") is None or params.get("epoch") is None:
            raise CheckpointError(f"{params_file.name} lacks epoch or step, which going on with the training needs")
        optimizer_state = load_optimizer(optimizer, shapes)

    # the weights stay in the checkpoint's file where they need no change
    weights = {
        name: _cast(tensor, torch.float32, f"{checkpoint.name}: {name}")
        for name, tensor in map_original_weights(original, params).items()
    }
    unet.load_state_dict(weights, assign=True)
    unused = {name: tensor for name, tensor in original.items() if original_weight_name(name, params) is None}
    return _Read(params, shapes, labels, classes, unet, unused, optimizer_state)


def _write(folder: Path, read: _Read, scheduler: EtaDDIMScheduler, dtype: str, variant: str | None, name: str) -> None:
    """Writes the pipeline, and beside it what the way back needs."""
    for key, parameter in read.unet.named_parameters():
        parameter.data = _cast(parameter.data, DTYPES[dtype], f"{name}: {key}")
    pipeline = ClassConditionalPipeline(read.unet, scheduler, read.labels, guide_variance=True)
    pipeline.save_pretrained(folder, variant=variant)
    facts = {
        "converted from": f"{name} of the original program",
        "epochs": read.params.get("epoch", "unknown"),
        "steps": read.params.get("step", "unknown"),
    }
    # the original program's licence is for its weights too
    write_model_card(pipeline, folder, training_facts=facts, license="mit")
    (folder / PARAMS_NAME).write_text(json.dumps(read.params, indent=2) + "\n", encoding="utf-8")
    if read.unused:
        save_file({key: tensor.contiguous() for key, tensor in read.unused.items()}, folder / UNUSED_WEIGHTS_NAME)


def _check_replaceable(output_dir: Path) -> None:
    """Refuses a folder that holds anything but an earlier conversion."""
    if output_dir.name in ("", ".."):
        raise CheckpointError(f"output_dir is {output_dir}, but must end with the name of a folder")
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise CheckpointError(f"output_dir is {output_dir}, which is a file, but must be a new folder")
    names = {path.name for path in output_dir.iterdir() if path.suffix != ".py"}
    if not names:
        return
    strangers = sorted(names - _OWN_NAMES)
    if PARAMS_NAME in names and not strangers:
        step = read_params(output_dir / PARAMS_NAME).get("step")
        checkpoints = output_dir / "checkpoints"
        later = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
        strangers = [f"checkpoints/{name}" for name in later if name != f"checkpoint-{step}"]
        if not strangers:
            return
    raise CheckpointError(
        f"output_dir is {output_dir}, which holds {(strangers or sorted(names))[0]}, but must be new, empty or an"
        " earlier conversion"
    )


def _cast(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    if tensor.dtype == dtype:
        return tensor
    tensor = tensor.to(dtype)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{what} holds numbers too large for {dtype}: take another dtype")
    return tensor


def _load_and_check(
    writing: Path, output_dir: Path, variant: str | None, dtype: torch.dtype
) -> ClassConditionalPipeline:
    """The pipeline as whoever loads the folder gets it, after one forward pass."""
    pipeline = ClassConditionalPipeline.from_pretrained(writing, variant=variant, dtype=dtype)
    config = pipeline.unet.config
    # as small as the network takes, with two by two cells in its middle: CPUs are slow at half precision
    size = min(2 ** (len(config.block_out_channels) + 1), config.sample_size)
    sample = torch.randn(1, config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = pipeline.unet(sample.to(dtype), config.num_train_timesteps // 2).sample
    if output.shape != (1, 2 * config.in_channels, size, size) or not bool(torch.isfinite(output).all()):
        raise CheckpointError("the converted network's prediction is not finite: its weights are no trained model's")
    for component in (pipeline, pipeline.unet, pipeline.scheduler):
        component.register_to_config(_name_or_path=str(output_dir))
    return pipeline


def _save_training_state(folder: Path, read: _Read, scheduler: EtaDDIMScheduler) -> None:
    """Writes the folder from which the training goes on."""
    params, unet = read.params, read.unet
    mapped = map_original_optimizer(cast(dict[str, Any], read.optimizer_state), read.shapes, params, unet)
    group = mapped["param_groups"][0]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=group["lr"])
    # groups written by other versions of torch lack an option or have one more
    mapped["param_groups"] = [
        {key: group.get(key, default) for key, default in optimizer.state_dict()["param_groups"][0].items()}
    ]
    optimizer.load_state_dict(mapped)
    save_checkpoint(
        folder,
        unet=unet,
        scheduler=scheduler,
        optimizer=optimizer,
        progress=Progress(step=params["step"], epoch=params["epoch"]),
        options=original_train_options(params, group),
    )


def original_train_options(params: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """How the original trains, as options of `TrainOptions`.

    Args:
        params: The content of the ``model_params_*.json`` file.
        group: The hyper-parameters of its optimizer.
    """
    return {
        "prediction_type": "epsilon",
        "num_train_timesteps": params["T"],
        "beta_schedule": {"cosine": "original_cosine", "linear": "linear"}[params["beta_sched"]],
        "unconditional": not has_class_table(params),
        "class_dropout_prob": 0.2,
        "vlb_weight": 0.001,
        "timestep_sampling": "uniform",
        "learning_rate": group["lr"],
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_beta1": group["betas"][0],
        "adam_beta2": group["betas"][1],
        "adam_weight_decay": group["weight_decay"],
        "adam_epsilon": group["eps"],
        "max_grad_norm": 0.0,
        "use_ema": False,
    }


# ---------------------------------------------------------------------- files by their names


def params_beside(checkpoint: Path) -> Path:
    """The JSON file that belongs to a checkpoint by its name.

    Raises:
        CheckpointError: If the name is another, or there is no such file.
    """
    match = _MODEL_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointError(f"params is not given, and {checkpoint.name} is not named model_...e_...s.pkl: give it")
    file = checkpoint.with_name(f"model_params_{match[1]}.json")
    if not file.is_file():
        raise CheckpointError(f"params is not given, and there is no {file}: give it")
    return file


def convert_folder(folder: Path, output_dir: Path, **options: Any) -> None:
    """Converts every ``model_*e_*s.pkl`` in a folder and the folders in it, and prints what became of each.

    The JSON and, where there is one, the optimizer beside each are found by their names. One that fails does not keep
    the others from being converted.

    Args:
        folder: Where the checkpoints are.
        output_dir: Gets one pipeline folder for each, in the folders in which they lie.
        options: Further arguments of `convert_files`.

    Raises:
        CheckpointError: If there are none, or some failed.
    """
    found = {path: _MODEL_NAME.fullmatch(path.name) for path in folder.rglob("model_*.pkl")}
    checkpoints = sorted((path, match[1]) for path, match in found.items() if match)
    if not checkpoints:
        raise CheckpointError(f"checkpoint is {folder}, which holds no model_...e_...s.pkl")
    rows: list[tuple[str, ...]] = []
    for checkpoint, name in checkpoints:
        place = checkpoint.parent.relative_to(folder)
        optimizer = checkpoint.with_name(f"optim_{name}.pkl")
        source = str(checkpoint.relative_to(folder))
        try:
            conversion = convert_files(
                checkpoint,
                params_beside(checkpoint),
                output_dir / place / name,
                optimizer if optimizer.is_file() else None,
                **options,
            )
        except (ValueError, OSError) as error:
            rows.append((source, "failed", "", "", str(error)))
            print(f"failed: {checkpoint}: {error}", flush=True)
        else:
            print("\n".join(conversion.report), flush=True)
            step = "" if conversion.step is None else f"{conversion.step:,}"
            size, seconds = f"{conversion.num_parameters / 1e6:.1f} M", f"{conversion.seconds:.1f} s"
            rows.append((source, "converted", size, step, f"{conversion.folder} ({seconds})"))
    _print_table(("checkpoint", "result", "parameters", "step", "where, or why not"), rows)
    num_failed = sum(row[1] == "failed" for row in rows)
    if num_failed:
        raise CheckpointError(f"{num_failed} of {len(rows)} checkpoints could not be converted")


def _print_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)]
    print()
    for row in (header, *rows):
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
