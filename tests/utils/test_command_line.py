"""What the command lines have in common."""

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import pytest
import yaml

from imagenet64_diffusion.utils.command_line import (
    CheckedOptions,
    OtherRankError,
    StoppedBySignalError,
    SubCommand,
    option,
    parse_options,
    run_command,
    run_sub_commands,
)
from imagenet64_diffusion.version import __version__


@dataclass
class Options(CheckedOptions):
    """Options of a command that does nothing."""

    place: str = option(help="Where.", group="place", metavar="FOLDER")
    size: int = option(3, "How large.", group="place", at_least=1)
    kind: str = option("plain", "Which.", group="looks", choices=["plain", "fancy"])
    names: list[str] = option(["a"], "Some names; default: a.", group="looks")
    fast: bool = option(False, "Whether to hurry.", group="looks")
    span: list[int] = option([0, 9], "From and to.", group="looks", nargs=2)


@dataclass
class EveryType(CheckedOptions):
    """An option of each type there is."""

    number: float = option(0.5, "A number.", at_least=0, below=1)
    whole: int = option(1, "A whole one.")
    maybe: int | None = option(None, "A whole one, or none.", above=0)
    text: str = option("x", "Text.")
    name: str | None = option(None, "Text, or none.")
    switch: bool = option(True, "On.")
    perhaps: bool | None = option(None, "Neither on nor off.")
    side: str | None = option(None, "A side.", choices=["left", "right"])
    words: list[str] = option(["a", "b"], "Words.")
    pair: list[float] = option([0.0, 1.0], "Two.", nargs=2, at_least=0, at_most=10)
    steps: list[int] | None = option(None, "Numbers, or none.")


def parse(*arguments) -> Options:
    return parse_options(Options, "Does nothing.", [str(argument) for argument in arguments])


def run(*arguments, command=print, **options) -> int:
    return run_command(Options, command, "Does nothing.", [str(argument) for argument in arguments], **options)


def refuse(options):
    raise ValueError(f"nobody wants {options.place}")


TASKS = {
    "paint": SubCommand(Options, lambda options: print(f"painting {options}"), "Paints a fence.", "--place x"),
    "sell": SubCommand(Options, refuse, "Sells it. Slowly.", "--place x\n--size 4"),
}


def run_tasks(*arguments) -> int:
    return run_sub_commands(TASKS, "Deals with fences.", [str(argument) for argument in arguments])


@pytest.fixture
def from_yaml(tmp_path):
    """Parses a file of options."""

    def take(text: str) -> EveryType:
        (tmp_path / "options.yaml").write_text(text)
        return parse_options(EveryType, "", ["--config", str(tmp_path / "options.yaml")])

    return take


@pytest.mark.parametrize(
    "text", ['{"place": "there", "size": 7, "names": ["n"]}', "place: there\nsize: 7\nnames: [n]\n"]
)
def test_a_file_gives_defaults_and_the_command_line_wins(tmp_path, capsys, text):
    file = tmp_path / "options"
    file.write_text(text)
    assert parse("--config", file) == Options("there", 7, "plain", ["n"])
    # wherever it stands
    expected = Options("here", 9, "plain", ["n"])
    assert parse("--size", 9, "--config", file, "--place", "here") == expected
    assert run_tasks("paint", "--size", 9, "--config", file, "--place", "here") == 0
    assert capsys.readouterr().out == f"painting {expected}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is neither YAML nor JSON: while parsing"),
        (b"size: \xff", "is neither YAML nor JSON: 'utf-8' codec"),
        (b"[]", "is '[]', but must hold options"),
        (None, ", but there is no such file\n"),
        (b"{siez: 3}", "names 'siez', which is no option; perhaps size\n"),
        (b"config: x", "names 'config', which is no option"),
        (b"kind: Plane", "kind is 'Plane', but must be one of plain, fancy; perhaps plain\n"),
    ],
)
def test_wrong_files(tmp_path, capsys, content, message):
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_bytes(content)
    assert run("--config", file, "--place", "x") == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"error: --config {'is ' if content is None else ''}{file}")
    assert message in captured
    assert captured.count("\n") == 1


