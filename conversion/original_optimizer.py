"""How the state of the original's AdamW maps to one over the parameters of our network."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from .original_weights import original_weight_name, reshape_weight


def map_original_optimizer(
    optimizer_state: Mapping[str, Any],
    state_dict_names_and_shapes: Mapping[str, tuple[int, ...]] | Iterable[tuple[str, tuple[int, ...]]],
    params: Mapping[str, Any],
    unet: ClassConditionalUNet2DModel,
) -> dict[str, Any]:
    """A state dict for ``torch.optim.AdamW(unet.parameters())``.

    The moments are put in the order of our parameters and get the shapes of our weights: the class table is turned and
    gains a row of zeros for the null class, which never has a gradient. Those of weights without effect are left out.

    Args:
        optimizer_state: The original's ``AdamW.state_dict()``.
        state_dict_names_and_shapes: Names and shapes of the original's weights in the order of its state dict, which
            is that of its optimizer's parameters.
        params: The content of the ``model_params_*.json`` file.
        unet: The network that the checkpoint was converted to.

    Returns:
        ``state`` and ``param_groups``, whose hyper-parameters are the original's.

    Raises:
        ValueError: If the moments do not have the shapes of the weights.
    """
    shapes = dict(state_dict_names_and_shapes)
    index_of = {name: index for index, (name, _) in enumerate(unet.named_parameters())}
    shape_of = {name: parameter.shape for name, parameter in unet.named_parameters()}

    state = {}
    for original_index, (name, shape) in enumerate(shapes.items()):
        entry = optimizer_state["state"].get(original_index)
        our_name = original_weight_name(name, params)
        if entry is None or our_name is None:
            continue
        moments = {}
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = entry[kind]
            mapped = reshape_weight(our_name, moment)
            if tuple(moment.shape) != tuple(shape) or mapped.shape != shape_of[our_name]:
                raise ValueError(
                    f"{kind} of {name} has shape {tuple(moment.shape)}, but must have {tuple(shape)}: the optimizer is"
                    " another network's"
                )
            moments[kind] = mapped
        # a tensor of its own for each parameter, as AdamW keeps it
        step = torch.as_tensor(entry["step"], dtype=torch.float32).clone()
        state[index_of[our_name]] = {"step": step, **moments}

    hyperparameters = {key: value for key, value in optimizer_state["param_groups"][0].items() if key != "params"}
    return {
        "state": dict(sorted(state.items())),
        "param_groups": [{**hyperparameters, "params": list(range(len(index_of)))}],
    }
