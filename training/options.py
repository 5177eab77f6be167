"""The options of a training run, named as in the training scripts of diffusers."""

from dataclasses import dataclass, field
from pathlib import Path

from ..command_line import option


@dataclass
class TrainOptions:
    """Options of `train`. The help texts say what each one is."""

    train_data_dir: str = field(metadata={"help": "Folder written by prepare_imagenet64.py."})

    # where it goes
    output_dir: str = option("outputs/train", "Folder for the pipeline, the logs and the sample grids.")
    model_config_name_or_path: str = option(
        "res",
        "The U-Net: a recipe (res, res_conv, res_res, res_res_atn, res_large, demo; original/res and so on for the"
        " original's own) or a JSON file. Image size, channels and number of classes come from the dataset.",
    )
    seed: int = option(0, "Seed of weights, data order, noise, timesteps and class drop-out.")

    # what is learned
    prediction_type: str = option(
        "v_prediction", "What the network predicts.", choices=["v_prediction", "epsilon", "sample"]
    )
    num_train_timesteps: int = option(1000, "Number of diffusion timesteps T.")
    beta_schedule: str = option(
        "squaredcos_cap_v2",
        "Noise schedule; original_cosine is the original's, whose alphas_cumprod never exceeds 0.999.",
        choices=["squaredcos_cap_v2", "linear", "scaled_linear", "original_cosine"],
    )
    unconditional: bool = option(False, "Train without classes.")
    class_dropout_prob: float = option(
        0.2, "Probability of training an image without its class, which classifier-free guidance needs; in [0, 1]."
    )
    vlb_weight: float = option(0.001, "Weight of the variational bound, which trains the variance.")
    timestep_sampling: str = option(
        "uniform",
        "How timesteps are drawn; importance draws those of large loss more often.",
        choices=["uniform", "importance"],
    )
    random_flip: bool = option(False, "Mirror half of the images.")

    # how it is learned
    train_batch_size: int = option(128, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = option(None, "Optimizer steps; by default as num_train_epochs says.")
    num_train_epochs: float = option(100.0, "Epochs, if max_train_steps is not given.")
    learning_rate: float = option(3e-4, "Largest learning rate.")
    lr_scheduler: str = option(
        "constant_with_warmup",
        "Course of the learning rate.",
        choices=["constant", "constant_with_warmup", "linear", "cosine"],
    )
    lr_warmup_steps: int = option(500, "Optimizer steps over which the learning rate rises from 0.")
    adam_beta1: float = option(0.9, "AdamW's beta1.")
    adam_beta2: float = option(0.999, "AdamW's beta2.")
    adam_weight_decay: float = option(0.01, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 leaves them as they are.")
    use_ema: bool = option(True, "Keep a moving average of the weights, and sample from and save that.")
    ema_max_decay: float = option(0.9999, "Largest decay of the moving average.")
    ema_inv_gamma: float = option(1.0, "Decay after n steps is 1 - (1 + n / ema_inv_gamma) ^ -ema_power.")
    ema_power: float = option(0.75, "See ema_inv_gamma.")
    mixed_precision: str | None = option(
        None, "Default: what accelerate is configured for.", choices=["no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")

    # stopping and going on
    checkpointing_steps: int = option(0, "Optimizer steps between two checkpoints; 0 writes none.")
    checkpoints_total_limit: int | None = option(None, "How many checkpoints are kept; default: all.")
    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, also a converted one, or latest for the newest in output_dir."
    )

    # data
    dataset_in_memory: bool = option(False, "Hold all images in memory instead of reading them from the disk.")
    dataloader_num_workers: int = option(0, "Processes that read images, per training process.")

    # what is seen
    report_to: str = option("tensorboard", "Tracker: tensorboard, wandb, comet_ml, ..., all, or none.")
    logging_steps: int = option(10, "Optimizer steps between two entries of the log.")
    sample_steps: int = option(0, "Optimizer steps between two sample grids; 0 draws only the last one.")
    num_sample_classes: int = option(10, "Classes in a sample grid, spread evenly over all.")
    num_samples_per_class: int = option(4, "Images of each class in a sample grid.")
    num_inference_steps: int = option(50, "Denoising steps of the sample grids.")
    guidance_scale: float = option(2.0, "Guidance scale of the sample grids.")

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        if not Path(self.train_data_dir).is_dir():
            raise ValueError(
                f"train_data_dir is {self.train_data_dir}, but there is no such folder: make it with"
                " prepare_imagenet64.py"
            )
        for name in (
            "num_train_timesteps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "num_sample_classes",
            "num_samples_per_class",
            "num_inference_steps",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "lr_warmup_steps", "sample_steps", "dataloader_num_workers", "checkpointing_steps"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("vlb_weight", "adam_weight_decay", "max_grad_norm", "ema_power", "guidance_scale"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "ema_inv_gamma"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("class_dropout_prob", "ema_max_decay"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("max_train_steps", "checkpoints_total_limit"):
            if getattr(self, name) is not None:
                self._require(name, getattr(self, name) >= 1, "at least 1")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}, but must be {what}")
