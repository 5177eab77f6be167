"""Pipelines of the networks that ADM, EDM and EDM2 have published, with the networks that guide them."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, SchedulerMixin

from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import write_json
from . import adm, edm
from .families import Conversion
from .network_pickles import PickledObject, read_network, read_pickle
from .original import read_json
from .pickle_reader import (
    CheckpointError,
    StateDict,
    StoredTensor,
    load_tensors,
    read_checkpoint,
    read_state_dict,
    require,
)
from .sources import PROGRAMS, Source, class_names


# Says of a folder that it was converted, and from what.
MANIFEST_NAME = "conversion.json"


def family_of(name: str, found: Any) -> str:
    """Of which family of `PROGRAMS` the content of a checkpoint is."""
    if type(found) is StateDict and any(isinstance(value, PickledObject) for value in found.values()):
        return "edm2" if read_network(name, found).class_name == "Precond" else "edm"
    return "adm" if "input_blocks.0.0.weight" in read_state_dict(name, found) else "original"


def read_published(
    checkpoint: Path,
    found: Any,
    params: Path | None,
    id2label: Any,
    guidance_checkpoint: Path | None,
    classifier_checkpoint: Path | None,
) -> Source:
    """The pipeline of a checkpoint, which holds what was ``found``, and of the files that guide it."""
    name, family = checkpoint.name, family_of(checkpoint.name, found)
    flags = None if params is None else read_json(params)
    require(flags is None or family == "adm", f"params is {params}, but {name} says all of its network: leave it out")
    unet, scheduler, num_weights = _read_denoiser(name, found, flags)
    components: dict[str, Any] = {"unet": unet}
    if guidance_checkpoint is not None:
        found = read_checkpoint(guidance_checkpoint, read_pickle)
        guide, other, more = _read_denoiser(guidance_checkpoint.name, found, flags)
        what, num_classes = f"guidance_checkpoint is {guidance_checkpoint}", guide.config.num_class_embeds
        same = type(other) is type(scheduler) and dict(other.config) == dict(scheduler.config)
        require(same, f"{what}, whose noise levels are not those of {name}")
        _check_guide(what, guide, unet, num_classes in (None, unet.config.num_class_embeds))
        components["guidance_unet"], num_weights = guide, num_weights + more
    if classifier_checkpoint is not None:
        what = f"classifier_checkpoint is {classifier_checkpoint}"
        require(family == "adm", f"{what}, but it guides networks of ADM alone: leave it out")
        described = read_state_dict(classifier_checkpoint.name, read_checkpoint(classifier_checkpoint))
        with _errors_name(classifier_checkpoint.name):
            conversion = adm.convert_classifier(_shapes(described), _part(flags, "classifier"))
        classifier = _fill(classifier_checkpoint.name, described, conversion)
        _check_guide(what, classifier, unet, classifier.config.num_classes >= (unet.config.num_class_embeds or 0))
        components["classifier"], num_weights = classifier, num_weights + len(conversion.shapes)
    labels = class_names(id2label, unet.config.num_class_embeds, PROGRAMS[family].class_order)
    files = {"checkpoint": checkpoint, "guidance": guidance_checkpoint, "classifier": classifier_checkpoint}
    names = {role: file.name for role, file in files.items() if file is not None}
    report = {
        role: f"{network.num_parameters():,} parameters, {type(network).__name__}"
        for role, network in components.items()
    }
    return Source(
        ClassConditionalPipeline(scheduler=scheduler, id2label=labels, **components),
        num_weights,
        {**report, "scheduler": type(scheduler).__name__, "published": f"sampled with {PROGRAMS[family].sampler}"},
        {role: file for role, file in names.items() if role != "checkpoint"},
        lambda folder: write_json(folder / MANIFEST_NAME, {"family": family, **names, "params": flags}),
    )


def _read_denoiser(name: str, found: Any, flags: Mapping[str, Any] | None) -> tuple[ModelMixin, SchedulerMixin, int]:
    """A network, its sampler, and of how many tensors in the file."""
    family = family_of(name, found)
    require(family != "original", f"{name} is a checkpoint of the original, but must be one of ADM, EDM or EDM2")
    if family == "adm":
        described, flags = read_state_dict(name, found), _part(flags, "model")
    else:
        network = read_network(name, found)
        described = network.tensors
    with _errors_name(name):
        if family == "adm":
            conversion, scheduler = adm.convert_unet(_shapes(described), flags), adm.make_scheduler(flags)
        else:
            conversion = edm.convert_network(network.class_name, network.options, _shapes(described))
            scheduler = edm.make_scheduler(network.options)
    return _fill(name, described, conversion), scheduler, len(conversion.shapes)


def _part(flags: Mapping[str, Any] | None, part: str) -> Mapping[str, Any] | None:
    """The flags of one network, from the flags of each or of both in one."""
    chosen = flags.get(part) if flags is not None and flags.keys() <= {"model", "classifier"} else flags
    require(
        chosen is None or isinstance(chosen, dict),
        f"the flags of the {part} are {chosen!r:.80}, but must be an object",
    )
    return chosen


def _shapes(described: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: value.shape for key, value in described.items() if isinstance(value, StoredTensor)}


def _fill(name: str, described: Mapping[str, Any], conversion: Conversion) -> ModelMixin:
    """The network with the weights of a file."""
    weights = conversion.convert(load_tensors(name, described, conversion.shapes, "the network that it describes"))
    for key in weights:
        # one after another, so that of large ones there are no two copies at a time
        weights[key] = weights[key].float().contiguous()
    conversion.network.load_state_dict(weights, assign=True)
    return conversion.network.eval()


def _check_guide(what: str, guide: ModelMixin, unet: ModelMixin, has_classes: bool) -> None:
    for option in ("sample_size", "in_channels"):
        found, wanted = guide.config[option], unet.config[option]
        require(found == wanted, f"{what}, whose {option} is {found}, but must be {wanted} as of what it guides")
    require(has_classes, f"{what}, which does not know the classes of what it guides, {unet.config.num_class_embeds}")


@contextlib.contextmanager
def _errors_name(name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
