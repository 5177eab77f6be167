"""The original's files in terms of ours, both ways: its JSON file, its weights, its sampler, its training state."""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..models import unet_class_conditional as unets
from ..models.unet_class_conditional import LAYER_TYPE_ALIASES, ClassConditionalUNet2DModel
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..training.checkpoints import Progress, save_checkpoint
from ..utils.atomic_write import atomic_file
from .families import Source, check_value, empty_network
from .pickle_reader import CheckpointError, load_optimizer, load_tensors, read_state_dict, require


# What the way back needs and our network has no place for. They lie beside the pipeline, which does not read them.
PARAMS_NAME = "original_params.json"
UNUSED_WEIGHTS_NAME = "original_unused_weights.safetensors"

MODEL_NAME = re.compile(r"model_(\d+e_\d+s)\.pkl")

# fmt: off
# Values of the JSON file, within bounds that keep a wrong one from asking for tables and loops without end.
_ALLOWED = {
    "inCh": range(1, 65), "embCh": range(1, 16_385), "chMult": range(5), "num_blocks": range(1, 7),
    "T": range(1, 10_001), "t_dim": range(1, 65_537), "c_dim": range(1, 65_537), "num_classes": range(1, 1_000_001),
    "atn_resolution": range(1, 65_537), "epoch": range(10**12), "step": range(10**12),
    "beta_sched": ("cosine", "linear"),
}
KNOWN_PARAMS = (*_ALLOWED, "blk_types")
# Older files lack the first, and the other two say nothing of the network.
_OPTIONAL = ("atn_resolution", "epoch", "step")
_LARGEST_WIDTH, _MOST_LAYERS, _LARGEST_FILE = 65_536, 64, 1 << 20

# Options of our network that the original calls otherwise.
_OPTIONS = {"in_channels": "inCh", "stem_channels": "embCh", "time_embed_dim": "t_dim", "num_train_timesteps": "T"}
TIME_EMBEDDINGS = ("original_sine", "original_alternating", "original_interleaved")

# The original's names inside each layer -> ours, in the order in which it registers them. Queries and keys have no
# effect on its output, as its class attention contracts the attention matrix with itself alone: ours has none.
_LAYER_WEIGHTS: dict[type, dict[str, str | None]] = {
    unets.ResnetLayer: {
        "t_mlp.1": "time_projection", "c_mlp.1": "class_projection", "block1.proj": "conv1", "block1.norm": "norm1",
        "block2.proj": "conv2", "block2.norm": "norm2", "res_conv": "shortcut",
    },
    unets.ConvNextLayer: {
        "block.0": "depthwise_conv", "block.1": "norm", "block.2": "expand_conv", "block.4": "project_conv",
        "res": "shortcut", "timeProj": "time_projection", "clsProj": "class_projection",
    },
    unets.ClassAttentionLayer: {
        "Q_emb": None, "K_emb": None, "out_emb.0": "out_conv", "out_emb.1": "out_norm", "LN": "norm",
    },
    unets.SelfAttentionLayer: {"KQV_weight": "key_query_value", "O_conv": "out_conv", "LN": "norm"},
    unets.ChannelAttentionLayer: {"conv": "conv"},
}
# What comes last in its network, behind its lists of layers.
_LAST_MODULES = {
    "unet.out": "head.conv", "unet.t_emb.0": "time_embedding.linear_1", "unet.t_emb.2": "time_embedding.linear_2",
    "c_emb": "class_embedding", "out_mean": "head.noise_layer", "out_var": "head.variance_layer",
}
# fmt: on
_CLASS_TABLE = "class_embedding.weight"


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file of parameters or flags holds."""
    require(file.is_file(), f"params is {file}, but there is no such file")
    size = file.stat().st_size
    require(size <= _LARGEST_FILE, f"{file.name} has {size:,} bytes, far too many for the JSON of a checkpoint")
    try:
        params = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not JSON ({error}): give the model_params_*.json file") from error
    kind = type(params).__name__
    require(kind == "dict", f"{file.name} holds a {kind}, but must hold an object of parameters")
    return params


def read_params(file: Path) -> dict[str, Any]:
    """The content of a ``model_params_*.json`` file, checked."""
    return check_params(read_json(file), file.name)


def check_params(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The content of a JSON file of that name, its types and ranges checked, ``c_dim`` None without classes."""
    missing = [key for key in KNOWN_PARAMS if key not in params and key not in _OPTIONAL]
    require(not missing, f"{name} lacks {', '.join(missing)}: it is not the JSON of an original checkpoint")
    # the original writes null for num_classes too where there are no classes
    without_classes = params["c_dim"] in (None, -1)
    absent = {"c_dim": without_classes, "num_classes": without_classes and params["num_classes"] is None}
    for key, allowed in _ALLOWED.items():
        if key in params and not absent.get(key):
            check_value(f"{name}: {key}", params[key], allowed)
    layers = params["blk_types"]
    some = type(layers) is list and 0 < len(layers) <= _MOST_LAYERS
    require(some, f"{name}: blk_types must be a list of 1 to {_MOST_LAYERS} names")
    for layer in layers:
        check_value(f"{name}: blk_types", layer, tuple(LAYER_TYPE_ALIASES))
    widest = params["embCh"] * 2 ** (params["chMult"] * params["num_blocks"])
    require(widest <= _LARGEST_WIDTH, f"{name} makes {widest:,} channels, but at most {_LARGEST_WIDTH:,} make sense")
    return {**params, "c_dim": None if without_classes else params["c_dim"]}


