"""The options of a training run, named as in the training scripts of diffusers."""

from dataclasses import dataclass
from pathlib import Path

from ..utils.command_line import CheckedOptions, option


@dataclass
class TrainOptions(CheckedOptions):
    """Options of `train`. The help texts say what each one is; docs/training.md has the original's names for them."""

    train_data_dir: str = option(help="Folder written by prepare_imagenet64.py.", group="data", metavar="FOLDER")
    random_flip: bool = option(False, "Mirror half of the images.", group="data")
    resize_to_power_of_two: str | None = option(
        None,
        "Resample the images to the next power of two (default: as they are).",
        group="data",
        choices=["up", "down"],
    )
    dataset_in_memory: bool = option(
        False, "Hold all images in memory instead of reading them from the disk.", group="data"
    )
    dataloader_num_workers: int = option(
        0, "Processes that read images, per training process.", at_least=0, group="data"
    )

    output_dir: str = option(
        "outputs/train", "Folder for the pipeline, checkpoints, logs and sample grids.", group="run", metavar="FOLDER"
    )
    seed: int = option(
        0, "Seed of weights, data order, noise, timesteps and class drop-out; at least 0.", at_least=0, group="run"
    )
    resume_from_checkpoint: str = option(
        "latest",
        "latest: the newest complete checkpoint in output_dir, or a fresh start; never: a fresh start; or a checkpoint"
        " folder, also a converted one, where output_dir has none yet.",
        group="run",
        metavar="CHECKPOINT",
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "Fine-tune these weights: a pipeline folder or a Hub id. Noise schedule and prediction type are theirs.",
        group="run",
        metavar="MODEL",
    )
    dry_run: bool = option(
        False,
        "Say what would be trained, from where, and what it costs in time and memory; write nothing.",
        group="run",
    )

    model_config_name_or_path: str | None = option(
        None,
        "The U-Net: a recipe (res, res_conv, res_res, res_res_atn, res_large, demo; original/res and so on for the"
        " original's own) or a JSON file (default: res). Image size, channels and number of classes come from the"
        " dataset. Each of the options that follow replaces one entry.",
        group="network",
        metavar="CONFIG",
    )
    stem_channels: int | None = option(None, "Width of the first convolution, in channels.", group="network")
    block_out_channels: list[int] | None = option(
        None, "Width of each level, in channels, from the highest resolution down.", group="network"
    )
    layer_types: list[str] | None = option(
        None,
        "Layers of every level: resnet, convnext, class_attention, self_attention, channel_attention, or the"
        " original's res, conv, clsAtn, atn, chnAtn.",
        group="network",
        metavar="LAYER",
    )
    time_embed_dim: int | None = option(None, "Width of the time embedding.", group="network")
    class_embed_dim: int | None = option(None, "Width of the class embedding.", group="network")
    attention_patch_size: int | None = option(
        None, "Side of the patches of self-attention, in pixels of the level.", group="network"
    )
    dropout: float | None = option(
        None, "Probability of dropping a feature inside resnet and convnext layers.", group="network"
    )
    time_embedding_type: str | None = option(
        None,
        "Encoding of the timestep: sinusoidal, original_interleaved, original_sine or original_alternating.",
        group="network",
        metavar="NAME",
        choices=["sinusoidal", "original_interleaved", "original_sine", "original_alternating"],
    )
    class_attention_type: str | None = option(
        None,
        "identity is the original's, in which the class has no effect.",
        group="network",
        choices=["channel", "identity"],
    )
    output_head_type: str | None = option(
        None, "original is the original's narrow one.", group="network", choices=["conv", "original"]
    )
    unconditional: bool = option(False, "Train without classes.", group="network")

    prediction_type: str | None = option(
        None,
        "What the network predicts (default: v_prediction, or as the starting checkpoint).",
        group="diffusion",
        choices=["v_prediction", "epsilon", "sample"],
    )
    num_train_timesteps: int | None = option(
        None,
        "Number of diffusion timesteps T, at least 1 (default: 1000, or as the starting checkpoint).",
        at_least=1,
        group="diffusion",
    )
    beta_schedule: str | None = option(
        None,
        "Noise schedule: squaredcos_cap_v2, linear, scaled_linear, or original_cosine, the original's, whose"
        " alphas_cumprod never exceeds 0.999 (default: squaredcos_cap_v2, or as the starting checkpoint).",
        group="diffusion",
        metavar="NAME",
        choices=["squaredcos_cap_v2", "linear", "scaled_linear", "original_cosine"],
    )
    class_dropout_prob: float = option(
        0.2,
        "Probability of training an image without its class, which classifier-free guidance needs; in [0, 1].",
        at_least=0,
        at_most=1,
        group="diffusion",
    )
    vlb_weight: float = option(
        0.001, "Weight of the variational bound, which trains the variance; at least 0.", at_least=0, group="diffusion"
    )
    snr_gamma: float | None = option(
        None,
        "Min-SNR weighting of the loss with this gamma, above 0 (5 is usual; default: no weighting).",
        above=0,
        group="diffusion",
    )
    timestep_sampling: str = option(
        "uniform",
        "How timesteps are sampled; importance samples those of large loss more often.",
        group="diffusion",
        choices=["uniform", "importance"],
    )

    train_batch_size: int = option(128, "Images per process and forward pass.", at_least=1, group="optimisation")
    gradient_accumulation_steps: int = option(
        1, "Forward passes per optimizer step.", at_least=1, group="optimisation"
    )
    max_train_steps: int | None = option(
        None, "Optimizer steps (default: as num_train_epochs says).", at_least=1, group="optimisation"
    )
    num_train_epochs: float = option(
        100.0, "Epochs, if max_train_steps is not given; above 0.", above=0, group="optimisation"
    )
    optimizer: str = option(
        "adamw",
        "AdamW, fused where the device can; adamw_8bit keeps its moments in 8 bits and needs bitsandbytes and CUDA.",
        group="optimisation",
        choices=["adamw", "adamw_8bit"],
    )
    learning_rate: float = option(3e-4, "Largest learning rate, above 0.", above=0, group="optimisation")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Learning-rate schedule.",
        group="optimisation",
        choices=["constant", "constant_with_warmup", "linear", "cosine"],
    )
    lr_warmup_steps: int = option(
        500, "Optimizer steps over which the learning rate rises from 0.", at_least=0, group="optimisation"
    )
    adam_beta1: float = option(0.9, "AdamW's beta1, in [0, 1).", at_least=0, below=1, group="optimisation")
    adam_beta2: float = option(0.999, "AdamW's beta2, in [0, 1).", at_least=0, below=1, group="optimisation")
    adam_weight_decay: float = option(0.01, "AdamW's weight decay, at least 0.", at_least=0, group="optimisation")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon, above 0.", above=0, group="optimisation")
    max_grad_norm: float = option(
        1.0, "Gradients are clipped to this norm; 0 leaves them as they are.", at_least=0, group="optimisation"
    )
    use_ema: bool = option(True, "Keep an EMA of the weights, and sample from and save that.", group="optimisation")
    ema_max_decay: float = option(
        0.9999, "Largest decay of the EMA, in [0, 1].", at_least=0, at_most=1, group="optimisation"
    )
    ema_inv_gamma: float = option(
        1.0, "Decay after n steps is 1 - (1 + n / ema_inv_gamma) ^ -ema_power.", above=0, group="optimisation"
    )
    ema_power: float = option(0.75, "See ema_inv_gamma.", at_least=0, group="optimisation")

    mixed_precision: str | None = option(
        None,
        "Precision (default: what accelerate is configured for).",
        group="precision and speed",
        choices=["no", "fp16", "bf16"],
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass to save memory.", group="precision and speed"
    )
    torch_compile: bool = option(
        False, "Compile the network with torch.compile; the first steps take minutes.", group="precision and speed"
    )

    checkpointing_steps: int = option(
        1000,
        "Optimizer steps between two checkpoints; 0 writes one only when the run is asked to stop.",
        at_least=0,
        group="checkpoints and logging",
    )
    checkpoints_total_limit: int = option(
        2,
        "How many checkpoints are kept, each about four times as large as the network; 0 keeps all.",
        at_least=0,
        group="checkpoints and logging",
    )
    pipeline_steps: int = option(
        0,
        "Optimizer steps between two pipelines that are kept, in output_dir/pipelines; 0 keeps only the last one.",
        at_least=0,
        group="checkpoints and logging",
    )
    report_to: str = option(
        "tensorboard",
        "Tracker: tensorboard, wandb, comet_ml, ..., all, or none.",
        group="checkpoints and logging",
        metavar="NAME",
    )
    logging_steps: int = option(
        10, "Optimizer steps between two entries of the log.", at_least=1, group="checkpoints and logging"
    )

    sample_steps: int = option(
        0, "Optimizer steps between two sample grids; 0 samples only the last one.", at_least=0, group="samples"
    )
    num_sample_classes: int = option(
        10, "Classes in a sample grid, spread evenly over all.", at_least=1, group="samples"
    )
    num_samples_per_class: int = option(4, "Images of each class in a sample grid.", at_least=1, group="samples")
    num_inference_steps: int = option(50, "Denoising steps of the sample grids.", at_least=1, group="samples")
    guidance_scale: float = option(2.0, "Guidance scale of the sample grids, at least 0.", at_least=0, group="samples")

    push_to_hub: bool = option(False, "Upload the final pipeline with its model card.", group="Hub")
    hub_model_id: str | None = option(
        None, "Where to, user/name (default: the name of output_dir).", group="Hub", metavar="ID"
    )
    hub_private_repo: bool = option(False, "Make a new repository private.", group="Hub")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        super().__post_init__()
        if not Path(self.train_data_dir).is_dir():
            raise ValueError(
                f"train_data_dir is {self.train_data_dir}, but there is no such folder: make it with"
                " prepare_imagenet64.py"
            )
        if self.layer_types is not None:
            # the original separates them by commas
            self.layer_types = [name for entry in self.layer_types for name in entry.split(",") if name]
        if self.pretrained_model_name_or_path is not None:
            for name in ("model_config_name_or_path", *NETWORK_OPTIONS):
                if name != "dropout" and getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, but pretrained_model_name_or_path brings its own network:"
                        " leave one of them out"
                    )


# Options that replace one entry of the network's config.
NETWORK_OPTIONS = (
    "stem_channels",
    "block_out_channels",
    "layer_types",
    "time_embed_dim",
    "class_embed_dim",
    "attention_patch_size",
    "dropout",
    "time_embedding_type",
    "class_attention_type",
    "output_head_type",
)
