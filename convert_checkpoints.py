"""Converts checkpoints of the original program, ADM, EDM and EDM2 to pipeline folders, and the original's back."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from imagenet64_diffusion.utils.command_line import CheckedOptions, option, run_command
from imagenet64_diffusion.utils.lazy_exports import lazy_exports


if TYPE_CHECKING:
    from imagenet64_diffusion.conversion.converting import convert_checkpoint as convert_checkpoint

# torch and diffusers take seconds to import, which --help should not
__getattr__, _ = lazy_exports("imagenet64_diffusion", {"convert_checkpoint": "conversion.converting"})

EXAMPLE = "--checkpoint model_469e_600000s.pkl\n--output_dir outputs/res_res_atn"

# Options of one checkpoint alone.
_OF_ONE = ("family", "params", "optimizer", "guidance_checkpoint", "classifier_checkpoint", "push_to_hub")

_file = functools.partial(option, group="files", metavar="FILE")
_pipeline = functools.partial(option, group="pipeline")
_back = functools.partial(option, group="back to the original")


@dataclass
class ConvertOptions(CheckedOptions):
    """Options of `convert`. The help texts say what each one is."""

    checkpoint: str = _file(
        help="model_...e_...s.pkl of the original, or a folder of them; 64x64_diffusion.pt of ADM; a pickle of EDM or"
        " EDM2; a pipeline folder for to_original."
    )
    output_dir: str = _file(help="Folder to write, one for several: new, empty or its own.", metavar="FOLDER")
    family: str = _file(
        "auto",
        "Whose checkpoint it is, if only such a one will do (auto: as the file says).",
        metavar="NAME",
        choices=["auto", "original", "adm", "edm", "edm2"],
    )
    params: str | None = _file(
        None,
        "model_params_...e_...s.json of the original (default: the one beside it, by its name), or flags of ADM's"
        " program, which released files do not need.",
    )
    guidance_checkpoint: str | None = _file(
        None, "A weaker or unconditional network of ADM, EDM or EDM2, for guidance."
    )
    classifier_checkpoint: str | None = _file(None, "64x64_classifier.pt of ADM, for guidance by a classifier.")
    optimizer: str | None = _file(None, "optim_...e_...s.pkl, to resume the training; a folder's are found by name.")

    time_embedding: str = _pipeline(
        "original_sine",
        "original_sine samples as the original does; original_alternating is what the released checkpoints were"
        " trained with; original_interleaved is for checkpoints of its corrected code.",
        metavar="NAME",
        choices=["original_sine", "original_alternating", "original_interleaved"],
    )
    id2label: str = _pipeline(
        "auto",
        "Class names: imagenet64, in the order of the original, or imagenet, of most models (both for 1000 classes,"
        " else numbers), numbers, or a file, JSON or text, a name a line (auto: in the checkpoint's order).",
        metavar="NAMES",
    )
    finish_denoising: bool = _pipeline(False, "End at the predicted image; the original leaves noise of 0.03 in it.")
    dtype: str = _pipeline("float32", "What the weights are stored in.", choices=["float32", "float16", "bfloat16"])
    variant: str | None = _pipeline(None, "Name of the file of weights, such as fp16, for loading.", metavar="NAME")

    to_original: bool = _back(False, "Write a pipeline folder as the two files that the original program loads.")
    epoch: int | None = _back(None, "Epochs trained, of a network that does not come from the original.")
    step: int | None = _back(None, "Steps trained, likewise.")

    push_to_hub: str | None = option(None, "Hub id to upload the pipeline to.", group="Hub", metavar="ID")

    def __post_init__(self) -> None:
        super().__post_init__()
        what, others = "a checkpoint, whose JSON says its own", ["epoch", "step"]
        if self.to_original:
            what = "to_original"
            others = [*_OF_ONE, "finish_denoising", "time_embedding", "dtype"]
        elif Path(self.checkpoint).is_dir():
            what, others = "a folder as checkpoint", [*others, *_OF_ONE]
        for name in others:
            value = getattr(self, name)
            if value != getattr(ConvertOptions, name):
                raise ValueError(f"{name} is {value}, but does not go with {what}: leave it out")


def convert(options: ConvertOptions) -> None:
    """Converts a checkpoint, a folder of checkpoints, or a pipeline folder back; errors as `convert_checkpoint`."""
    from imagenet64_diffusion.conversion import converting
    from imagenet64_diffusion.conversion.original import write_original

    checkpoint, output_dir = Path(options.checkpoint), Path(options.output_dir)
    names = ("time_embedding", "id2label", "dtype", "variant", "finish_denoising")
    choices = {name: getattr(options, name) for name in names}
    if options.to_original:
        files = write_original(checkpoint, output_dir, options.epoch, options.step, options.variant)
        print(f"wrote {files[0]} and {files[1]}")
    elif checkpoint.is_dir():
        converting.convert_folder(checkpoint, output_dir, **choices)
    else:
        choices |= {name: getattr(options, name) for name in _OF_ONE}
        converting.convert_checkpoint(checkpoint, output_dir=output_dir, **choices)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-convert; returns the exit code."""
    return run_command(ConvertOptions, convert, __doc__, argv, example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