def original_unet_config(params: Mapping[str, Any], time_embedding_type: str = "original_sine") -> dict[str, Any]:
    """The options of `ClassConditionalUNet2DModel` for a network with the parameters of an original JSON file."""
    has_classes = params["c_dim"] is not None
    levels = range(1, params["num_blocks"] + 1)
    return {
        **{option: params[key] for option, key in _OPTIONS.items()},
        "block_out_channels": tuple(params["embCh"] * 2 ** (params["chMult"] * level) for level in levels),
        "layer_types": tuple(LAYER_TYPE_ALIASES[name] for name in params["blk_types"]),
        "num_class_embeds": params["num_classes"] if has_classes else None,
        "class_embed_dim": params["c_dim"] if has_classes else 512,
        "attention_patch_size": params.get("atn_resolution", 16),
        "time_embedding_type": time_embedding_type,
        "class_attention_type": "identity",
        "output_head_type": "original",
    }


def nearest_original_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `original_unet_config`, for a network that has one."""
    names = {ours: original for original, ours in LAYER_TYPE_ALIASES.items()}
    has_classes, widths = config["num_class_embeds"] is not None, config["block_out_channels"]
    return {
        **{key: config[option] for option, key in _OPTIONS.items()},
        "chMult": max(widths[0] // config["stem_channels"], 1).bit_length() - 1,
        "num_blocks": len(widths),
        "blk_types": [names[layer] for layer in config["layer_types"]],
        "beta_sched": "cosine",
        "c_dim": config["class_embed_dim"] if has_classes else None,
        # the original wants a number even where there are no classes
        "num_classes": config["num_class_embeds"] if has_classes else 1,
        "atn_resolution": config["attention_patch_size"],
    }


def build_empty_unet(
    params: Mapping[str, Any], time_embedding: str = "original_sine", params_name: str = "the JSON file"
) -> ClassConditionalUNet2DModel:
    """The network on the meta device, for ``load_state_dict(assign=True)``."""
    check_value("time_embedding", time_embedding, TIME_EMBEDDINGS)
    unet: Any = empty_network(ClassConditionalUNet2DModel, original_unet_config(params, time_embedding), params_name)
    # its tables are no weights, and no file holds them
    unet.time_encoding = unets.OriginalTimesteps(params["t_dim"], params["T"], time_embedding)
    return unet


def original_layout(unet: ClassConditionalUNet2DModel) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Name, our name (None if without effect) and shape of the original's weights, in the order of its state dict."""
    config = unet.config
    shapes: dict[str, tuple[int, ...]] = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
    if unet.class_embedding is not None:
        # a linear map of one-hot vectors; ours is a table whose last row is the null class
        shapes[_CLASS_TABLE] = (config.class_embed_dim, config.num_class_embeds)
    levels = range(len(config.block_out_channels))
    down = [f"down_blocks.{level}.{part}" for level in levels for part in ("stack", "downsample")]
    middle = ["mid_block.stack1", "mid_block.channel_attention", "mid_block.stack2"]
    up = [f"up_blocks.{level}.{part}" for level in levels for part in ("upsample", "stack")]
    lists = {"downBlocks": down, "intermediate": middle, "upBlocks": [*up, "head.stack1", "head.stack2"]}
    names = {"unet.inConv": "conv_in"}
    names |= {f"unet.{name}.{i}": part for name, parts in lists.items() for i, part in enumerate(parts)}
    modules: dict[str, Any] = dict(unet.named_modules())
    places: list[tuple[str, str]] = []
    for name, our_name in (names | _LAST_MODULES).items():
        stacked = range(len(getattr(modules.get(our_name), "layers", ())))
        places += [(f"{name}.block.{i}", f"{our_name}.layers.{i}") for i in stacked] or [(name, our_name)]
    for name, our_name in places:
        layer: Any = modules.get(our_name)
        for inner, our_inner in _LAYER_WEIGHTS.get(type(layer), {"": ""}).items():
            for kind in ("weight", "bias"):
                full_name = f"{name}.{inner}.{kind}".replace("..", ".")
                our_full_name = f"{our_name}.{our_inner}.{kind}".replace("..", ".")
                if our_inner is None:
                    widths = (layer.norm.num_channels, config.class_embed_dim)
                    yield full_name, None, widths if kind == "weight" else widths[:1]
                elif our_full_name in shapes:
                    shape = shapes[our_full_name]
                    # channel attention: the original slides over the channels with a two-dimensional convolution
                    yield full_name, our_full_name, (1, *shape) if len(shape) == 3 else shape


