"""The options of drawing images to a folder."""

from dataclasses import dataclass

from ..pretrained import DIGITS
from ..utils.command_line import option, option_list


@dataclass
class GenerateOptions:
    """Options of `generate`. The help texts say what each one is."""

    model: str = option(
        str(DIGITS),
        "Pipeline folder or Hub id (default: the handwritten digits that travel with this program).",
        group="model",
        metavar="MODEL",
    )
    dtype: str = option(
        "float32", "What the network computes in.", group="model", choices=["float32", "bfloat16", "float16"]
    )
    device: str | None = option(
        None, "Such as cpu, cuda, cuda:1, mps (default: the best there is).", group="model", metavar="DEVICE"
    )
    batch_size: int = option(64, "Images drawn at once, at least 1; it does not change them.", group="model")

    class_labels: list[str] = option_list(
        ["random"],
        "Classes by id or name; null is the null class, all is every class, random is num_images classes drawn at"
        " random.",
        group="images",
        metavar="CLASS",
    )
    num_images_per_label: int = option(
        1, "Images of each class, at least 1; those of one class follow one another.", group="images"
    )
    num_images: int = option(
        16, "How many images, each of another class, where class_labels is random.", group="images"
    )
    seed: int = option(
        0, "Seed of the first image, at least 0; the next one's is one more, and so on.", group="images"
    )

    scheduler: str | None = option(
        None,
        "Another scheduler, ours or one of diffusers, such as DDIM, DPMSolverMultistep, UniPCMultistep (default: the"
        " model's own).",
        group="sampling",
        metavar="NAME",
    )
    num_inference_steps: int | None = option(
        None, "Denoising steps (default: 100, where step_size is not given either).", group="sampling"
    )
    step_size: int | None = option(
        None,
        "The original program's way to say the steps: every step_size-th timestep, beginning at the first.",
        group="sampling",
    )
    guidance_scale: float = option(
        5.0,
        "Classifier-free guidance, at least 0; up to 1 draws without. The original's guidance w is w + 1 here.",
        group="sampling",
    )
    guidance_interval: list[float] = option_list(
        [0.0, 1.0],
        "Begin and end of guidance as fractions of the steps, 0 <= begin <= end <= 1.",
        group="sampling",
        nargs=2,
    )
    eta: float = option(
        0.0,
        "0 is DDIM, 1 is DDPM; at least 0. The original's DDIM_scale S is sqrt(S) here.",
        group="sampling",
    )
    clip_sample: bool | None = option(
        None, "Clip the predicted image at each step (default: as the model says).", group="sampling"
    )

    output_dir: str = option(
        "outputs/samples",
        "Folder for the images, the grid, the animation and the manifest.",
        group="output",
        metavar="FOLDER",
    )
    animation: bool = option(True, "Write denoising.gif.", group="output")
    fps: float = option(
        10.0, "Frames of the animation per second, one frame per step; above 0, at most 100.", group="output"
    )
    columns: int | None = option(
        None, "Images in a row of the grid (default: as the classes suggest).", group="output"
    )

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of range."""
        self.class_labels = [str(label) for label in self.class_labels]
        if not self.class_labels:
            raise ValueError("class_labels is empty: name classes, or all, or random")
        special = {"all", "random"} & set(self.class_labels)
        if special and len(self.class_labels) > 1:
            raise ValueError(f"class_labels names {special.pop()!r} among others, but it must stand alone")
        for name in (
            "num_images_per_label",
            "num_images",
            "batch_size",
            "columns",
            "step_size",
            "num_inference_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must be at least 0")
        if self.num_inference_steps is not None and self.step_size is not None:
            raise ValueError("num_inference_steps and step_size both say the number of steps: give one of them")
        if not 0 < self.fps <= 100:
            raise ValueError(f"fps is {self.fps}, but must be above 0 and at most 100")
