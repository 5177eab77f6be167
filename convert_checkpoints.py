"""Converts checkpoints of the original program to pipeline folders, and back."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagenet64_diffusion.utils.command_line import CheckedOptions, option, run_command


if TYPE_CHECKING:
    from imagenet64_diffusion.pipelines.pipeline_class_conditional import ClassConditionalPipeline


EXAMPLE = "--checkpoint model_469e_600000s.pkl\n--output_dir outputs/res_res_atn"


@dataclass
class ConvertOptions(CheckedOptions):
    """Options of `convert`. The help texts say what each one is."""

    checkpoint: str = option(
        help="model_...e_...s.pkl, or a folder: every checkpoint in it and in the folders in it is converted."
        " For to_original a pipeline folder.",
        group="files",
        metavar="FILE",
    )
    output_dir: str = option(
        help="The pipeline folder to write, or the folder for several; it must be new, empty or its own.",
        group="files",
        metavar="FOLDER",
    )
    params: str | None = option(
        None,
        "model_params_...e_...s.json (default: the one beside the checkpoint, by its name).",
        group="files",
        metavar="FILE",
    )
    optimizer: str | None = option(
        None,
        "optim_...e_...s.pkl, to resume the training; a folder's are found by their names.",
        group="files",
        metavar="FILE",
    )

    time_embedding: str = option(
        "original_sine",
        "original_sine samples as the original does; original_alternating is what the released checkpoints were"
        " trained with; original_interleaved is for checkpoints of its corrected code.",
        group="pipeline",
        metavar="NAME",
        choices=["original_sine", "original_alternating", "original_interleaved"],
    )
    id2label: str = option(
        "imagenet64",
        "Class names: imagenet64 (of networks with 1000 classes; others are numbered), numbers, or a file, a JSON list"
        " or object or text with one name a line.",
        group="pipeline",
        metavar="NAMES",
    )
    finish_denoising: bool = option(
        False,
        "End the last step at the predicted image; the original leaves noise of 0.03 in it.",
        group="pipeline",
    )
    dtype: str = option(
        "float32",
        "What the weights are stored in.",
        group="pipeline",
        choices=["float32", "float16", "bfloat16"],
    )
    variant: str | None = option(
        None,
        "Name of the file of weights, such as fp16; it is asked for when loading.",
        group="pipeline",
        metavar="NAME",
    )

    to_original: bool = option(
        False,
        "Write a pipeline folder as the two files that the original program loads.",
        group="back to the original",
    )
    epoch: int | None = option(
        None, "Epochs trained, of a network that does not come from the original.", group="back to the original"
    )
    step: int | None = option(None, "Steps trained, likewise.", group="back to the original")

    push_to_hub: str | None = option(None, "Hub id to upload the pipeline to.", group="Hub", metavar="ID")

    def __post_init__(self) -> None:
        """Raises ValueError for options that do not go together."""
        super().__post_init__()
        if self.to_original:
            self._refuse_beside("to_original", ("params", "optimizer", "push_to_hub"))
            if self.finish_denoising or self.time_embedding != "original_sine" or self.dtype != "float32":
                raise ValueError(
                    "to_original takes a pipeline as it is: leave out finish_denoising, time_embedding, dtype"
                )
        elif self.epoch is not None or self.step is not None:
            raise ValueError("epoch and step are for to_original: the JSON of a checkpoint says its own")
        if Path(self.checkpoint).is_dir() and not self.to_original:
            self._refuse_beside("a folder as checkpoint", ("params", "optimizer", "push_to_hub"))

    def _refuse_beside(self, what: str, names: Sequence[str]) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)}, but does not go with {what}: leave it out")


def convert_checkpoint(
    checkpoint: str | Path,
    params: str | Path,
    output_dir: str | Path,
    optimizer: str | Path | None = None,
    time_embedding: str = "original_sine",
    id2label: str | Path | Mapping[Any, str] | Sequence[str] | None = "imagenet64",
    *,
    dtype: str = "float32",
    variant: str | None = None,
    finish_denoising: bool = False,
    push_to_hub: str | None = None,
) -> "ClassConditionalPipeline":
    """Converts one checkpoint of the original program and prints what there is to know about it.

    The files are read without running anything in them. The folder appears whole or not at all; an earlier conversion
    in its place is replaced, anything else is left alone.

    Args:
        checkpoint: The ``model_*.pkl`` file, in either format of torch.save.
        params: The ``model_params_*.json`` file.
        output_dir: The pipeline folder to write.
        optimizer: The ``optim_*.pkl`` file; the folder then has ``checkpoints/checkpoint-{step}``, from which
            ``train_imagenet64.py --resume_from_checkpoint`` goes on.
        time_embedding: ``"original_sine"`` draws as the original does, one image at a time;
            ``"original_alternating"`` is what the released checkpoints were trained with; checkpoints of its
            corrected code need ``"original_interleaved"``.
        id2label: ``"imagenet64"`` (networks with another number of classes than 1000 get numbers), ``"numbers"`` or
            None, a
            file (JSON list or object, or text with one name a line), or the names themselves.
        dtype: What the weights are stored in, ``"float32"``, ``"float16"`` or ``"bfloat16"``.
        variant: Name of the file of weights, such as ``"fp16"``.
        finish_denoising: Whether the last step ends at the predicted image. The original leaves noise of 0.03.
        push_to_hub: Hub id to upload the pipeline to, after the folder is complete.

    Returns:
        The pipeline, loaded from the folder.

    Raises:
        CheckpointError: A ValueError: a file or an option is not what it should be. Nothing has been written then.
    """
    # torch and diffusers take seconds to import, which --help should not
    from imagenet64_diffusion.conversion.converting import convert_files
    from imagenet64_diffusion.pipelines.model_card import push_folder

    conversion = convert_files(
        checkpoint, params, output_dir, optimizer, time_embedding, id2label, dtype, variant, finish_denoising
    )
    print("\n".join(conversion.report), flush=True)
    if push_to_hub is not None:
        # all of it but the optimizer's state, which is twice the size of the model and of use to one person
        push_folder(conversion.pipeline, output_dir, push_to_hub, leave_out=("checkpoints",))
        print(f"  uploaded   {push_to_hub}")
    return conversion.pipeline


def convert(options: ConvertOptions) -> None:
    """Converts a checkpoint, a folder of checkpoints, or a pipeline folder back.

    Raises:
        CheckpointError: A ValueError: a file or an option is not what it should be.
    """
    from imagenet64_diffusion.conversion.converting import convert_folder, params_beside
    from imagenet64_diffusion.conversion.to_original import write_original

    checkpoint, output_dir = Path(options.checkpoint), Path(options.output_dir)
    if options.to_original:
        files = write_original(checkpoint, output_dir, options.epoch, options.step, options.variant)
        print(f"wrote {files[0]} and {files[1]}")
        return
    choices: dict[str, Any] = {
        "time_embedding": options.time_embedding,
        "id2label": options.id2label,
        "dtype": options.dtype,
        "variant": options.variant,
        "finish_denoising": options.finish_denoising,
    }
    if checkpoint.is_dir():
        convert_folder(checkpoint, output_dir, **choices)
        return
    params = params_beside(checkpoint) if options.params is None else options.params
    convert_checkpoint(checkpoint, params, output_dir, options.optimizer, push_to_hub=options.push_to_hub, **choices)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-convert; returns the exit code."""
    return run_command(ConvertOptions, convert, __doc__, argv, example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
