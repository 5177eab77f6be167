"""Following a page's command lines: what can be run in seconds is run, small; all else goes through its own parser.

A line that is neither is an error, so that no line of a page goes unlooked at.
"""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import imagenet64_diffusion.utils.command_line
from imagenet64_diffusion.tests.commands.processes import CommandProcess
from imagenet64_diffusion.tests.documents.pages import ROOT
from imagenet64_diffusion.tests.documents.stand_ins import provide


VERBS = {
    "prepare_imagenet64",
    "train_imagenet64",
    "generate_images",
    "evaluate_models",
    "convert_checkpoints",
    "app",
}
CPU = ["--device", "cpu"]
# Added to a line to make it small, or to do without what must be fetched. The last of two options wins.
SMALLER: dict[str, list[str]] = {
    "generate_images": [*CPU, "--num_inference_steps", "2", "--num_images_per_label", "1"],
    "evaluate_models reference": CPU,
    "evaluate_models model": [*CPU, "--num_images", "12", "--num_inference_steps", "2"],
    "evaluate_models sweep": [
        *(*CPU, "--num_images", "4", "--num_inference_steps", "2", "--eta", "0", "--guidance_scale", "1"),
    ],
    "evaluate_models classifier": ["--epochs", "1", "--batch_size", "4"],
    "train_imagenet64": [
        *("--max_train_steps", "1", "--train_batch_size", "2", "--lr_warmup_steps", "0", "--report_to", "none"),
        *("--num_inference_steps", "1", "--num_sample_classes", "1", "--num_samples_per_class", "1"),
        *("--stem_channels", "8", "--block_out_channels", "8", "--time_embed_dim", "16", "--class_embed_dim", "16"),
    ],
    # a checkpoint brings its own network, of ten classes in 64x64, and has taken 600,000 steps
    "train_imagenet64 --resume_from_checkpoint": [
        *("--train_data_dir", "outputs/ten_classes"),
        *("--max_train_steps", "600001", "--train_batch_size", "2", "--report_to", "none"),
        *("--num_inference_steps", "1", "--num_sample_classes", "1", "--num_samples_per_class", "1"),
    ],
}
# what stands for "..." on a page
ELIDED = {"--train_data_dir": "outputs/imagenet64", "--output_dir": "outputs/elided"}
# lines of other programs, word by word
KNOWN = {"source .venv/bin/activate"}


class CommandError(AssertionError):
    """A line of a page that does not do what the page says."""


class _ParsedError(Exception):
    """The command line of a script has been parsed; it is not run."""


def follow(words: list[str], folder: Path, made_by_page: set[str]) -> None:
    """Runs or parses a command line in the current folder.

    Args:
        words: The line.
        folder: Where logs may be written.
        made_by_page: Files that the page tells the reader to write.

    Raises:
        CommandError: If it fails, or is of no known kind.
    """
    match words:
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            if not Path(launched.training_script).is_file():
                raise CommandError(f"there is no script {launched.training_script}")
            _follow_script(launched.training_script, launched.training_script_args, folder)
        case ["python", "-m", "pytest", *files]:
            missing = [file for file in files if file not in made_by_page and not Path(file).is_file()]
            if missing:
                raise CommandError(f"there is no {missing[0]}")
        case ["python", "-m", module]:
            text = (
                (ROOT / module.removeprefix("imagenet64_diffusion.").replace(".", "/"))
                .with_suffix(".py")
                .read_text(encoding="utf-8")
            )
            if '__name__ == "__main__"' not in text:
                raise CommandError(f"{module} does nothing when it is run")
        case ["python", script, *rest]:
            _follow_script(script, rest, folder)
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text(encoding="utf-8")
            # make itself is content with a phony target that has no rule
            missing = [target for target in targets if not re.search(rf"^{target}:", rules, flags=re.MULTILINE)]
            if missing or not targets:
                raise CommandError(f"there is no target {' '.join(missing)}")
            dry = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
            if dry.returncode != 0:
                raise CommandError(dry.stderr)
        case _ if " ".join(words) not in KNOWN:
            raise CommandError("no test knows what to do with it: say so in tests/documents/commands.py")


def _follow_script(script: str, words: list[str], folder: Path) -> None:
    name = script.removesuffix(".py")
    if name not in VERBS:
        _parse_script(Path(script), words)
        return
    module = importlib.import_module(f"imagenet64_diffusion.{name}")
    words, is_whole = _complete(words)
    if is_whole:
        words = [*words, *_smaller(name, words)]
    for before, word in zip(["", *words], words, strict=False):
        # what is written is nobody's stand-in
        if before not in ("--output_dir", "--output"):
            provide(word)
    if name == "app" or not is_whole:
        _call(module.main, words, is_run=False)
    elif name == "train_imagenet64":
        process = CommandProcess(words, folder / "training.txt", directory=Path.cwd())
        if process.end() != 0:
            raise CommandError(process.output())
        process.log.unlink()
    else:
        _call(module.main, words, is_run=True)


def _smaller(name: str, words: list[str]) -> list[str]:
    if name == "evaluate_models":
        added = SMALLER.get(f"{name} {words[0]}", [])
        # networks that must be fetched; the classifier of the digits lies in the package
        fetches = words[0] in ("reference", "model", "sweep") and "classifier" not in words
        return [*added, "--protocol", "pixels"] if fetches else added
    if name == "prepare_imagenet64":
        return ["--max_images", "60"] if "mnist" in words else []
    if "--resume_from_checkpoint" in words:
        return SMALLER[f"{name} --resume_from_checkpoint"]
    return SMALLER.get(name, [])


def _complete(words: list[str]) -> tuple[list[str], bool]:
    """The words without ``...``, and whether there was none."""
    found: list[str] = []
    for word in words:
        if word != "...":
            found.append(word)
        elif found and found[-1] in ELIDED:
            found.append(ELIDED[found[-1]])
    is_whole = "..." not in words
    if not is_whole:
        for option in ELIDED:
            if option not in found:
                found += [option, ELIDED[option]]
    return found, is_whole


def _call(main: Callable[[list[str]], int], words: list[str], is_run: bool) -> None:
    """Calls a command in this process; without its verb, if it is only to be parsed."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_run:
            patch.setattr(imagenet64_diffusion.utils.command_line, "call_command", lambda command, options: None)
        try:
            code = main(words)
        except SystemExit as stop:
            code = stop.code
    if code != 0:
        raise CommandError(f"exit code {code}")


def _parse_script(script: Path, words: list[str]) -> None:
    """Hands a command line to the parser of a script that is no part of the package."""
    if not script.is_file():
        raise CommandError(f"there is no script {script}")
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments, **options) -> None:
        parse(parser, *arguments, **options)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.resolve().parent))
        patch.setattr(sys, "argv", [str(script), *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        specification = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        try:
            module.main()
        except _ParsedError:
            return
        except SystemExit as stop:
            raise CommandError(f"exit code {stop.code}") from stop
    raise CommandError(f"{script} parsed no command line")