def test_values_of_a_file(from_yaml):
    text = (
        "number: 5e-3\ntext: 16\nname: null\nswitch: no\nperhaps: true\nside: right\nwords: [3, b]\npair: [0, 0.5]\n"
    )
    values = {"number": 0.005, "text": "16", "name": None, "switch": False, "perhaps": True, "side": "right"}
    expected = EveryType(**values, words=["3", "b"], pair=[0.0, 0.5], steps=[1, 2])
    # 0 and 0.0, and 16 and "16", have texts of their own
    assert repr(from_yaml(f"{text}steps: [1, 2]\nmaybe: null\n")) == repr(expected)
    assert repr(from_yaml("number: 0\nwords: all\nsteps: null\n")) == repr(EveryType(0.0, words=["all"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("number: many", "number is 'many', but must be a number"),
        ("number: true", "number is true, but must be a number"),
        ("number: [0.1]", "number is [0.1], but must be a number"),
        ("whole: 3.5", "whole is 3.5, but must be a whole number"),
        ("text: no", "text is false, but must be text: put it in quotes"),
        ("switch: 1", "switch is 1, but must be true or false"),
        ("side: up", "side is 'up', but must be one of left, right"),
        ("words: []", "words is [], but must be one or more words"),
        ("pair: [0.5]", "pair is [0.5], but must be 2 numbers"),
        ("pair: [a, 1]", "pair is [a, 1], but must be 2 numbers"),
        (f"whole: {'x' * 200}", f"whole is '{'x' * 79}..., but must be a whole number"),
    ],
)
def test_values_of_a_file_are_checked(from_yaml, tmp_path, text, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        from_yaml(text)
    assert str(caught.value) == f"--config {tmp_path / 'options.yaml'}: {message}"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"number": 1}, r"number is 1, but must be in \[0, 1\)"),
        ({"number": float("nan")}, r"number is nan, but must be in \[0, 1\)"),
        ({"maybe": 0}, "maybe is 0, but must be above 0"),
        ({"side": "lefd"}, "side is 'lefd', but must be one of left, right; perhaps left"),
        ({"pair": [0, 11]}, r"pair is 11, but must be in \[0, 10\]"),
    ],
)
def test_ranges_and_choices_hold_in_python_too(from_yaml, values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        EveryType(**values)
    with pytest.raises(ValueError, match=message.partition(",")[0].replace("nan", "'.nan'|nan")):
        from_yaml(yaml.safe_dump(values))


def test_presets(tmp_path, monkeypatch, capsys):
    presets = tmp_path / "presets"
    presets.mkdir()
    (presets / "large.yaml").write_text("place: x\nsize: 100\n")
    monkeypatch.chdir(tmp_path)
    assert parse_options(Options, "", ["--config", "large"], presets=presets) == Options("x", 100)
    assert run("--config", "lagre", presets=presets) == 2
    message = "error: --config is lagre, but there is no such file, and it is none of large; perhaps large\n"
    assert capsys.readouterr().err == message
    # a file of that name comes first
    (tmp_path / "large").write_text('{"place": "y"}')
    assert parse_options(Options, "", ["--config", "large"], presets=presets) == Options("y")


def test_exit_codes(capsys, monkeypatch):
    def fail_with(error):
        def command(options):
            raise error

        return run("--place", "x", command=command), capsys.readouterr().err

    assert run("--place", "x") == 0
    assert fail_with(ValueError("no good")) == (2, "error: no good\n")
    code, said = fail_with(OSError(28, "No space left on device", "model"))
    assert (code, "No space left on device: 'model'" in said) == (2, True)
    assert fail_with(OtherRankError("said elsewhere")) == (2, "")
    assert fail_with(StoppedBySignalError(15, "")) == (143, "")
    assert fail_with(KeyboardInterrupt()) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fail_with(ZeroDivisionError())
    monkeypatch.setenv("IMAGENET64_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no good"):
        fail_with(ValueError("no good"))


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (run, "", "the following arguments are required: --place"),
        (run, "--place", "--place: expected one argument"),
        (run, "--place=", "place is empty: Where."),
        (run, "--place x --config", "--config: expected one argument"),
        (run, "--place x --colour red", "unrecognized arguments: --colour red"),
        (run, "--plaec x", "unrecognized arguments: --plaec x; perhaps --place"),
        (run, "--place x --siez=4", "unrecognized arguments: --siez=4; perhaps --size"),
        # no abbreviations: a later option could make them mean two
        (run, "--place x --siz 4", "unrecognized arguments: --siz 4; perhaps --size"),
        (run, "--place x y", "unrecognized arguments: y"),
        (run, "--place x --kind plan", "kind is 'plan', but must be one of plain, fancy; perhaps plain"),
        (run, "--place x --size 3.5", "size is '3.5', but must be a whole number"),
        (run, "--place x --size 0", "size is 0, but must be at least 1"),
        (run, "--place x --fast maybe", "fast is 'maybe', but must be true or false"),
        (run, "--place x --span 1", "--span: expected 2 arguments"),
        (run, "--place x --span 1 x", "span is 'x', but must be 2 whole numbers"),
        (run, "--place x --print_shtab csh", "Unsupported completion_type: shtab-csh."),
        (run_tasks, "sell --place there", "nobody wants there"),
        (run_tasks, "sell --place there --size x", "size is 'x', but must be a whole number"),
        (run_tasks, "sell --place there --siez 1", "unrecognized arguments: --siez 1; perhaps --size"),
        (run_tasks, "sell", "the following arguments are required: --place"),
        (run_tasks, "sel --place x", "there is no 'sel': take one of paint, sell; perhaps sell"),
        (run_tasks, "", "name a subcommand: one of paint, sell"),
    ],
)
def test_wrong_arguments(call, arguments, message, capsys):
    assert call(*arguments.split()) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_spellings():
    """With = or without; switches on their own or with a value; text that looks like something else."""
    every = parse_options(EveryType, "", ["--no_switch", "--perhaps", "false", "--words=c", "--text", "null"])
    assert every == EveryType(switch=False, perhaps=False, words=["c"], text="null")
    assert parse_options(EveryType, "", ["--switch", "--words", "1e3", "007"]) == EveryType(words=["1e3", "007"])
    # each call has lists of its own
    assert EveryType().words is not EveryType().words


