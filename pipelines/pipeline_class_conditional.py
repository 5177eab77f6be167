"""Class-conditional image generation in pixel space, with classifier-free guidance and any diffusers scheduler.

The file imports torch, diffusers and the file of `cached_weights` only: a repository on the Hub carries both files.
"""

import difflib
import importlib
import importlib.machinery
import inspect
import json
import math
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import randn_tensor

from .cached_weights import cached_weights


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# They know the noise levels of the training and would generate wrong images all the same.
UNSUITABLE_SCHEDULERS = {
    "LCMScheduler": "it takes every prediction for a finished image, which only a network distilled for that gives",
    "CogVideoXDDIMScheduler": "it shifts the noise levels of the training, which this network does not know",
    "CogVideoXDPMScheduler": "it shifts the noise levels of the training, which this network does not know",
    "DDIMInverseScheduler": "it runs from an image to its noise",
    "DPMSolverMultistepInverseScheduler": "it runs from an image to its noise",
    "IPNDMScheduler": "it asks for times between 0 and 1, and this network knows timesteps of num_train_timesteps",
    "RePaintScheduler": "it fills a hole in a given image",
    "UnCLIPScheduler": "it must be told the previous timestep at every step",
}
_OF_ANOTHER_KIND = "it has no alphas_cumprod, the noise levels of the training, as flow matching and EDM do not"

# They divide by the difference of two noise levels or take its logarithm: two steps at one level give NaN.
_NEED_DIFFERENT_NOISE_LEVELS = {
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
}

# Of errors of the noise prediction; with more nothing can be recognised. The original program stays below 160.
_MAX_FIRST_STEP_GAIN = 1000.0


def check_scheduler(scheduler: SchedulerMixin | type[SchedulerMixin]) -> None:
    """Raises ValueError for a scheduler, or a class of them, that cannot generate with a network of this kind."""
    kind = scheduler if isinstance(scheduler, type) else type(scheduler)
    accepted = inspect.signature(kind.__init__).parameters if kind is scheduler else ()
    knows_levels = hasattr(scheduler, "alphas_cumprod") or "trained_betas" in accepted
    names = (base.__name__ for base in kind.__mro__ if base.__name__ in UNSUITABLE_SCHEDULERS)
    reason = UNSUITABLE_SCHEDULERS.get(next(names, ""), None if knows_levels else _OF_ANOTHER_KIND)
    if reason is not None:
        raise ValueError(f"{kind.__name__} cannot generate with this network: {reason}; take UniPCMultistepScheduler")


def _check_noise_levels(scheduler: SchedulerMixin) -> None:
    """Refuses noise levels that a stock scheduler chose and cannot step over; ours can step over all."""
    timesteps = scheduler.timesteps.detach().cpu()
    steps = getattr(scheduler, "num_inference_steps", len(timesteps))
    name, names = type(scheduler).__name__, {base.__name__ for base in type(scheduler).__mro__}
    if not timesteps.isfinite().all():
        raise ValueError(f"{name} finds no {steps} timesteps on this noise schedule: take more, or 'leading' spacing")
    # schedulers of second order have a timestep of their own between any two
    visited = timesteps[:: getattr(scheduler, "order", 1)].to(torch.int64).clamp(0, len(scheduler.alphas_cumprod) - 1)
    levels = scheduler.alphas_cumprod.detach().cpu()[visited]
    equal = (levels[1:] == levels[:-1]).nonzero().flatten().tolist()
    # the upper end of a learned variance is a beta, whose logarithm is taken
    if equal and (names & _NEED_DIFFERENT_NOISE_LEVELS or _takes_learned_variance(scheduler)):
        remedy = f"take fewer than {steps} steps, or EulerDiscreteScheduler"
        raise ValueError(f"{name} needs a different noise level at every step, but two are the same: {remedy}")
    # x_0 = (x_t - sqrt(1 - abar_t) noise) / sqrt(abar_t), and the next sample has sqrt(abar_next) of it
    gain = ((levels[1] if len(levels) > 1 else 1.0) / levels[0]) ** 0.5
    if scheduler.config.get("prediction_type") == "epsilon" and gain > _MAX_FIRST_STEP_GAIN:
        told = f"the first step, from timestep {visited[0].item()}, multiplies errors of the noise prediction by"
        logger.warning(f"{name}: {told} {gain:.0f}; take timestep_spacing='leading'")


