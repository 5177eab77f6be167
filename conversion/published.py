"""Reads the networks that ADM, EDM and EDM2 have published, with the networks that guide them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from ..utils.atomic_write import write_json
from . import adm, edm
from .families import Source
from .network_pickles import PickledObject, read_network, read_pickle
from .original import read_json
from .pickle_reader import CheckpointError, StateDict, load_tensors, read_checkpoint, read_state_dict, require


# Says of a folder that it was converted, and from what.
MANIFEST_NAME = "conversion.json"

File = str | Path | None
Filled = tuple[ModelMixin, Any, int]  # a network, its scheduler if it is a denoiser, and of how many tensors


def family_of(name: str, found: Any) -> str:
    """Of which program the content of a checkpoint is."""
    if type(found) is StateDict and any(isinstance(value, PickledObject) for value in found.values()):
        return "edm2" if read_network(name, found).class_name == "Precond" else "edm"
    return "adm" if "input_blocks.0.0.weight" in read_state_dict(name, found) else "original"


def read_published(
    name: str, found: Any, params: File, guidance_checkpoint: File, classifier_checkpoint: File
) -> Source:
    """The networks of a checkpoint of that name, which holds what was ``found``, and of the files that guide it."""
    family, flags = family_of(name, found), None if params is None else read_json(Path(params))
    require(flags is None or family == "adm", f"params is {params}, but {name} says all of its network: leave it out")
    unet, scheduler, num_weights = _read_denoiser(name, found, flags)
    components, guides = {"unet": unet}, {}
    if guidance_checkpoint is not None:
        what, file = f"guidance_checkpoint is {guidance_checkpoint}", Path(guidance_checkpoint)
        guide, other, more = _read_denoiser(file.name, read_checkpoint(file, read_pickle), flags)
        same = type(other) is type(scheduler) and dict(other.config) == dict(scheduler.config)
        require(same, f"{what}, whose noise levels are not those of {name}")
        _check_guide(what, guide, unet, guide.config.num_class_embeds in (None, unet.config.num_class_embeds))
        components["guidance_unet"], guides["guidance"] = guide, file.name
        num_weights += more
    if classifier_checkpoint is not None:
        what, file = f"classifier_checkpoint is {classifier_checkpoint}", Path(classifier_checkpoint)
        require(family == "adm", f"{what}, but it guides networks of ADM alone: leave it out")
        described, part = read_state_dict(file.name, read_checkpoint(file)), _part(flags, "classifier")
        guide, _, more = _fill(file.name, described, adm.convert_classifier, part)
        _check_guide(what, guide, unet, guide.config.num_classes >= (unet.config.num_class_embeds or 0))
        components["classifier"], guides["classifier"] = guide, file.name
        num_weights += more
    networks = components.items()
    report = {role: f"{each.num_parameters():,} parameters, {type(each).__name__}" for role, each in networks}
    report["scheduler"] = type(scheduler).__name__
    manifest = {"family": family, "checkpoint": name, **guides, "params": flags}
    components["scheduler"] = scheduler
    return Source(components, num_weights, report, guides, lambda folder: write_json(folder / MANIFEST_NAME, manifest))


def _read_denoiser(name: str, found: Any, flags: Mapping[str, Any] | None) -> Filled:
    family = family_of(name, found)
    require(family != "original", f"{name} is a checkpoint of the original, but must be one of ADM, EDM or EDM2")
    if family == "adm":
        return _fill(name, read_state_dict(name, found), adm.convert_unet, _part(flags, "model"))
    network = read_network(name, found)
    convert = {"EDMPrecond": edm.convert_edm, "Precond": edm.convert_edm2}.get(network.class_name)
    problem = f"{name}: the network is a {network.class_name}, but must be an EDMPrecond or EDM2's Precond"
    require(convert, problem)
    return _fill(name, network.tensors, convert, network.options)


def _part(flags: Mapping[str, Any] | None, part: str) -> Mapping[str, Any] | None:
    """The flags of one network, from the flags of each or of both in one."""
    chosen = flags.get(part) if flags is not None and flags.keys() <= {"model", "classifier"} else flags
    fits = chosen is None or isinstance(chosen, dict)
    require(fits, f"the flags of the {part} are {chosen!r:.80}, but must be an object")
    return chosen


def _fill(name: str, described: Mapping[str, Any], convert: Any, options: Any) -> Filled:
    """A network of these options or flags with the weights that a file describes."""
    try:
        # what is no tensor has no shape, and load_tensors refuses it
        conversion = convert(options, {key: getattr(value, "shape", ()) for key, value in described.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    weights = conversion.convert(load_tensors(name, described, conversion.shapes, "the network that it describes"))
    for key in weights:
        # one after another, so that of large ones there are no two copies at a time
        weights[key] = weights[key].float().contiguous()
    conversion.network.load_state_dict(weights, assign=True)
    return conversion.network, conversion.scheduler, len(described)


def _check_guide(what: str, guide: ModelMixin, unet: ModelMixin, has_classes: bool) -> None:
    for option in ("sample_size", "in_channels"):
        found, wanted = guide.config[option], unet.config[option]
        require(found == wanted, f"{what}, whose {option} is {found}, but must be {wanted} as of what it guides")
    require(has_classes, f"{what}, which does not know the classes of what it guides, {unet.config.num_class_embeds}")
