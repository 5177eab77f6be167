"""The options of a training run, named as in the training scripts of diffusers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainOptions:
    """Options of `train`. The help texts say what each one is."""

    train_data_dir: str = field(metadata={"help": "Folder written by prepare_imagenet64.py."})

    # where it goes
    output_dir: str = _option("outputs/train", "Folder for the pipeline, the logs and the sample grids.")
    model_config_name_or_path: str = _option(
        "res",
        "The U-Net: a recipe (res, res_conv, res_res, res_res_atn, res_large, demo; original/res and so on for the"
        " original's own) or a JSON file. Image size, channels and number of classes come from the dataset.",
    )
    seed: int = _option(0, "Seed of weights, data order, noise, timesteps and class drop-out.")

    # what is learned
    prediction_type: str = _option(
        "v_prediction", "What the network predicts.", choices=["v_prediction", "epsilon", "sample"]
    )
    num_train_timesteps: int = _option(1000, "Number of diffusion timesteps T.")
    beta_schedule: str = _option(
        "squaredcos_cap_v2",
        "Noise schedule; original_cosine is the original's, whose alphas_cumprod never exceeds 0.999.",
        choices=["squaredcos_cap_v2", "linear", "scaled_linear", "original_cosine"],
    )
    unconditional: bool = _option(False, "Train without classes.")
    class_dropout_prob: float = _option(
        0.2, "Probability of training an image without its class, which classifier-free guidance needs; in [0, 1]."
    )
    vlb_weight: float = _option(0.001, "Weight of the variational bound, which trains the variance.")
    timestep_sampling: str = _option(
        "uniform",
        "How timesteps are drawn; importance draws those of large loss more often.",
        choices=["uniform", "importance"],
    )
    random_flip: bool = _option(False, "Mirror half of the images.")

    # how it is learned
    train_batch_size: int = _option(128, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer step.")
    max_train_steps: int | None = _option(None, "Optimizer steps; by default as num_train_epochs says.")
    num_train_epochs: float = _option(100.0, "Epochs, if max_train_steps is not given.")
    learning_rate: float = _option(3e-4, "Largest learning rate.")
    lr_scheduler: str = _option(
        "constant_with_warmup",
        "Course of the learning rate.",
        choices=["constant", "constant_with_warmup", "linear", "cosine"],
    )
    lr_warmup_steps: int = _option(500, "Optimizer steps over which the learning rate rises from 0.")
    adam_beta1: float = _option(0.9, "AdamW's beta1.")
    adam_beta2: float = _option(0.999, "AdamW's beta2.")
    adam_weight_decay: float = _option(0.01, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 leaves them as they are.")
    use_ema: bool = _option(True, "Keep a moving average of the weights, and sample from and save that.")
    ema_max_decay: float = _option(0.9999, "Largest decay of the moving average.")
    ema_inv_gamma: float = _option(1.0, "Decay after n steps is 1 - (1 + n / ema_inv_gamma) ^ -ema_power.")
    ema_power: float = _option(0.75, "See ema_inv_gamma.")
    mixed_precision: str | None = _option(
        None, "Default: what accelerate is configured for.", choices=["no", "fp16", "bf16"]
    )
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass to save memory.")

    # data
    dataset_in_memory: bool = _option(False, "Hold all images in memory instead of reading them from the disk.")
    dataloader_num_workers: int = _option(0, "Processes that read images, per training process.")

    # what is seen
    report_to: str = _option("tensorboard", "Tracker: tensorboard, wandb, comet_ml, ..., all, or none.")
    logging_steps: int = _option(10, "Optimizer steps between two entries of the log.")
    sample_steps: int = _option(0, "Optimizer steps between two sample grids; 0 draws only the last one.")
    num_sample_classes: int = _option(10, "Classes in a sample grid, spread evenly over all.")
    num_samples_per_class: int = _option(4, "Images of each class in a sample grid.")
    num_inference_steps: int = _option(50, "Denoising steps of the sample grids.")
    guidance_scale: float = _option(2.0, "Guidance scale of the sample grids.")

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
        for name in ("seed", "lr_warmup_steps", "sample_steps", "dataloader_num_workers"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("vlb_weight", "adam_weight_decay", "max_grad_norm", "ema_power", "guidance_scale"):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "num_train_epochs", "adam_epsilon", "ema_inv_gamma"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("class_dropout_prob", "ema_max_decay"):
            self._require(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        if self.max_train_steps is not None:
            self._require("max_train_steps", self.max_train_steps >= 1, "at least 1")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)}, but must be {what}")
