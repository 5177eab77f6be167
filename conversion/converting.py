"""From the original's checkpoint files to a pipeline folder: one checkpoint, or a folder of them."""

import dataclasses
import gc
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import CARD_NAME, write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..training.checkpoints import Progress, save_checkpoint
from ..utils.atomic_write import atomic_folder
from ..utils.nearest_names import perhaps
from .components import class_names, original_scheduler
from .errors import CheckpointError
from .original_params import read_params, unknown_params
from .original_weights import build_empty_unet, map_original_optimizer, map_original_weights, original_layout
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
        num_parameters: How many parameters the network has.
        step: Optimizer steps that it was trained for; None where the JSON does not say.
        report: What there is to know, line by line.
    """

    pipeline: ClassConditionalPipeline
    num_parameters: int
    step: int | None
    report: list[str]


def convert_files(
    checkpoint: str | Path,
    params: str | Path,
    output_dir: str | Path,
    optimizer: str | Path | None = None,
    time_embedding: str = "original_sine",
    id2label: str | Path | Mapping[Any, str] | Sequence[str] | None = "imagenet64",
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

    content = read_params(params_file)
    unet = build_empty_unet(content, time_embedding, params_file.name)
    labels, classes = class_names(id2label, unet.config.num_class_embeds)
    layout = list(original_layout(unet))
    shapes = {weight.name: weight.shape for weight in layout}
    original = load_weights(checkpoint, shapes, params_file.name)
    # the weights stay in the checkpoint's file where they need no change
    weights = {
        name: _cast(tensor, torch.float32, f"{checkpoint.name}: {name}")
        for name, tensor in map_original_weights(original, content).items()
    }
    unet.load_state_dict(weights, assign=True)
    unused = {weight.name: original[weight.name].contiguous() for weight in layout if weight.our_name is None}
    training = None
    if optimizer is not None:
        if "step" not in content or "epoch" not in content:
            raise CheckpointError(f"{params_file.name} lacks epoch or step, which resuming the training needs")
        training = map_original_optimizer(load_optimizer(optimizer, shapes), unet)

    scheduler = original_scheduler(content, finish_denoising)
    step_folder = f"checkpoints/checkpoint-{content.get('step')}"
    with atomic_folder(output_dir) as writing:
        if training is not None:
            _save_training_state(writing / step_folder, content, unet, scheduler, training)
        for key, parameter in unet.named_parameters():
            parameter.data = _cast(parameter.data, DTYPES[dtype], f"{checkpoint.name}: {key}")
        converted = ClassConditionalPipeline(unet, scheduler, labels, guide_variance=True)
        converted.save_pretrained(writing, variant=variant)
        facts = {"epochs": content.get("epoch", "unknown"), "steps": content.get("step", "unknown")}
        facts = {"converted from": f"{checkpoint.name} of the original program"} | facts
        # the original program's licence is for its weights too
        write_model_card(converted, writing, training_facts=facts, license="mit")
        (writing / PARAMS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if unused:
            save_file(unused, writing / UNUSED_WEIGHTS_NAME)
        num_unused = len(unused)
        # What was read lies in the checkpoint's file, which may be overwritten once nothing refers to it. A network
        # refers to itself, so that only the collector finds that it is no longer needed.
        del converted, unet, weights, original, unused, training, parameter
        gc.collect()
        pipeline = _load_and_check(writing, output_dir, variant, DTYPES[dtype])

    num_parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    seconds = time.perf_counter() - start
    noise = float(1 - scheduler.final_alpha_cumprod) ** 0.5
    ending = f"leaves noise of {noise:.2f}, as the original's does" if noise else "fully denoised"
    trained = [f"{name} {content[name]:,}" for name in ("epoch", "step") if name in content]
    config = pipeline.unet.config
    widths = f"stem {config.stem_channels}, levels {', '.join(map(str, config.block_out_channels))}"
    report = [
        f"converted {checkpoint} to {output_dir} in {seconds:.1f} s",
        f"  network    {num_parameters:,} parameters, layers {', '.join(content['blk_types'])} ({widths}), {dtype}",
        f"  trained    {', '.join(trained) or 'not said'}",
        f"  classes    {classes}",
        f"  time       {time_embedding}",
        f"  schedule   the original's {content['beta_sched']}, {content['T']} timesteps, last step {ending}",
        f"  checked    all {len(layout)} weights accounted for, shapes right, one forward pass finite",
    ]
    if num_unused:
        report.append(f"  kept       {num_unused} weights without effect, in {UNUSED_WEIGHTS_NAME}")
    if optimizer is not None:
        report.append(f"  optimizer  {output_dir / step_folder}, to resume the training")
    if unknown_params(content):
        report.append(f"  not used   {', '.join(unknown_params(content))} of {params_file.name}")
    return Conversion(pipeline, num_parameters, content.get("step"), report)


def _check_replaceable(output_dir: Path) -> None:
    """Refuses a folder that holds anything but an earlier conversion."""
    if output_dir.name in ("", ".."):
        raise CheckpointError(f"output_dir is {output_dir}, but must end with the name of a folder")
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise CheckpointError(f"output_dir is {output_dir}, which is a file, but must be a new folder")
    names = {path.name for path in output_dir.iterdir() if path.suffix != ".py"}
    strangers = sorted(names - _OWN_NAMES if PARAMS_NAME in names else names)
    if not strangers and (checkpoints := output_dir / "checkpoints").is_dir():
        # training may have resumed there
        own = f"checkpoint-{read_params(output_dir / PARAMS_NAME).get('step')}"
        strangers = [f"checkpoints/{path.name}" for path in checkpoints.iterdir() if path.name != own]
    if strangers:
        raise CheckpointError(
            f"output_dir is {output_dir}, which holds {strangers[0]}, but must be new, empty or an earlier conversion"
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


def _save_training_state(
    folder: Path,
    params: Mapping[str, Any],
    unet: ClassConditionalUNet2DModel,
    scheduler: EtaDDIMScheduler,
    optimizer_state: dict[str, Any],
) -> None:
    """Writes the checkpoint from which the training resumes, with the options of the original's training."""
    group = optimizer_state["param_groups"][0]
    optimizer = torch.optim.AdamW(unet.parameters())
    # load_optimizer keeps the hyper-parameters that it checks; those of other versions of torch are torch's own
    optimizer.load_state_dict(
        {**optimizer_state, "param_groups": [{**optimizer.state_dict()["param_groups"][0], **group}]}
    )
    options = {
        "prediction_type": "epsilon",
        "num_train_timesteps": params["T"],
        "beta_schedule": {"cosine": "original_cosine", "linear": "linear"}[params["beta_sched"]],
        "unconditional": unet.config.num_class_embeds is None,
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
    progress = Progress(step=params["step"], epoch=params["epoch"])
    save_checkpoint(folder, unet=unet, scheduler=scheduler, optimizer=optimizer, progress=progress, options=options)


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
    rows = [("checkpoint", "result", "parameters", "step", "where, or why not")]
    for checkpoint, name in checkpoints:
        source = checkpoint.relative_to(folder)
        target = output_dir / source.parent / name
        beside = checkpoint.with_name(f"optim_{name}.pkl")
        optimizer = beside if beside.is_file() else None
        try:
            conversion = convert_files(checkpoint, params_beside(checkpoint), target, optimizer, **options)
        except (ValueError, OSError) as error:
            rows.append((str(source), "failed", "", "", str(error)))
            print(f"failed: {checkpoint}: {error}", flush=True)
        else:
            print("\n".join(conversion.report), flush=True)
            step = "" if conversion.step is None else f"{conversion.step:,}"
            rows.append((str(source), "converted", f"{conversion.num_parameters / 1e6:.1f} M", step, str(target)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    num_failed = sum(row[1] == "failed" for row in rows)
    if num_failed:
        raise CheckpointError(f"{num_failed} of {len(checkpoints)} checkpoints could not be converted")
