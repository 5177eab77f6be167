"""The options of a training run, named as in the training scripts of diffusers."""

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from ..utils.command_line import CheckedOptions, option


# An option under each of the headings of --help.
_GROUPS = ("data", "run", "network", "objective", "optimisation", "precision and speed", "checkpoints and logging")
_data, _run, _network, _objective, _step, _speed, _log = (partial(option, group=name) for name in _GROUPS)
_ddpm, _edm = partial(option, group="objective ddpm"), partial(option, group="objective edm")
_samples, _hub = partial(option, group="samples"), partial(option, group="Hub")


@dataclass
class TrainOptions(CheckedOptions):
    """Options of `train`. The help texts say what each one is; docs/training.md has the original's names for them."""

    train_data_dir: str = _data(help="Folder written by prepare_imagenet64.py.", metavar="FOLDER")
    random_flip: bool = _data(False, "Mirror half of the images.")
    resize_to_power_of_two: str | None = _data(None, "Resample to the next power of two.", choices=["up", "down"])
    dataset_in_memory: bool = _data(False, "Hold all images in memory instead of reading them from the disk.")
    dataloader_num_workers: int = _data(0, "Processes that read images, per training process.", at_least=0)

    output_dir: str = _run("outputs/train", "Folder for pipeline, checkpoints, logs and samples.", metavar="FOLDER")
    seed: int = _run(0, "Seed of weights, data order, noise, timesteps and class drop-out; at least 0.", at_least=0)
    resume_from_checkpoint: str = _run(
        "latest",
        "latest: the newest whole one in output_dir, if any; never; or a checkpoint folder, if output_dir has none.",
        metavar="CHECKPOINT",
    )
    pretrained_model_name_or_path: str | None = _run(
        None, "Fine-tune this pipeline, a folder or Hub id; schedule and prediction type are its own.", metavar="MODEL"
    )
    dry_run: bool = _run(False, "Say what would be trained, from where and at what cost; write nothing.")

    model_config_name_or_path: str | None = _network(
        None,
        "The U-Net: a recipe (res, res_conv, res_res, res_res_atn, res_large, demo; original/res and so on for the"
        " original's own; edm2_xs to edm2_xl), or the JSON file or folder of a network of ours or of a diffusers"
        " UNet2DModel (default: res). The options that follow each replace one entry.",
        metavar="CONFIG",
    )
    stem_channels: int | None = _network(None, "Width of the first convolution, in channels.")
    block_out_channels: list[int] | None = _network(None, "Width of each level, from the highest resolution down.")
    layer_types: list[str] | None = _network(
        None,
        "Layers of every level: resnet, convnext, class_attention, self_attention, channel_attention, or the"
        " original's res, conv, clsAtn, atn, chnAtn.",
        metavar="LAYER",
    )
    time_embed_dim: int | None = _network(None, "Width of the time embedding.")
    class_embed_dim: int | None = _network(None, "Width of the class embedding.")
    attention_patch_size: int | None = _network(None, "Side of the patches of self-attention, in pixels of the level.")
    dropout: float | None = _network(None, "Probability of dropping a feature inside resnet and convnext layers.")
    time_embedding_type: str | None = _network(
        None,
        "Encoding of the timestep: sinusoidal, original_interleaved, original_sine or original_alternating.",
        metavar="NAME",
        choices=["sinusoidal", "original_interleaved", "original_sine", "original_alternating"],
    )
    class_attention_type: str | None = _network(None, "identity is the original's.", choices=["channel", "identity"])
    output_head_type: str | None = _network(None, "original is its narrow one.", choices=["conv", "original"])
    unconditional: bool = _network(False, "Train without classes.")

    objective: str | None = _objective(
        None, "Loss (default: edm for EDM2's networks, else ddpm; or the start's).", choices=["ddpm", "edm"]
    )
    class_dropout_prob: float = _objective(0.2, "Share of images without class, for guidance.", at_least=0, at_most=1)

    prediction_type: str | None = _ddpm(
        None, "Target (default: v_prediction, or the start's).", choices=["v_prediction", "epsilon", "sample"]
    )
    num_train_timesteps: int | None = _ddpm(None, "Diffusion timesteps (default: 1000, or the start's).", at_least=1)
    beta_schedule: str | None = _ddpm(
        None,
        "squaredcos_cap_v2, linear, scaled_linear or original_cosine (default: the first, or the start's).",
        metavar="NAME",
        choices=["squaredcos_cap_v2", "linear", "scaled_linear", "original_cosine"],
    )
    vlb_weight: float = _ddpm(0.001, "Weight of the bound that trains the variance; at least 0.", at_least=0)
    snr_gamma: float | None = _ddpm(None, "Gamma of Min-SNR weighting (5 is usual; default: none).", above=0)
    timestep_sampling: str = _ddpm("uniform", "importance prefers large losses.", choices=["uniform", "importance"])

    p_mean: float | None = _edm(None, "Mean of ln sigma (default: -0.8 for EDM2's networks, else -1.2).")
    p_std: float | None = _edm(None, "Standard deviation of ln sigma (default: 1.6 for EDM2's, else 1.2).", above=0)
    sigma_data: float | None = _edm(None, "Standard deviation of the images (default: 0.5, or the start's).", above=0)

    train_batch_size: int = _step(128, "Images per process and forward pass.", at_least=1)
    gradient_accumulation_steps: int = _step(1, "Forward passes per optimizer step.", at_least=1)
    max_train_steps: int | None = _step(None, "Optimizer steps (default: as num_train_epochs says).", at_least=1)
    num_train_epochs: float = _step(100.0, "Epochs, if max_train_steps is not given; above 0.", above=0)
    optimizer: str = _step("adamw", "adamw_8bit needs bitsandbytes and CUDA.", choices=["adamw", "adamw_8bit"])
    learning_rate: float = _step(3e-4, "Largest learning rate, above 0.", above=0)
    lr_scheduler: str = _step(
        "constant_with_warmup", "LR schedule.", choices=["constant", "constant_with_warmup", "linear", "cosine"]
    )
    lr_warmup_steps: int = _step(500, "Optimizer steps over which the learning rate rises from 0.", at_least=0)
    adam_beta1: float = _step(0.9, "AdamW's beta1, in [0, 1).", at_least=0, below=1)
    adam_beta2: float = _step(0.999, "AdamW's beta2, in [0, 1).", at_least=0, below=1)
    adam_weight_decay: float = _step(0.01, "AdamW's weight decay, at least 0.", at_least=0)
    adam_epsilon: float = _step(1e-8, "AdamW's epsilon, above 0.", above=0)
    max_grad_norm: float = _step(1.0, "Gradients are clipped to this norm; 0 leaves them as they are.", at_least=0)
    use_ema: bool = _step(True, "Keep an EMA of the weights, and sample from and save that.")
    ema_max_decay: float = _step(0.9999, "Largest decay of the EMA, in [0, 1].", at_least=0, at_most=1)
    ema_inv_gamma: float = _step(1.0, "Decay after n steps is 1 - (1 + n / ema_inv_gamma) ^ -ema_power.", above=0)
    ema_power: float = _step(0.75, "See ema_inv_gamma.", at_least=0)

    mixed_precision: str | None = _speed(None, "Default: accelerate's setting.", choices=["no", "fp16", "bf16"])
    gradient_checkpointing: bool = _speed(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = _speed(False, "Compile the network with torch.compile; the first steps take minutes.")

    checkpointing_steps: int = _log(1000, "Steps between two checkpoints; 0 writes one only when stopped.", at_least=0)
    checkpoints_total_limit: int = _log(2, "How many checkpoints are kept; 0 keeps all.", at_least=0)
    pipeline_steps: int = _log(0, "Steps between two pipelines in output_dir/pipelines; 0 for none.", at_least=0)
    report_to: str = _log("tensorboard", "Tracker: tensorboard, wandb, comet_ml, ..., all, or none.", metavar="NAME")
    logging_steps: int = _log(10, "Optimizer steps between two entries of the log.", at_least=1)

    sample_steps: int = _samples(0, "Optimizer steps between two sample grids; 0 samples only the last.", at_least=0)
    num_sample_classes: int = _samples(10, "Classes in a sample grid, spread evenly over all.", at_least=1)
    num_samples_per_class: int = _samples(4, "Images of each class in a sample grid.", at_least=1)
    num_inference_steps: int = _samples(50, "Denoising steps of the sample grids.", at_least=1)
    guidance_scale: float = _samples(2.0, "Guidance scale, if there is a null class.", at_least=0, below=math.inf)

    push_to_hub: bool = _hub(False, "Upload the final pipeline with its model card.")
    hub_model_id: str | None = _hub(None, "Where to, user/name (default: the name of output_dir).", metavar="ID")
    hub_private_repo: bool = _hub(False, "Make a new repository private.")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        if not Path(self.train_data_dir).is_dir():
            missing = f"train_data_dir is {self.train_data_dir}, but there is no such folder"
            raise ValueError(f"{missing}: make it with prepare_imagenet64.py")
        if self.layer_types is not None:
            # the original separates them by commas
            self.layer_types = [name for entry in self.layer_types for name in entry.split(",") if name]
        for name in ("model_config_name_or_path", *NETWORK_OPTIONS):
            is_given = getattr(self, name) is not None and name != "dropout"
            if is_given and self.pretrained_model_name_or_path is not None:
                raise ValueError(f"{name} is given, but pretrained_model_name_or_path brings its own network")


def options_of(*groups: str) -> set[str]:
    """The names of all options under some headings of ``--help``."""
    return {item.name for item in fields(TrainOptions) if item.metadata["group"] in groups}


# Options that replace one entry of the network's config.
NETWORK_OPTIONS = sorted(options_of("network") - {"model_config_name_or_path", "unconditional"})