def _takes_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler's step takes 2 * channels: by its class, as from_config carries any option."""
    if not isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
        return getattr(scheduler, "accepts_learned_variance", False)
    if scheduler.config.variance_type == "learned":
        raise ValueError("the scheduler's variance_type is 'learned', but the network predicts 'learned_range'")
    return scheduler.config.variance_type == "learned_range"


# diffusers checks a component that from_pretrained is given against the class that the repository names, imported by
# the name of its file: stand-ins with the right base classes let it pass.
for _file, _name, _base in (
    ("unet_class_conditional", "ClassConditionalUNet2DModel", ModelMixin),
    ("scheduling_ddim_eta", "EtaDDIMScheduler", SchedulerMixin),
    ("scheduling_ddim_eta", "LearnedVarianceDDPMScheduler", SchedulerMixin),
    ("scheduling_ddpm_learned", "LearnedVarianceDDPMScheduler", SchedulerMixin),
):
    _module = sys.modules.setdefault(_file, types.ModuleType(_file))
    if not hasattr(_module, _name):
        _module.__spec__ = importlib.machinery.ModuleSpec(_file, loader=None)
        # it looks in the module for the base classes that it knows, too
        for _class in (_base, ConfigMixin, type(_name, (_base, ConfigMixin), {})):
            setattr(_module, _class.__name__, _class)


def _package_module(name: str) -> Any:
    """A module beside this one; None where this file is a copy from a repository, maybe of another version."""
    package = __name__.rpartition(".")[0]
    # by name, because diffusers would look for what is imported relatively in the repository
    return importlib.import_module(f"{package}.{name}") if package == "imagenet64_diffusion.pipelines" else None


