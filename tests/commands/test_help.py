"""What the command lines say of themselves, and that their examples are right."""

import dataclasses
import re
import shlex
from collections.abc import Callable

import pytest

from imagenet64_diffusion import (
    convert_checkpoints,
    evaluate_models,
    generate_images,
    prepare_imagenet64,
    train_imagenet64,
)
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.convert_checkpoints import ConvertOptions
from imagenet64_diffusion.pipelines.generation_options import GenerateOptions
from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.command_line import parse_options


TRAIN_HEADINGS = (
    "data, run, network, objective, objective ddpm, objective edm, optimisation, precision and speed,"
    " checkpoints and logging, samples, Hub"
)
EVALUATE_HEADINGS = {
    "reference": "images, output, features, speed",
    "model": "images, output, sampling, features, speed",
    "score": "evaluations, output, metrics",
    "sweep": "images, output, samplers, speed, features",
    "classifier": "folders, training",
}
# what is typed -> main, options, and the headings of the help in their order
COMMANDS: dict[str, tuple[Callable[[list[str]], int], type, str]] = {
    "prepare_imagenet64.py": (
        prepare_imagenet64.main,
        PrepareOptions,
        "output, source, images of imagefolder and dataset",
    ),
    "train_imagenet64.py": (train_imagenet64.main, TrainOptions, TRAIN_HEADINGS),
    "generate_images.py": (generate_images.main, GenerateOptions, "sampling, model, images, output"),
    "convert_checkpoints.py": (convert_checkpoints.main, ConvertOptions, "files, pipeline, back to the original, Hub"),
    **{
        f"evaluate_models.py {name}": (evaluate_models.main, evaluate_models.COMMANDS[name].options_class, headings)
        for name, headings in EVALUATE_HEADINGS.items()
    },
}


@pytest.fixture
def show_help(monkeypatch, capsys) -> Callable[[str], str]:
    """The help of a command, in a terminal of 80 columns."""

    def show(command: str) -> str:
        program, *words = command.split()
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr("sys.argv", [program])
        with pytest.raises(SystemExit) as stop:
            COMMANDS[command][0]([*words, "--help"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    return show


def example_of(text: str) -> list[str]:
    """The words of the example at the end of a help text."""
    example = text.partition("\nExample:\n\n")[2].partition("\n\n")[0]
    return shlex.split(example.replace("\\\n", " "))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_under_a_heading_once_and_the_example_parses(show_help, command, tmp_path, monkeypatch):
    _, options_class, headings = COMMANDS[command]
    text = show_help(command)
    assert text.startswith(f"usage: {command} ")
    assert re.findall(r"^([a-zA-Z ]+):$", text, re.MULTILINE) == [*headings.split(", "), "general", "Example"]
    listed = re.findall(r"^  (?:-h, )?--(\w+)", text, re.MULTILINE)
    names = [field.name for field in dataclasses.fields(options_class)]
    assert sorted(listed) == sorted([*names, "help", "version", "config", "print_config", "print_shtab"])
    # one spelling each
    assert re.findall(r"--\w+-\w+", text) == []
    assert max(map(len, text.splitlines())) <= 80
    assert "(default: )" not in text
    assert str(DIGITS) not in text

    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "digits").mkdir(parents=True)
    words, start = example_of(text), ["python", *command.split()]
    assert words[: len(start)] == start
    presets = CONFIG_DIR / "training" if command == "train_imagenet64.py" else None
    parse_options(options_class, "", words[len(start) :], presets=presets)
