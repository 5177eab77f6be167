"""Between the original's checkpoint files and pipeline folders: one checkpoint, a folder of them, and the way back."""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..data.class_names import NUM_CLASSES, imagenet64_id2label
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import CARD_NAME, push_folder, write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..training.checkpoints import Progress, save_checkpoint
from ..utils.atomic_write import atomic_file, atomic_folder
from . import original
from .pickle_reader import CheckpointError, is_finite, load_optimizer, load_state_dict, require


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# What the way back needs and our network has no place for. They lie beside the pipeline, which does not read them.
PARAMS_NAME = "original_params.json"
UNUSED_WEIGHTS_NAME = "original_unused_weights.safetensors"

_OWN_NAMES = {"model_index.json", CARD_NAME, PARAMS_NAME, UNUSED_WEIGHTS_NAME, "unet", "scheduler", "checkpoints"}
_MODEL_NAME = re.compile(r"model_(\d+e_\d+s)\.pkl")


def convert_checkpoint(
    checkpoint: str | Path,
    params: str | Path,
    output_dir: str | Path,
    optimizer: str | Path | None = None,
    time_embedding: str = "original_sine",
    id2label: str | Path | Mapping[Any, str] | Sequence[str] | None = "imagenet64",
    *,
    dtype: str = "float32",
    variant: str | None = None,
    finish_denoising: bool = False,
    push_to_hub: str | None = None,
) -> ClassConditionalPipeline:
    """Converts one checkpoint of the original program and prints what there is to know about it.

    Nothing in the files is run. The folder is written atomically and replaces an earlier conversion, nothing else.

    Args:
        checkpoint: The ``model_*.pkl`` file, in either format of torch.save.
        params: The ``model_params_*.json`` file.
        output_dir: The pipeline folder to write.
        optimizer: The ``optim_*.pkl`` file; the folder then has a checkpoint from which the training resumes.
        time_embedding: ``"original_sine"`` samples as the original does, one image at a time; released checkpoints
            were trained with ``"original_alternating"``, those of its corrected code with ``"original_interleaved"``.
        id2label: ``"imagenet64"``, or ``"numbers"`` or None, a file of names, or the names themselves.
        dtype: What the weights are stored in, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        variant: Name of the file of weights, such as ``"fp16"``.
        finish_denoising: Whether the last step ends at the predicted image. The original leaves noise of 0.03.
        push_to_hub: Hub id to upload the pipeline to, after the folder is complete.

    Returns:
        The pipeline, loaded from the folder.

    Raises:
        CheckpointError: A ValueError: a file or an option is not what it should be. Nothing has been written then.
    """
    checkpoint, params, output_dir = Path(checkpoint), Path(params), Path(output_dir)
    require(dtype in DTYPES, f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    plain = variant is None or re.fullmatch(r"[A-Za-z0-9_-]+", variant)
    require(plain, f"variant is {variant!r}, but must be made of letters and digits, such as fp16")
    _check_replaceable(output_dir)

    content = original.read_params(params)
    unet = original.build_empty_unet(content, time_embedding, params.name)
    labels = class_names(id2label, unet.config.num_class_embeds)
    layout = list(original.original_layout(unet))
    shapes = {name: shape for name, _, shape in layout}
    weights = load_state_dict(checkpoint, shapes, params.name)
    mapped = original.map_original_weights(weights, content)
    unet.load_state_dict({name: tensor.float() for name, tensor in mapped.items()}, assign=True)
    unused = {name: weights[name].contiguous() for name, our_name, _ in layout if our_name is None}
    scheduler = original_scheduler(content, finish_denoising)
    pipeline = ClassConditionalPipeline(unet, scheduler, labels, guide_variance=True)
    training = Path("checkpoints", f"checkpoint-{content.get('step')}")
    with atomic_folder(output_dir) as writing:
        if optimizer is not None:
            counted = "step" in content and "epoch" in content
            require(counted, f"{params.name} lacks epoch or step, which resuming the training needs")
            _save_training_state(writing / training, content, pipeline, load_optimizer(Path(optimizer), shapes))
        _cast_and_check(unet, DTYPES[dtype], checkpoint.name)
        pipeline.save_pretrained(writing, variant=variant)
        facts = {"converted from": f"{checkpoint.name} of the original program"}
        facts |= {"epochs": content.get("epoch", "unknown"), "steps": content.get("step", "unknown")}
        # the original program's licence is for its weights too
        write_model_card(pipeline, writing, training_facts=facts, license="mit")
        (writing / PARAMS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if unused:
            save_file(unused, writing / UNUSED_WEIGHTS_NAME)
    print(f"converted {checkpoint} to {output_dir}")
    _print_report(pipeline, labels, content)
    print(f"  checked    all {len(layout)} weights accounted for, shapes right, one forward pass finite")
    if optimizer is not None:
        print(f"  optimizer  {output_dir / training}, to resume the training")
    # a pipeline of which nothing lies in the checkpoint's file
    converted = ClassConditionalPipeline.from_pretrained(output_dir, variant=variant, dtype=DTYPES[dtype])
    if push_to_hub is not None:
        # without the optimizer's state, twice the size of the model and of use to one person
        push_folder(converted, output_dir, push_to_hub, leave_out=("checkpoints",))
        print(f"  uploaded   {push_to_hub}")
    return converted


def _print_report(pipeline: ClassConditionalPipeline, labels: dict | None, params: Mapping[str, Any]) -> None:
    unet, config = pipeline.unet, pipeline.unet.config
    noise = float(1 - pipeline.scheduler.final_alpha_cumprod) ** 0.5
    ending = f"leaves noise of {noise:.2f}, as the original's does" if noise else "fully denoised"
    widths = f"stem {config.stem_channels}, levels {', '.join(map(str, config.block_out_channels))}"
    report = {
        "network": f"{unet.num_parameters():,} parameters, layers {', '.join(params['blk_types'])} ({widths})",
        "trained": ", ".join(f"{name} {params[name]:,}" for name in ("epoch", "step") if name in params),
        "classes": f"{len(labels)}, named {labels[0]}, ..., {labels[len(labels) - 1]}" if labels else "none",
        "schedule": f"the original's {params['beta_sched']}, {params['T']} timesteps, last step {ending}",
        "not used": ", ".join(params.keys() - original.KNOWN_PARAMS),
    }
    print("\n".join(f"  {name:10} {words}" for name, words in report.items() if words), flush=True)


def _check_replaceable(output_dir: Path) -> None:
    """Refuses a folder that holds anything but an earlier conversion."""
    usual = output_dir.name not in ("", "..") and not output_dir.is_file()
    require(usual, f"output_dir is {output_dir}, but must be the name of a new folder")
    held = {path.name for path in output_dir.glob("*") if path.suffix != ".py"}
    if PARAMS_NAME in held:
        # training may have resumed there
        own = f"checkpoint-{original.read_params(output_dir / PARAMS_NAME).get('step')}"
        held -= _OWN_NAMES
        held |= {f"checkpoints/{path.name}" for path in output_dir.glob("checkpoints/*") if path.name != own}
    require(not held, f"output_dir is {output_dir}, which holds {min(held, default='')}, but must be new or its own")


def _cast_and_check(unet: ClassConditionalUNet2DModel, dtype: torch.dtype, name: str) -> None:
    for key, parameter in unet.to(dtype).named_parameters():
        require(is_finite(parameter), f"{name}: {key} holds numbers too large for {dtype}: take another dtype")
    # as small as the network takes, with two by two cells in its middle: CPUs are slow at half precision
    size = min(2 ** (len(unet.config.block_out_channels) + 1), unet.config.sample_size)
    sample = torch.randn(1, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = unet(sample.to(dtype), unet.config.num_train_timesteps // 2).sample
    require(is_finite(output), f"the prediction of {name} is not finite: its weights are no trained model's")


def _save_training_state(folder: Path, params: dict, pipeline: ClassConditionalPipeline, state: dict) -> None:
    """Writes the checkpoint from which the training resumes, with the options of the original's training."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    optimizer, state = torch.optim.AdamW(unet.parameters()), original.map_original_optimizer(state, unet)
    # load_optimizer keeps the hyper-parameters that it checks; those of other versions of torch are torch's own
    group = {**optimizer.state_dict()["param_groups"][0], **state["param_groups"][0]}
    optimizer.load_state_dict({**state, "param_groups": [group]})
    schedule = {"linear": "linear", "cosine": "original_cosine"}[params["beta_sched"]]
    options: dict[str, Any] = {"prediction_type": "epsilon", "beta_schedule": schedule}
    options |= {"num_train_timesteps": params["T"], "unconditional": unet.config.num_class_embeds is None}
    options |= {"class_dropout_prob": 0.2, "vlb_weight": 0.001, "timestep_sampling": "uniform", "use_ema": False}
    options |= {"learning_rate": group["lr"], "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_grad_norm": 0.0}
    options |= {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_epsilon": group["eps"]}
    options["adam_weight_decay"] = group["weight_decay"]
    progress = Progress(step=params["step"], epoch=params["epoch"])
    save_checkpoint(folder, unet=unet, scheduler=scheduler, optimizer=optimizer, progress=progress, options=options)


def original_scheduler(params: Mapping[str, Any], finish_denoising: bool = False) -> EtaDDIMScheduler:
    """The original's sampler, whose cosine schedule ends at abar 0.999 if not finished, and the linear one at 1."""
    options = original_cosine_options(params["T"]) | {"set_alpha_to_one": finish_denoising}
    if params["beta_sched"] == "linear":
        options |= {"trained_betas": None, "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True}
    return EtaDDIMScheduler(prediction_type="epsilon", variance_type="learned_range", **options)


def class_names(id2label: Any, num_classes: int | None) -> dict[int, str] | None:
    """The name of each class, if there are any; ``id2label`` is that of `convert_checkpoint`."""
    by_option = id2label in (None, "numbers", "imagenet64")
    if num_classes is None:
        require(by_option, "id2label names classes, but the network has none: leave it out")
        return None
    if by_option:
        named = id2label == "imagenet64" and num_classes == NUM_CLASSES
        return imagenet64_id2label() if named else {index: str(index) for index in range(num_classes)}
    if isinstance(id2label, (str, Path)):
        file = Path(id2label)
        require(file.is_file(), f"id2label is {str(file)!r}, but must be imagenet64, numbers or a file of names")
        try:
            text = file.read_text(encoding="utf-8")
            id2label = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"id2label: {file.name} cannot be read ({error})") from error
    if not isinstance(id2label, Mapping):
        id2label = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else {}
    names = {str(key): name for key, name in id2label.items()}
    labels: list[Any] = [names.get(str(index)) for index in range(num_classes)]
    fits = len(names) == num_classes and all(isinstance(label, str) and label.strip() for label in labels)
    require(fits, f"id2label must have a name for each class of the network, 0 to {num_classes - 1}, and no other")
    return dict(enumerate(labels))


def params_beside(checkpoint: Path) -> Path:
    """The JSON file that belongs to a checkpoint by its name."""
    match: Any = _MODEL_NAME.fullmatch(checkpoint.name)
    require(match, f"params is not given, and {checkpoint.name} is not named model_...e_...s.pkl: give it")
    file = checkpoint.with_name(f"model_params_{match[1]}.json")
    require(file.is_file(), f"params is not given, and there is no {file}: give it")
    return file


def convert_folder(folder: Path, output_dir: Path, **options: Any) -> None:
    """Converts every ``model_*e_*s.pkl`` below a folder with the files beside it; an error counts what failed."""
    checkpoints = [path for path in sorted(folder.rglob("model_*.pkl")) if _MODEL_NAME.fullmatch(path.name)]
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


def write_original(
    model: Path, output_dir: Path, epoch: int | None = None, step: int | None = None, variant: str | None = None
) -> tuple[Path, Path]:
    """Writes the two files that the original program loads; weights without effect that were not kept are zeros."""
    kept, unused_file = model / PARAMS_NAME, model / UNUSED_WEIGHTS_NAME
    require(model.is_dir(), f"checkpoint is {model}, but must be a pipeline folder for to_original")
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(model, variant=variant)
        unused = load_file(unused_file) if unused_file.is_file() else {}
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {model} cannot be read ({error})") from error
    nearest = original.nearest_original_params(pipeline.unet.config)
    params = original.read_params(kept) if kept.is_file() else original.check_params(nearest, str(model))
    params |= {"beta_sched": _check_form(pipeline, params, model)}
    for name, given in (("epoch", epoch), ("step", step)):
        number: Any = params.get(name) if given is None else given
        params[name] = number
        require(number is not None and number >= 0, f"{name} is {number}, but must be given, and be at least 0")
    shapes = {name: shape for name, our_name, shape in original.original_layout(pipeline.unet) if our_name is None}
    fits = all(tensor.shape == shapes.get(name) for name, tensor in unused.items())
    require(fits, f"{unused_file} holds weights that are not those without effect of this network")
    classes = pipeline.unet.class_embedding
    zero = classes is None or not classes.weight[-1].any()
    require(zero, f"the null class of {model} is not zero, but the original has no place for it")

    name = f"{params['epoch']}e_{params['step']}s"
    files = output_dir / f"model_{name}.pkl", output_dir / f"model_params_{name}.json"
    with atomic_file(files[0]) as model_file, atomic_file(files[1]) as params_file:
        with model_file.open("wb") as opened:
            torch.save(OrderedDict(original.map_to_original_weights(pipeline.unet, unused)), opened)
        params_file.write_text(json.dumps(params), encoding="utf-8")
    return files


def _check_form(pipeline: ClassConditionalPipeline, params: dict[str, Any], model: Path) -> str:
    """Refuses a pipeline that the original's code does not compute; returns the name of its noise schedule."""
    config, scheduler = pipeline.unet.config, pipeline.scheduler
    free = {"time_embedding_type"} if config.time_embedding_type in original.TIME_EMBEDDINGS else set()
    free |= set() if "class_attention" in config.layer_types else {"class_attention_type"}
    free |= {"class_embed_dim"} if config.num_class_embeds is None else set()
    for option, needed in original.original_unet_config(params).items():
        fits, found = option in free or config[option] == needed, f"{model} has {option} {config[option]}"
        require(fits, f"{found}, but {PARAMS_NAME} or the original has {needed}: only configs/original go back")
    prediction_type = scheduler.config.get("prediction_type")
    require(prediction_type == "epsilon", f"{model} has prediction_type {prediction_type}, but must have epsilon")
    abar = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
    for schedule in ("cosine", "linear"):
        theirs = original_scheduler({"T": len(abar), "beta_sched": schedule}).alphas_cumprod
        # stock schedulers hold float32
        if torch.allclose(theirs, abar, rtol=0, atol=1e-6):
            return schedule
    raise CheckpointError(f"{model} has another noise schedule than the original's cosine and linear ones")