HELP = """\
usage: nothing --place FOLDER [options]

Does nothing.

place:
  --place FOLDER           Where.
  --size N                 How large. (default: 3)

looks:
  --kind {plain,fancy}     Which. (default: plain)
  --names TEXT [TEXT ...]  Some names; default: a.
  --fast                   Whether to hurry.
  --span N N               From and to. (default: 0 9)

general:
  -h, --help               Show this text and end.
"""


@pytest.fixture
def printed(capsys, monkeypatch):
    """What a call prints that ends the process with 0, in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["/usr/bin/nothing"])

    def show(call, *arguments, **options) -> str:
        with pytest.raises(SystemExit) as stop:
            call(*arguments, **options)
        assert stop.value.code == 0
        return capsys.readouterr().out

    return show


def test_help(printed):
    assert printed(run, "--help").startswith(HELP)
    shown = printed(run_tasks, "--help")
    assert shown.startswith("usage: nothing {paint,sell} [options]\n\nDeals with fences.\n")
    for line in ("paint +Paints a fence.", "sell +Sells it."):
        assert re.search(f"^ +{line}$", shown, re.MULTILINE)
    shown = printed(run_tasks, "sell", "--help")
    assert shown.startswith("usage: nothing sell --place FOLDER [options]\n\nSells it. Slowly.\n\nplace:\n")
    assert "\nExample:\n\n    nothing sell --place x \\\n        --size 4\n\nExit codes: 0 done; " in shown


def test_files_of_options_and_completions_are_printed(printed, tmp_path):
    (tmp_path / "all.yaml").write_text(printed(run, "--size", 7, "--place", "x", "--print_config"))
    assert parse("--config", tmp_path / "all.yaml") == Options("x", 7)
    for call in (run, run_tasks):
        shown = printed(call, "--print_shtab", "bash")
        assert "-F _shtab_nothing nothing\n" in shown
        assert "--names" in shown


def test_version(capsys):
    expected = f"imagenet64-diffusion {__version__} (torch {metadata.version('torch')}, diffusers "
    assert run("--place", "x", "--version") == run_tasks("--version") == run_tasks("sell", "--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(expected) for line in lines] == [True] * 3


PROGRAM = """
import os, signal, sys
from dataclasses import dataclass
from imagenet64_diffusion import evaluate_models, generate_images, train_imagenet64
from imagenet64_diffusion.utils.command_line import option, run_command

@dataclass
class Options:
    what: str = option("nothing", "What to do.")

def command(options):
    if options.what == "fail":
        raise ZeroDivisionError("a fault of ours")
    # a shell's background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)

for main, arguments in (
    (generate_images.main, ["--help"]),
    (train_imagenet64.main, ["--sed", "1"]),
    (evaluate_models.main, ["model", "--help"]),
    (evaluate_models.main, ["--version"]),
):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
print([name for name in ("torch", "diffusers", "transformers", "numpy") if name in sys.modules])
sys.exit(run_command(Options, command, ""))
"""


@pytest.mark.parametrize(
    ("what", "code", "end"), [("fail", 1, "ZeroDivisionError: a fault of ours\n"), ("stop", 130, "\ninterrupted\n")]
)
def test_a_process(what, code, end):
    """Help, versions and wrong options wait for no library; how a process ends."""
    command = [sys.executable, "-c", PROGRAM, "--what", what]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (finished.returncode, finished.stdout.splitlines()[-1]) == (code, "[]")
    assert finished.stderr.endswith(end)
    assert ("Traceback" in finished.stderr) == (what == "fail")