def _to_ours(our_name: str, tensor: Tensor, unet: ClassConditionalUNet2DModel) -> Tensor:
    """One of the original's weights, or one of its optimizer's moments, in the shape of ours."""
    if our_name == _CLASS_TABLE:
        return torch.cat([tensor.T, tensor.new_zeros(1, tensor.shape[0])])
    return tensor.reshape(unet.get_parameter(our_name).shape)


def map_original_weights(state_dict: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of our network with the weights of an original one; KeyError for a name that it does not have."""
    unet = build_empty_unet(params)
    our_names = {name: our_name for name, our_name, _ in original_layout(unet)}
    renamed = ((our_names[name], tensor) for name, tensor in state_dict.items())
    return {our_name: _to_ours(our_name, tensor, unet) for our_name, tensor in renamed if our_name is not None}


def map_to_original_weights(unet: ClassConditionalUNet2DModel, unused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict; weights without effect that are not in ``unused`` become zeros."""
    weights = unet.state_dict()
    if unet.class_embedding is not None:
        weights[_CLASS_TABLE] = weights[_CLASS_TABLE][:-1].T
    state_dict: dict[str, Tensor] = {}
    for name, our_name, shape in original_layout(unet):
        weight = weights[our_name] if our_name else unused.get(name, torch.zeros(shape))
        state_dict[name] = weight.float().reshape(shape).contiguous()
    return state_dict


def map_original_optimizer(optimizer_state: Mapping[str, Any], unet: ClassConditionalUNet2DModel) -> dict[str, Any]:
    """The state of ``torch.optim.AdamW(unet.parameters())`` with the original's moments, zero for the null class."""
    original_index = {our_name: index for index, (_, our_name, _) in enumerate(original_layout(unet))}
    state: dict[int, dict[str, Tensor]] = {}
    for index, (our_name, _) in enumerate(unet.named_parameters()):
        if entry := optimizer_state["state"].get(original_index[our_name]):
            # a step of its own for each parameter, as AdamW keeps it
            state[index] = {"step": torch.tensor(float(entry["step"]))}
            state[index] |= {kind: _to_ours(our_name, entry[kind], unet) for kind in ("exp_avg", "exp_avg_sq")}
    group = {**optimizer_state["param_groups"][0], "params": list(range(len(list(unet.parameters()))))}
    return {"state": state, "param_groups": [group]}


def read_original(
    checkpoint: Path,
    found: Any,
    params_file: str | Path | None,
    optimizer: str | Path | None,
    time_embedding: str,
    finish_denoising: bool,
) -> Source:
    """The network of a checkpoint, which holds what was ``found``, and of the files that belong to it."""
    name, params_file = checkpoint.name, Path(params_file or params_beside(checkpoint))
    params = read_params(params_file)
    unet = build_empty_unet(params, time_embedding, params_file.name)
    scheduler = original_scheduler(params, finish_denoising)
    layout = list(original_layout(unet))
    shapes = {name: shape for name, _, shape in layout}
    weights = load_tensors(name, read_state_dict(name, found), shapes, params_file.name)
    mapped = map_original_weights(weights, params)
    unet.load_state_dict({name: tensor.float() for name, tensor in mapped.items()}, assign=True)
    unused = {name: weights[name].contiguous() for name, our_name, _ in layout if our_name is None}

    def write_more(folder: Path) -> None:
        if optimizer is not None:
            counted = "step" in params and "epoch" in params
            require(counted, f"{params_file.name} lacks epoch or step, which resuming the training needs")
            state = load_optimizer(Path(optimizer), shapes)
            _save_training_state(folder / training_state_path(params), params, unet, scheduler, state)
        (folder / PARAMS_NAME).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
        if unused:
            save_file(unused, folder / UNUSED_WEIGHTS_NAME)

    noise, config = float(1 - scheduler.final_alpha_cumprod) ** 0.5, unet.config
    ending = f"leaves noise of {noise:.2f}, as the original's does" if noise else "fully denoised"
    widths = f"stem {config.stem_channels}, levels {', '.join(map(str, config.block_out_channels))}"
    report = {
        "network": f"{unet.num_parameters():,} parameters, layers {', '.join(params['blk_types'])} ({widths})",
        "trained": ", ".join(f"{key} {params[key]:,}" for key in ("epoch", "step") if key in params),
        "schedule": f"the original's {params['beta_sched']}, {params['T']} timesteps, last step {ending}",
        "not used": ", ".join(params.keys() - KNOWN_PARAMS),
        "optimizer": f"{training_state_path(params)}, to resume the training" if optimizer else "",
    }
    facts = {"epochs": params.get("epoch", "unknown"), "steps": params.get("step", "unknown")}
    return Source({"unet": unet, "scheduler": scheduler}, len(layout), report, facts, write_more)


def training_state_path(params: Mapping[str, Any]) -> Path:
    """The checkpoint of the original's training in a pipeline folder."""
    return Path("checkpoints", f"checkpoint-{params.get('step')}")


def _save_training_state(folder: Path, params: dict, unet: Any, scheduler: SchedulerMixin, state: dict) -> None:
    """Writes the checkpoint from which the training resumes, with the options of the original's training."""
    optimizer, state = torch.optim.AdamW(unet.parameters()), map_original_optimizer(state, unet)
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
    nearest = nearest_original_params(pipeline.unet.config)
    params = read_params(kept) if kept.is_file() else check_params(nearest, str(model))
    params |= {"beta_sched": _check_form(pipeline, params, model)}
    for name, given in (("epoch", epoch), ("step", step)):
        number: Any = params.get(name) if given is None else given
        params[name] = number
        require(number is not None and number >= 0, f"{name} is {number}, but must be given, and be at least 0")
    shapes = {name: shape for name, our_name, shape in original_layout(pipeline.unet) if our_name is None}
    fits = all(tensor.shape == shapes.get(name) for name, tensor in unused.items())
    require(fits, f"{unused_file} holds weights that are not those without effect of this network")
    classes = pipeline.unet.class_embedding
    zero = classes is None or not classes.weight[-1].any()
    require(zero, f"the null class of {model} is not zero, but the original has no place for it")

    name = f"{params['epoch']}e_{params['step']}s"
    files = output_dir / f"model_{name}.pkl", output_dir / f"model_params_{name}.json"
    with atomic_file(files[0]) as model_file, atomic_file(files[1]) as params_file:
        with model_file.open("wb") as opened:
            torch.save(OrderedDict(map_to_original_weights(pipeline.unet, unused)), opened)
        params_file.write_text(json.dumps(params), encoding="utf-8")
    return files


def _check_form(pipeline: ClassConditionalPipeline, params: dict[str, Any], model: Path) -> str:
    """Refuses a pipeline that the original's code does not compute; returns the name of its noise schedule."""
    config, scheduler = pipeline.unet.config, pipeline.scheduler
    free = {"time_embedding_type"} if config.time_embedding_type in TIME_EMBEDDINGS else set()
    free |= set() if "class_attention" in config.layer_types else {"class_attention_type"}
    free |= {"class_embed_dim"} if config.num_class_embeds is None else set()
    for option, needed in original_unet_config(params).items():
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