class ClassConditionalPipeline(DiffusionPipeline):
    """Generates images of given classes with a `ClassConditionalUNet2DModel` and any scheduler.

    Args:
        unet: The denoising network, (batch, channels, height, width) -> (batch, 2 * channels, height, width): the
            prediction, then the interpolation of the variance.
        scheduler: Ours or a stock one. Those that use the learned variance are given both halves of the network's
            output, the others the prediction alone.
        id2label: The name of each class id, several names of one class separated by commas; None without names.
        guide_variance: Whether guidance extrapolates the variance too, as the original program does; else the variance
            is that of the conditional branch.

    During and after a call ``timesteps`` are its timesteps, and ``num_timesteps`` how many there are.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "model_output", "pred_original_sample"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guide_variance: bool = False,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        # JSON has string keys; inside they are ints
        id2label = None if id2label is None else {int(key): str(label) for key, label in id2label.items()}
        self.register_to_config(id2label=id2label, guide_variance=guide_variance)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        self._ids_by_name: dict[str, list[int]] = {}
        for index, label in sorted((id2label or {}).items()):
            # "tabby, tabby cat" is found under the whole and under each part
            for name in {label, *(part.strip() for part in label.split(","))}:
                self._ids_by_name.setdefault(name, []).append(index)

    @property
    def labels(self) -> dict[str, int]:
        """Every class name that stands for exactly one class -> its id."""
        return {name: ids[0] for name, ids in self._ids_by_name.items() if len(ids) == 1}

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class ids of class names, one name or several; ValueError if one is unknown or stands for several."""
        if not isinstance(label, str):
            return [index for name in label for index in self.get_label_ids(name)]
        if not self._ids_by_name:
            raise ValueError(f"class label {label!r} is a name, but this pipeline has no class names: give an id")
        ids = self._ids_by_name.get(label, [])
        if not ids:
            close = " or ".join(map(repr, difflib.get_close_matches(label, self._ids_by_name)))
            hint = f"did you mean {close}?" if close else "pipeline.labels lists all names"
            raise ValueError(f"there is no class named {label!r}; {hint}")
        if len(ids) > 1:
            whole = " or ".join(f"{index} ({self.config.id2label[index]})" for index in ids)
            raise ValueError(f"the name {label!r} stands for several classes: give the id, {whole}")
        return ids

    def _class_ids(self, class_labels: Any) -> list[int]:
        """One class id for each label, the null class for None; without classes they only count."""
        num_classes = self.unet.config.num_class_embeds
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = [class_labels] if class_labels is None or isinstance(class_labels, (int, str)) else list(class_labels)
        if not labels:
            raise ValueError("class_labels is empty: give at least one class, or None for an image without class")
        if num_classes is None and any(label is not None for label in labels):
            raise ValueError("class_labels were given, but the network has no classes: leave them None")
        ids = []
        for label in labels:
            index = self.get_label_ids(label)[0] if isinstance(label, str) else label
            if index is not None and not 0 <= index <= num_classes:
                known = f"ids go from 0 to {num_classes - 1}, and {num_classes} or None is the null class"
                raise ValueError(f"class label {label} is out of range: {known}")
            ids.append((num_classes or 0) if index is None else int(index))
        return ids

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the last or current call; a callback changes it by setting ``_guidance_scale``."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | torch.Tensor | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 100,
        timesteps: Sequence[int] | None = None,
        eta: float = 0.0,
        clip_sample: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | Any:
        """Generates images.

        Args:
            class_labels: Class ids or names, one or several. None is the null class: an image without class.
            num_images_per_label: How many images of each; those of one label follow one another.
            guidance_scale: g in null + g (conditional - null) (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598,
                equation 6, with g = 1 + w). Up to 1 the conditional branch runs alone.
            guidance_interval: Begin and end of guidance as fractions of the steps (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724). Outside it a step costs one branch.
            num_inference_steps: Number of denoising steps.
            timesteps: The timesteps themselves, descending, instead of ``num_inference_steps``.
            eta: From 0, deterministic, to 1, as random as DDPM (Song et al. 2020, https://arxiv.org/abs/2010.02502,
                equation 16), for schedulers that take it.
            clip_sample: Whether the predicted image is clipped at every step; None as the scheduler's config says.
            generator: One for all images, or a list of one per image, on which alone the image depends then.
            latents: The starting noise, (images, channels, height, width), instead of noise from ``generator``.
            output_type: ``"pil"``, ``"np"`` (images, height, width, channels) in [0, 1], ``"pt"`` (images, channels,
                height, width) in [0, 1], or ``"latent"``, the last sample as it is, about [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as ``callback(pipeline, step, timestep, tensors)`` after each step. It may
                return ``{"latents": ...}`` to replace the sample; ``pipeline._interrupt = True`` ends the call early.
            callback_on_step_end_tensor_inputs: What ``tensors`` holds: ``"latents"``, ``"model_output"`` (after
                guidance), ``"pred_original_sample"`` (None for schedulers that do not tell it).

        Raises:
            ValueError: If an argument does not fit.
        """
        # 1. One class id for each image. An image of the null class has no other branch to be guided away from.
        class_ids = [index for index in self._class_ids(class_labels) for _ in range(num_images_per_label)]
        null_class, channels = self.unet.config.num_class_embeds, self.unet.config.in_channels
        can_guide = null_class is not None and any(index != null_class for index in class_ids)
        interval, num_images = guidance_interval, len(class_ids)
        given, known = list(callback_on_step_end_tensor_inputs), self._callback_tensor_inputs
        num_generators = len(generator) if isinstance(generator, (list, tuple)) else num_images
        is_interval = len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0
        fits = output_type != "pil" or channels in (1, 3, 4)
        for name, value, is_right, wanted in (
            ("num_images_per_label", num_images_per_label, num_images_per_label >= 1, "at least 1"),
            ("guidance_interval", interval, is_interval, "two fractions of the steps, 0 <= begin <= end <= 1"),
            ("output_type", repr(output_type), output_type in OUTPUT_TYPES, f"one of {OUTPUT_TYPES}"),
            ("output_type", "'pil'", fits, f"'np' or 'pt' for images of {channels} channels"),
            ("generator", f"a list of {num_generators}", num_generators == num_images, f"one, or of {num_images}"),
            ("callback_on_step_end_tensor_inputs", given, {*given} <= {*known}, f"of {known}"),
        ):
            if not is_right:
                raise ValueError(f"{name} is {value}, but must be {wanted}")
        self._guidance_scale, self._interrupt = guidance_scale, False

        # 2. Timesteps, and which of them are guided; 0.29 * 100 is a little less than 29.
        scheduler = self.prepare_scheduler(num_inference_steps, timesteps, clip_sample)
        takes_variance, step_arguments = _takes_learned_variance(scheduler), _step_arguments(scheduler, eta, generator)
        guided_steps = range(*(math.floor(end * self.num_timesteps + 1e-6) for end in guidance_interval))

        # 3. Starting noise, kept in at least float32 whatever the network computes in.
        latents = self.prepare_latents(num_images, generator, latents) * scheduler.init_noise_sigma
        both_labels = torch.tensor([null_class or 0] * num_images + class_ids, device=latents.device)
        labels = None if null_class is None else both_labels[num_images:]

        # 4. Denoise.
        with cached_weights(self.unet), self.progress_bar(total=self.num_timesteps) as progress_bar:
            for step, timestep in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                model_input = scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
                # not the argument: a callback may have changed it
                guided = can_guide and self.guidance_scale > 1 and step in guided_steps
                if guided:
                    model_input = model_input.repeat(2, 1, 1, 1)
                    output = self.unet(model_input, timestep, both_labels, return_dict=False)[0].to(latents.dtype)
                    null, conditional = output.chunk(2)
                    model_output = torch.lerp(null, conditional, self.guidance_scale)
                    if not self.config.guide_variance:
                        model_output[:, channels:] = conditional[:, channels:]
                else:
                    model_output = self.unet(model_input, timestep, labels, return_dict=False)[0].to(latents.dtype)
                if not takes_variance:
                    model_output = model_output[:, :channels]

                output = scheduler.step(model_output, timestep, latents, **step_arguments)
                latents = output.prev_sample

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "model_output": model_output,
                        "pred_original_sample": getattr(output, "pred_original_sample", None),
                    }
                    tensors = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).get("latents", latents)
                progress_bar.update()

        # 5. To images.
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def prepare_latents(self, num_images: int, generator: Any, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Standard normal noise from the generator, or the given latents, (images, channels, height, width)."""
        size = self.unet.config.sample_size
        shape = (num_images, self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
        device, dtype = self._execution_device, torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        # other sizes are for the network to take or refuse
        if latents.ndim != 4 or latents.shape[:2] != shape[:2]:
            raise ValueError(f"latents has shape {tuple(latents.shape)}, but must be {shape}")
        return latents.to(device=device, dtype=dtype)

    def prepare_scheduler(
        self, num_inference_steps: int = 100, timesteps: Sequence[int] | None = None, clip_sample: bool | None = None
    ) -> SchedulerMixin:
        """The scheduler that a call with these arguments steps with, its timesteps set; they are `timesteps` then."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        check_scheduler(scheduler)
        if clip_sample is not None:
            # not by the config, into which from_config carries the options of other schedulers
            if "clip_sample" not in inspect.signature(type(scheduler).__init__).parameters:
                raise ValueError(f"clip_sample is {clip_sample}, but {name} has no such option: leave it None")
            scheduler = type(scheduler).from_config(scheduler.config, clip_sample=clip_sample)
        steps: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if timesteps is not None:
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"timesteps were given, but {name} chooses its own: give num_inference_steps instead")
            steps = {"timesteps": list(timesteps)}
        scheduler.set_timesteps(**steps, device=self._execution_device)
        if not getattr(scheduler, "accepts_learned_variance", False):
            _check_noise_levels(scheduler)
        self.timesteps, self.num_timesteps = scheduler.timesteps, len(scheduler.timesteps)
        return scheduler

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes a folder that `DiffusionPipeline.from_pretrained` loads where this package is not installed.

        The source files of the pipeline and of components that are not diffusers' own lie in it, and
        ``model_index.json`` names them. Arguments are those of `DiffusionPipeline.save_pretrained`. With
        ``push_to_hub=True`` the folder is uploaded, with the ``README.md`` and the images in it. ValueError if a
        component's class is defined in no file.
        """
        hub_options = ("repo_id", "commit_message", "private", "token", "create_pr")
        hub_arguments = {name: kwargs.pop(name) for name in hub_options if name in kwargs}
        super().save_pretrained(save_directory, *args, **kwargs)

        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = _carry_source(type(self), folder)
        for name, component in self.components.items():
            component_class = type(getattr(component, "_orig_mod", component))
            if not component_class.__module__.startswith("diffusers."):
                index[name] = _carry_source(component_class, folder / name)
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        if push_to_hub:
            repo_id = hub_arguments.pop("repo_id", folder.resolve().name)
            if (package := _package_module("model_card")) is not None:
                package.push_folder(self, folder, repo_id, **hub_arguments)
            else:  # through save_pretrained once more, so that what is uploaded is complete
                self.push_to_hub(repo_id, **hub_arguments)

    def push_to_hub(self, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Uploads what `save_pretrained` writes, and a model card where the repository has none, in one commit.

        Without the package it uploads as every diffusers pipeline does, with diffusers' card. Arguments and result are
        those of `DiffusionPipeline.push_to_hub`.
        """
        if (package := _package_module("model_card")) is not None:
            return package.push_pipeline(self, repo_id, *args, **kwargs)
        return super().push_to_hub(repo_id, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "ClassConditionalPipeline":
        """Loads a pipeline from a folder or from the Hub; with the package see `load_pipeline`."""
        if (package := _package_module("loading")) is not None:
            return package.load_pipeline(pretrained_model_name_or_path, pipeline_class=cls, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def _step_arguments(scheduler: SchedulerMixin, eta: float, generator: Any) -> dict[str, Any]:
    """Those of eta and generator that the scheduler's step takes."""
    accepted = inspect.signature(scheduler.step).parameters
    if "eta" not in accepted and eta != 0.0:
        logger.warning(f"eta is {eta}, but {type(scheduler).__name__} takes no eta: it has no effect")
    if "generator" not in accepted and scheduler.config.get("noise_sampler_seed", 0) is None:
        # it takes seeds, one or one for each image; from copies, so that the starting noise is that of every scheduler
        several = isinstance(generator, (list, tuple))
        copies = [each.clone_state() for each in (generator if several else [generator]) if each is not None]
        seeds = [int(torch.randint(2**63 - 1, (), generator=copy, device=copy.device)) for copy in copies]
        scheduler.noise_sampler_seed = seeds if several else next(iter(seeds), None)
    return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}


def _carry_source(component_class: type, folder: Path) -> list[str]:
    """Copies the file that defines a class; what model_index.json then says of it."""
    name = component_class.__name__
    try:
        source = Path(inspect.getfile(component_class))
    except (TypeError, OSError) as error:
        raise ValueError(
            f"{name} is defined in no file that could be saved with the pipeline: move it to a module of its own"
        ) from error
    for file in (source, *map(Path, get_relative_import_files(source))):
        if file.is_file() and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    return [source.stem, name]
