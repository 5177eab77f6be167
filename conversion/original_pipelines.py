"""Between the original's files and pipelines: networks, samplers and training states, there and back."""

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..training.checkpoints import Progress, save_checkpoint
from ..utils.atomic_write import atomic_file
from . import original
from .pickle_reader import CheckpointError, load_optimizer, load_tensors, read_state_dict, require
from .sources import Source, class_names


# What the way back needs and our network has no place for. They lie beside the pipeline, which does not read them.
PARAMS_NAME = "original_params.json"
UNUSED_WEIGHTS_NAME = "original_unused_weights.safetensors"

MODEL_NAME = re.compile(r"model_(\d+e_\d+s)\.pkl")


def read_original(
    checkpoint: Path,
    found: Any,
    params: Path,
    optimizer: Path | None,
    time_embedding: str,
    finish_denoising: bool,
    id2label: Any,
) -> Source:
    """The pipeline of the original's files; ``found`` is what the checkpoint holds."""
    content = original.read_params(params)
    unet = original.build_empty_unet(content, time_embedding, params.name)
    labels = class_names(id2label, unet.config.num_class_embeds)
    layout = list(original.original_layout(unet))
    shapes = {name: shape for name, _, shape in layout}
    weights = load_tensors(checkpoint.name, read_state_dict(checkpoint.name, found), shapes, params.name)
    mapped = original.map_original_weights(weights, content)
    unet.load_state_dict({name: tensor.float() for name, tensor in mapped.items()}, assign=True)
    unused = {name: weights[name].contiguous() for name, our_name, _ in layout if our_name is None}
    pipeline = ClassConditionalPipeline(
        unet, original_scheduler(content, finish_denoising), labels, guide_variance=True
    )

    def write_more(folder: Path) -> None:
        if optimizer is not None:
            counted = "step" in content and "epoch" in content
            require(counted, f"{params.name} lacks epoch or step, which resuming the training needs")
            state = load_optimizer(optimizer, shapes)
            _save_training_state(folder / training_state_path(content), content, pipeline, state)
        (folder / PARAMS_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if unused:
            save_file(unused, folder / UNUSED_WEIGHTS_NAME)

    report = _describe(pipeline, content)
    if optimizer is not None:
        report["optimizer"] = f"{training_state_path(content)}, to resume the training"
    facts = {"epochs": content.get("epoch", "unknown"), "steps": content.get("step", "unknown")}
    return Source(pipeline, len(layout), report, facts, write_more)


def training_state_path(params: Mapping[str, Any]) -> Path:
    """The checkpoint of the original's training in a pipeline folder."""
    return Path("checkpoints", f"checkpoint-{params.get('step')}")


def _describe(pipeline: ClassConditionalPipeline, params: Mapping[str, Any]) -> dict[str, str]:
    unet, config = pipeline.unet, pipeline.unet.config
    noise = float(1 - pipeline.scheduler.final_alpha_cumprod) ** 0.5
    ending = f"leaves noise of {noise:.2f}, as the original's does" if noise else "fully denoised"
    widths = f"stem {config.stem_channels}, levels {', '.join(map(str, config.block_out_channels))}"
    return {
        "network": f"{unet.num_parameters():,} parameters, layers {', '.join(params['blk_types'])} ({widths})",
        "trained": ", ".join(f"{name} {params[name]:,}" for name in ("epoch", "step") if name in params),
        "schedule": f"the original's {params['beta_sched']}, {params['T']} timesteps, last step {ending}",
        "not used": ", ".join(params.keys() - original.KNOWN_PARAMS),
    }


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


def params_beside(checkpoint: Path) -> Path:
    """The JSON file that belongs to a checkpoint by its name."""
    match: Any = MODEL_NAME.fullmatch(checkpoint.name)
    require(match, f"params is not given, and {checkpoint.name} is not named model_...e_...s.pkl: give it")
    file = checkpoint.with_name(f"model_params_{match[1]}.json")
    require(file.is_file(), f"params is not given, and there is no {file}: give it")
    return file


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
