"""Follows the command lines of a page: runs what takes a second, made small; parses all else with its own parser.

A line that is neither is an error, so that no line of a page goes unchecked.
"""

import argparse
import importlib
import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import imagenet64_diffusion.utils.command_line
from imagenet64_diffusion.tests.components import FIXTURES
from imagenet64_diffusion.tests.documents.pages import ROOT
from imagenet64_diffusion.tests.documents.stand_ins import provide


COMMANDS = {
    *("prepare_imagenet64", "train_imagenet64", "generate_images", "evaluate_models", "convert_checkpoints", "app"),
}
# Added to a line with all these words, the first entry that fits, to make it small, or to do without what must be
# fetched. The last of two options wins.
SMALLER = {
    "prepare_imagenet64 --source mnist": "--max_images 60",
    "generate_images": "--device cpu --num_inference_steps 2 --num_images_per_label 1",
    # published statistics
    "evaluate_models reference --num_images": "--device cpu",
    "evaluate_models reference": "--device cpu --protocol pixels",
    "evaluate_models model": "--device cpu --num_images 12 --num_inference_steps 2 --protocol pixels",
    "evaluate_models sweep": "--device cpu --num_images 4 --num_inference_steps 2 --eta 0 --guidance_scale 1"
    " --protocol pixels",
    "evaluate_models classifier": "--epochs 1 --batch_size 4",
    # the tiny network is none of the released shape
    "convert_checkpoints 64x64_diffusion.pt": f"--params {FIXTURES / 'peers' / 'adm' / 'flags.json'}",
}
# parsed only: stand-ins are what they would make
PARSED = ("app", "train_imagenet64")
# what stands for "..." on a page
ELIDED = {"--train_data_dir": "outputs/imagenet64", "--output_dir": "outputs/elided"}


def follow(words: list[str], made_by_page: set[str]) -> None:
    """Runs or parses a command line in the current folder, of a page that has the reader write some files."""
    match words:
        case ["accelerate", "launch", *rest]:
            launched = launch_command_parser().parse_args(rest)
            _follow_script(launched.training_script, launched.training_script_args)
        case ["python", "-m", "pytest", *files]:
            for file in files:
                assert file in made_by_page or Path(file).is_file(), f"there is no {file}"
        case ["python", "-m", module]:
            file = ROOT / f"{module.removeprefix('imagenet64_diffusion.').replace('.', '/')}.py"
            assert '__name__ == "__main__"' in file.read_text(encoding="utf-8"), f"{module} does nothing when run"
        case ["python", script, *rest]:
            _follow_script(script, rest)
        case ["make", *targets]:
            rules = (ROOT / "Makefile").read_text(encoding="utf-8")
            for target in targets:
                # make itself is content with a phony target that has no rule
                assert re.search(rf"^{target}:", rules, re.MULTILINE), f"there is no target {target}"
            dry = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
            assert dry.returncode == 0, dry.stderr
        case ["source", ".venv/bin/activate"]:
            pass
        case _:
            raise AssertionError("no test knows what to do with it: say so in tests/documents/commands.py")


def _follow_script(script: str, words: list[str]) -> None:
    name = script.removesuffix(".py")
    assert Path(script).is_file(), f"there is no script {script}"
    if name not in COMMANDS:
        _parse_script(Path(script), words)
        return
    is_whole = "..." not in words
    if not is_whole:
        known = [word for word in words if word != "..." and word not in ELIDED]
        words = [*known, *(word for option in ELIDED.items() for word in option)]
    else:
        smaller = next((value for key, value in SMALLER.items() if {*key.split()} <= {name, *words}), "").split()
        if "classifier" in words:  # which needs nothing that must be fetched, instead of the pixels
            smaller = [word for word in smaller if word not in ("--protocol", "pixels")]
        words = [*words, *smaller]
    for before, word in itertools.pairwise(["", *words]):
        # what is written is nobody's stand-in
        if before not in ("--output_dir", "--output"):
            provide(word)
    with pytest.MonkeyPatch.context() as patch:
        if name in PARSED or not is_whole:
            patch.setattr(imagenet64_diffusion.utils.command_line, "call_command", lambda command, options: None)
        try:
            code = importlib.import_module(f"imagenet64_diffusion.{name}").main(words)
        except SystemExit as stop:
            code = stop.code
    assert code == 0, f"exit code {code}"


def _parse_script(script: Path, words: list[str]) -> None:
    """Passes a command line to the parser of a script that is not part of the package."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser: argparse.ArgumentParser, *arguments, **options) -> None:
        parse(parser, *arguments, **options)
        sys.exit("parsed")

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(script.resolve().parent))
        patch.setattr(sys, "argv", [str(script), *words])
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == "parsed", f"exit code {stop.value.code}"
