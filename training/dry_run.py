"""What `train --dry_run` says: all options as they would be, and what the run costs."""

import dataclasses

from accelerate import Accelerator

from .cost import cost_report, estimate_cost
from .options import TrainOptions
from .plan import Plan


def describe_run(plan: Plan, accelerator: Accelerator) -> str:
    """Text for people; nothing is built in memory and nothing is written."""
    options = plan.options
    cost = estimate_cost(
        plan.unet_config,
        precision=accelerator.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        use_ema=options.use_ema,
        device_type="cuda" if accelerator.device.type == "cuda" else "cpu",
    )
    if options.optimizer == "adamw_8bit":
        cost = dataclasses.replace(cost, optimizer_bytes=cost.optimizer_bytes // 4)
    steps_to_come = plan.max_train_steps - plan.first_step
    epochs_to_come = steps_to_come * plan.images_per_step / len(plan.dataset)
    lines = [
        *plan.summary(accelerator.device.type, accelerator.mixed_precision, cost.parameters),
        f"to come: {steps_to_come:,} steps, {epochs_to_come:.1f} epochs",
        "",
        "cost",
        *_indented(cost_report(cost, options.train_batch_size, plan.images_per_step).splitlines()),
        "",
        "network",
        *_table(plan.unet_config),
        "",
        "options",
        *_table({field.name: getattr(options, field.name) for field in dataclasses.fields(TrainOptions)}),
        "",
        "dry run: nothing has been written",
    ]
    return "\n".join(lines)


def _table(values: dict[str, object]) -> list[str]:
    width = max(map(len, values))
    return _indented([f"{name:<{width}}  {_shown(value)}" for name, value in values.items()])


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
