"""Class-conditional image generation in pixel space, with classifier-free guidance and any diffusers scheduler.

The file imports torch, diffusers and two files beside it: a repository on the Hub carries all three.
"""

import contextlib
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
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.dynamic_modules_utils import get_relative_import_files
from diffusers.utils.torch_utils import randn_tensor

from .cached_weights import cached_weights
from .noise_kinds import VariancePreserving, check_scheduler, known_kind


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_NO_NULL_CLASS = (
    "1: this network has no null class to be guided away from. Autoguidance is the way, by a weaker network, or one"
    " without classes, as the pipeline's guidance_unet"
)
_NO_CLASSIFIER = "0: the pipeline has no classifier, or an image has no class"

# diffusers checks a component that from_pretrained is given against the class that the repository names, imported by
# the name of its file: stand-ins with the right base classes let it pass.
for _file, _name, _base in (
    ("unet_class_conditional", "ClassConditionalUNet2DModel", ModelMixin),
    ("unet_adm", "ADMUNet2DModel", ModelMixin),
    ("unet_edm2", "EDM2UNet2DModel", ModelMixin),
    ("classifier_adm", "ADMClassifierModel", ModelMixin),
    ("scheduling_ddim_eta", "EtaDDIMScheduler", SchedulerMixin),
    ("scheduling_ddim_eta", "LearnedVarianceDDPMScheduler", SchedulerMixin),
    ("scheduling_ddpm_learned", "LearnedVarianceDDPMScheduler", SchedulerMixin),
    ("scheduling_edm_heun", "EDMHeunScheduler", SchedulerMixin),
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
    """Generates images of given classes with one of our networks, or diffusers' `UNet2DModel`, and any scheduler.

    The scheduler says how noise is described, and with it what the network predicts: see ``noise_kinds.py``.

    Args:
        unet: The denoising network, (batch, channels, height, width) -> the prediction in that shape, or in (batch,
            2 * channels, height, width) followed by the interpolation of the variance. Class ``num_class_embeds`` is
            its null class, unless its config has ``null_class=False``; of a stock `UNet2DModel` the last embedding
            is, where it has one more than ``id2label`` has names.
        scheduler: Ours or a stock one. Those that use the learned variance are given both halves of the network's
            output, the others the prediction alone.
        id2label: The name of each class id, several names of one class separated by commas; None without names.
        guide_variance: Whether guidance extrapolates the variance too, as the original program does; else the variance
            is that of the conditional branch.
        guidance_unet: A weaker network, or one without classes, to be guided away from instead of the null class
            (autoguidance, Karras et al. 2024, https://arxiv.org/abs/2406.02507).
        classifier: (batch, channels, height, width), timestep -> ``logits`` (batch, classes) of noisy images, for
            guidance by a classifier (Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233).

    During and after a call ``timesteps`` are its timesteps, and ``num_timesteps`` how many there are.
    """

    model_cpu_offload_seq = "classifier->guidance_unet->unet"
    _optional_components: ClassVar[list[str]] = ["guidance_unet", "classifier"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "model_output", "pred_original_sample"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guide_variance: bool = False,
        guidance_unet: ModelMixin | None = None,
        classifier: ModelMixin | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, guidance_unet=guidance_unet, classifier=classifier)
        # schedulers are swapped later, and the network stays what it was trained to be
        self.noise_kind = known_kind(scheduler) or VariancePreserving
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

    @property
    def num_classes(self) -> int | None:
        """Number of classes, the null class not among them; None for a network without classes."""
        return self._count_classes()[0]

    @property
    def null_class(self) -> int | None:
        """The label of an image without class; None where the network was not trained with such images."""
        return self._count_classes()[1]

    @property
    def default_guidance_scale(self) -> float:
        """The scale of a call that gives none: 5 where there is a null class to be guided away from, else 1."""
        return 1.0 if self.null_class is None or self.guidance_unet is not None else 5.0

    def _count_classes(self) -> tuple[int | None, int | None]:
        config, num_names = self.unet.config, len(self.config.id2label or ())
        network = getattr(self.unet, "_orig_mod", self.unet)
        is_stock = isinstance(network, UNet2DModel) and "null_class" not in config
        if is_stock and num_names and config.num_class_embeds == num_names + 1:
            return num_names, num_names
        return config.num_class_embeds, config.num_class_embeds if config.get("null_class", not is_stock) else None

    def _class_ids(self, class_labels: Any) -> list[int]:
        """One class id for each image; without classes they only count."""
        num_classes, null_class = self.num_classes, self.null_class
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = [class_labels] if class_labels is None or isinstance(class_labels, (int, str)) else list(class_labels)
        if not labels:
            raise ValueError("class_labels is empty: give at least one class, or None for an image without class")
        if num_classes is None and any(label is not None for label in labels):
            raise ValueError("class_labels were given, but the network has no classes: leave them None")
        ids: list[int] = []
        for label in labels:
            index: Any = self.get_label_ids(label)[0] if isinstance(label, str) else label
            if num_classes is None:
                index = 0
            elif index is None and null_class is None:
                raise ValueError("class label None asks for the null class, which this network does not have")
            elif index is None:
                index = null_class
            elif not 0 <= index < num_classes and index != null_class:
                null = "" if null_class is None else f", and {null_class} or None is the null class"
                raise ValueError(f"class label {label} is out of range: ids go from 0 to {num_classes - 1}{null}")
            ids.append(int(index))
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
        guidance_scale: float | None = None,
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
        guidance_sigma_interval: tuple[float, float] | None = None,
        classifier_scale: float = 0.0,
    ) -> ImagePipelineOutput | Any:
        """Generates images.

        Args:
            class_labels: Class ids or names, one or several. None is the null class: an image without class.
            num_images_per_label: How many images of each; those of one label follow one another.
            guidance_scale: g in null + g (conditional - null) (Ho and Salimans 2022, https://arxiv.org/abs/2207.12598,
                equation 6, with g = 1 + w), where null is the null class, or the guidance network if there is one. Up
                to 1 the conditional branch runs alone. None is 5 where there is a null class, and 1 elsewhere.
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
            guidance_sigma_interval: Noise levels above the first and up to the second are guided, as the paper of the
                interval has it, in standard deviations of the noise over that of the image; None is all.
            classifier_scale: Factor of the classifier's gradient, at least 0; 0 does without the classifier.

        Raises:
            ValueError: If an argument does not fit.
        """
        # 1. One class id for each image. An image of the null class has no other branch to be guided away from.
        class_ids = [index for index in self._class_ids(class_labels) for _ in range(num_images_per_label)]
        null_class, channels, num_images = self.null_class, self.unet.config.in_channels, len(class_ids)
        has_other, any_class = self.guidance_unet is not None, any(index != null_class for index in class_ids)
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        cannot_guide = guidance_scale > 1 and not has_other and null_class is None and self.num_classes is not None
        cannot_classify = classifier_scale > 0 and (self.classifier is None or null_class in class_ids)
        interval, sigmas = guidance_interval, guidance_sigma_interval
        given, known = list(callback_on_step_end_tensor_inputs), self._callback_tensor_inputs
        num_generators = len(generator) if isinstance(generator, (list, tuple)) else num_images
        is_interval = len(interval) == 2 and 0.0 <= interval[0] <= interval[1] <= 1.0
        are_sigmas = sigmas is None or (len(sigmas) == 2 and 0.0 <= sigmas[0] <= sigmas[1])
        fits = output_type != "pil" or channels in (1, 3, 4)
        for name, value, is_right, wanted in (
            ("num_images_per_label", num_images_per_label, num_images_per_label >= 1, "at least 1"),
            ("guidance_scale", guidance_scale, not cannot_guide, _NO_NULL_CLASS),
            ("guidance_interval", interval, is_interval, "two fractions of the steps, 0 <= begin <= end <= 1"),
            ("guidance_sigma_interval", sigmas, are_sigmas, "two noise levels, 0 <= low <= high"),
            ("classifier_scale", classifier_scale, classifier_scale >= 0, "at least 0"),
            ("classifier_scale", classifier_scale, not cannot_classify, _NO_CLASSIFIER),
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
        kind, step_arguments = self.noise_kind, _step_arguments(scheduler, eta, generator)
        takes_variance = kind.takes_learned_variance(scheduler)
        takes_gradient = "score_gradient" in inspect.signature(scheduler.step).parameters
        guided_steps = {*range(*(math.floor(end * self.num_timesteps + 1e-6) for end in interval))}
        if sigmas is not None:
            levels = kind.sigmas(scheduler).tolist()
            guided_steps = {step for step in guided_steps if sigmas[0] < levels[step] <= sigmas[1]}
        if not (has_other or (null_class is not None and any_class)):
            guided_steps = set()

        # 3. Starting noise, kept in at least float32 whatever the network computes in.
        latents = self.prepare_latents(num_images, generator, latents) * scheduler.init_noise_sigma
        labels = None if self.num_classes is None else torch.tensor(class_ids, device=latents.device)

        # 4. Denoise.
        with contextlib.ExitStack() as stack:
            for network in filter(None, (self.unet, self.guidance_unet)):
                stack.enter_context(cached_weights(network))
            progress_bar = stack.enter_context(self.progress_bar(total=self.num_timesteps))
            for step, timestep in enumerate(scheduler.timesteps):
                if self._interrupt:
                    break
                model_input = scheduler.scale_model_input(latents, timestep)
                # not the argument: a callback may have changed it
                scale = self.guidance_scale if step in guided_steps else 1.0
                model_output = self._predict(model_input, timestep, labels, scale)
                if classifier_scale:
                    gradient = classifier_scale * self._class_gradient(model_input, timestep, class_ids)
                    if takes_gradient:
                        step_arguments["score_gradient"] = gradient
                    else:
                        model_output = kind.shift_by_score(model_output, gradient, timestep, scheduler)
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

    def _predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: Any, guidance_scale: float
    ) -> torch.Tensor:
        """What the network says of the scaled sample, guided where the scale is above 1, in the sample's dtype."""

        def call(network: ModelMixin, sample: torch.Tensor, labels: Any) -> torch.Tensor:
            return network(sample.to(network.dtype), timestep, labels, return_dict=False)[0].to(sample.dtype)

        if not guidance_scale > 1:
            return call(self.unet, sample, labels)
        if self.guidance_unet is not None:
            has_classes = self.guidance_unet.config.num_class_embeds is not None
            null = call(self.guidance_unet, sample, labels if has_classes else None)
            output = call(self.unet, sample, labels)
        else:
            both = torch.cat([torch.full_like(labels, self.null_class or 0), labels])
            null, output = call(self.unet, sample.repeat(2, 1, 1, 1), both).chunk(2)
        guided = null.shape[1] if self.config.guide_variance else sample.shape[1]
        mixed = torch.lerp(null[:, :guided], output[:, :guided], guidance_scale)
        return torch.cat([mixed, output[:, guided:]], dim=1)

    def _class_gradient(self, sample: torch.Tensor, timestep: torch.Tensor, class_ids: list[int]) -> torch.Tensor:
        """Gradient of the log-probability that the classifier gives each noisy image's class, in the images' shape."""
        with torch.enable_grad():
            sample = sample.detach().requires_grad_()
            logits = self.classifier(sample.to(self.classifier.dtype), timestep).logits.float()
            chosen = logits.log_softmax(dim=-1)[range(len(class_ids)), class_ids]
            return torch.autograd.grad(chosen.sum(), sample)[0]

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
        check_scheduler(scheduler, self.noise_kind)
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
        self.noise_kind.check_steps(scheduler)
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
            if component is not None and not component_class.__module__.startswith("diffusers."):
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
