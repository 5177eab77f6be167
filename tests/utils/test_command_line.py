"""What the command lines have in common."""

import subprocess
import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

import pytest

from imagenet64_diffusion.utils.command_line import (
    SubCommand,
    option,
    option_list,
    parse_options,
    run_command,
    run_sub_commands,
)
from imagenet64_diffusion.version import __version__


@dataclass
class Options:
    """Options of a verb that does nothing."""

    place: str = field(metadata={"help": "Where.", "group": "place", "metavar": "FOLDER"})
    size: int = option(3, "How large.", group="place")
    kind: str = option("plain", "Which.", group="looks", choices=["plain", "fancy"])
    names: list[str] = field(
        default_factory=lambda: ["a"], metadata={"help": "Some names; default: a.", "group": "looks"}
    )
    fast: bool = option(False, "Whether to hurry.", group="looks")
    span: list[int] = option_list([0, 9], "From and to.", group="looks", nargs=2)

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}, but must be at least 1")


@dataclass
class EveryType:
    """An option of each type there is."""

    number: float = option(0.5, "A number.")
    whole: int = option(1, "A whole one.")
    maybe: int | None = option(None, "A whole one, or none.")
    text: str = option("x", "Text.")
    name: str | None = option(None, "Text, or none.")
    switch: bool = option(True, "On.")
    perhaps: bool | None = option(None, "Neither on nor off.")
    side: Literal["left", "right"] = option("left", "A side.")
    words: list[str] = option_list(["a", "b"], "Words.")
    pair: list[float] = option_list([0.0, 1.0], "Two.", nargs=2)
    steps: list[int] | None = option(None, "Numbers, or none.")


def parse(*arguments) -> Options:
    return parse_options(Options, "Does nothing.", [str(argument) for argument in arguments])


def test_command_line_alone():
    assert parse("--place", "x") == Options("x")
    assert parse("--place", "x", "--size", 5, "--names", "b", "c", "--fast") == Options(
        "x", 5, "plain", ["b", "c"], True
    )


@pytest.mark.parametrize(
    ("ending", "text"),
    [("json", '{"place": "there", "size": 7, "names": ["n"]}'), ("yaml", "place: there\nsize: 7\nnames: [n]\n")],
)
def test_a_file_gives_defaults_and_the_command_line_wins(tmp_path, ending, text):
    file = tmp_path / f"options.{ending}"
    file.write_text(text)
    assert parse("--config", file) == Options("there", 7, "plain", ["n"])
    assert parse("--config", file, "--size", 9, "--place", "here") == Options("here", 9, "plain", ["n"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a list, but must hold options"),
        ('{"weight": 3}', "names 'weight', which is not an option\n"),
        ('{"siez": 3}', "names 'siez', which is not an option; perhaps size\n"),
        ('{"config": "x"}', "names 'config', which is not an option"),
        ('{"kind": "odd"}', "kind is 'odd', but must be one of plain, fancy\n"),
        ('{"kind": "Plane"}', "kind is 'Plane', but must be one of plain, fancy; perhaps plain\n"),
    ],
)
def test_wrong_files(tmp_path, capsys, text, message):
    file = tmp_path / "options.json"
    file.write_text(text)
    assert run_command(Options, print, "Does nothing.", ["--config", str(file), "--place", "x"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"size: [", "is not YAML: while parsing"),
        (b"", "holds nothing, but must hold options and their values"),
        (b"size: \xff", "is not text: "),
        (None, ", but there is no such file\n"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, capsys, content, message):
    file = tmp_path / "options.yaml"
    if content is not None:
        file.write_bytes(content)
    assert run_command(Options, print, "Does nothing.", ["--config", str(file), "--place", "x"]) == 2
    captured = capsys.readouterr().err
    assert captured.startswith(f"error: --config {'is ' if content is None else ''}{file}")
    assert message in captured
    assert captured.count("\n") == 1


def take(tmp_path, yaml: str) -> EveryType:
    file = tmp_path / "options.yaml"
    file.write_text(yaml)
    return parse_options(EveryType, "Does nothing.", ["--config", str(file)])


@pytest.mark.parametrize(
    ("yaml", "name", "value"),
    [
        ("number: 5.0e-3", "number", 0.005),
        ("number: 2", "number", 2.0),
        ("maybe: null", "maybe", None),
        ("maybe: 7", "maybe", 7),
        ("text: 16", "text", "16"),
        ("name: null", "name", None),
        ("switch: no", "switch", False),
        ("perhaps: true", "perhaps", True),
        ("perhaps: null", "perhaps", None),
        ("side: right", "side", "right"),
        ("words: [3, b]", "words", ["3", "b"]),
        ("words: all", "words", ["all"]),
        ("pair: [0, 0.5]", "pair", [0.0, 0.5]),
        ("steps: [1, 2]", "steps", [1, 2]),
        ("steps: null", "steps", None),
    ],
)
def test_values_of_a_file(tmp_path, yaml, name, value):
    taken = getattr(take(tmp_path, yaml), name)
    assert taken == value
    assert type(taken) is type(value)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("number: 5e-3", "number is '5e-3', but must be a number: write 0.005"),
        ("number: 1e-8", "number is '1e-8', but must be a number: write 1.0e-08"),
        ("number: many", "number is 'many', but must be a number"),
        ("number: 7e400", "number is '7e400', but must be a number"),
        ("number: true", "number is true, but must be a number"),
        ("number: null", "number is null, but must be a number"),
        ("number: [0.1]", "number is [0.1], but must be a number"),
        ("whole: '3'", "whole is '3', but must be a whole number"),
        ("whole: 3.0", "whole is 3.0, but must be a whole number"),
        ("whole: yes", "whole is true, but must be a whole number"),
        ("maybe: x", "maybe is 'x', but must be a whole number"),
        ("text: no", "text is false, but must be text: put it in quotes"),
        ("text: 1.10", "text is 1.1, but must be text: put it in quotes"),
        ("text: null", "text is null, but must be text"),
        ("text: {a: b}", "text is {'a': 'b'}, but must be text"),
        ("switch: 'true'", "switch is 'true', but must be true or false"),
        ("switch: 1", "switch is 1, but must be true or false"),
        ("side: up", "side is 'up', but must be one of left, right"),
        ("words: []", "words is [], but must be one or more words"),
        ("words: [a, null]", "words is null, but must be one or more words: put it in quotes"),
        ("words: [[a]]", "words is ['a'], but must be one or more words"),
        ("pair: [0.5]", "pair is [0.5], but must be 2 numbers"),
        ("pair: 0.5", "pair is 0.5, but must be 2 numbers"),
        ("pair: [a, 1]", "pair is 'a', but must be 2 numbers"),
        ("steps: [1.5]", "steps is 1.5, but must be one or more whole numbers"),
        (f"whole: {'x' * 200}", f"whole is '{'x' * 79}..., but must be a whole number"),
    ],
)
def test_values_of_a_file_are_checked(tmp_path, yaml, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared
        take(tmp_path, yaml)
    assert str(caught.value) == f"--config {tmp_path / 'options.yaml'}: {message}"


@pytest.mark.parametrize("number", ["5e-3", "1e-8", "-2E5", "1e+20", "1_0e3"])
def test_the_number_that_an_error_proposes_is_one(tmp_path, number):
    with pytest.raises(ValueError, match=": write ") as caught:
        take(tmp_path, f"number: {number}")
    proposed = str(caught.value).partition(": write ")[2]
    assert take(tmp_path, f"number: {proposed}").number == float(number)


def test_files_of_options_that_come_along(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "large.yaml").write_text("place: x\nsize: 100\n")
    options = {"description": "Does nothing.", "presets": tmp_path / "presets"}
    assert parse_options(Options, argv=["--config", "large"], **options) == Options("x", 100)
    assert run_command(Options, print, argv=["--config", "lagre"], **options) == 2
    message = "error: --config is lagre, but there is no such file, and it is none of large; perhaps large\n"
    assert capsys.readouterr().err == message
    # a file of that name comes first
    (tmp_path / "large").write_text('{"place": "y"}')
    assert parse_options(Options, argv=["--config", "large"], **options) == Options("y")


def test_exit_codes(capsys, monkeypatch):
    def fail_with(error):
        def verb(options):
            raise error

        return run_command(Options, verb, "Does nothing.", ["--place", "x"])

    assert run_command(Options, lambda options: None, "Does nothing.", ["--place", "x"]) == 0
    assert fail_with(ValueError("no good")) == 2
    assert capsys.readouterr().err == "error: no good\n"
    assert fail_with(OSError(28, "No space left on device", "model")) == 2
    assert "No space left on device: 'model'" in capsys.readouterr().err
    assert fail_with(KeyboardInterrupt()) == 130
    assert run_command(Options, print, "Does nothing.", ["--place", "x", "--size", "0"]) == 2
    assert "error: size is 0, but must be at least 1" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fail_with(ZeroDivisionError())
    monkeypatch.setenv("IMAGENET64_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no good"):
        fail_with(ValueError("no good"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --place"),
        (["--place"], "--place: expected one argument"),
        (["--place", "x", "--config"], "--config: expected one argument"),
        (["--place", "x", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["--plaec", "x"], "unrecognized arguments: --plaec x; perhaps --place"),
        (["--place", "x", "--siez=4"], "unrecognized arguments: --siez=4; perhaps --size"),
        (["--place", "x", "--Name", "b"], "unrecognized arguments: --Name b; perhaps --names"),
        # no abbreviations: a later option could make them mean two
        (["--place", "x", "--siz", "4"], "unrecognized arguments: --siz 4; perhaps --size"),
        (["--place", "x", "y"], "unrecognized arguments: y"),
        (["--place", "x", "--kind", "z"], "--kind is 'z', but must be one of plain, fancy"),
        (["--place", "x", "--kind", "plan"], "--kind is 'plan', but must be one of plain, fancy; perhaps plain"),
        (["--place", "x", "--size", "3.5"], "--size is '3.5', but must be a whole number"),
        (["--place", "x", "--fast", "maybe"], "--fast is 'maybe', but must be true or false"),
        (["--place", "x", "--span", "1"], "--span: expected 2 arguments"),
    ],
)
def test_arguments_that_do_not_parse(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/nothing"])
    with pytest.raises(SystemExit) as stop:
        run_command(Options, print, "Does nothing.", arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"usage: nothing --place FOLDER [options]\nerror: {message}\n"


def test_spellings():
    """With underscores or dashes, with = or without; switches on their own or with a value."""
    every = parse_options(EveryType, "", ["--no_switch", "--perhaps", "false", "--words=c"])
    assert every == EveryType(switch=False, perhaps=False, words=["c"])
    assert parse_options(EveryType, "", ["--switch", "no"]) == parse_options(EveryType, "", ["--no-switch"])
    assert parse_options(EveryType, "", ["--switch"]) == EveryType()
    # each call has lists of its own
    assert EveryType().words is not EveryType().words


HELP = """\
usage: nothing --place FOLDER [options]

Does nothing. Slowly.

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
  --version                Show the versions of this program and its
                           libraries.
  --config FILE            YAML or JSON file of options; the command line
                           wins.

Example:

    nothing --place x \\
        --size 5

Exit codes: 0 done; """


def test_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.argv", ["/usr/bin/nothing"])
    with pytest.raises(SystemExit) as stop:
        run_command(Options, print, "Does nothing. Slowly.", ["--help"], example="--place x\n--size 5")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(HELP)


def test_help_of_every_type(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse_options(EveryType, "", ["--help"], "nothing.py", "--whole 2")
    shown = capsys.readouterr().out
    for line in (
        "  --number X               A number. (default: 0.5)",
        "  --maybe N                A whole one, or none.",
        "  --switch, --no_switch    On. (default: true)",
        "  --perhaps {true,false}   Neither on nor off.",
        "  --side {left,right}      A side. (default: left)",
        "  --words TEXT [TEXT ...]  Words. (default: a b)",
        "  --pair X X               Two. (default: 0.0 1.0)",
        "    python nothing.py --whole 2",
    ):
        assert f"\n{line}\n" in shown


def test_version(capsys):
    expected = f"imagenet64-diffusion {__version__} (torch {metadata.version('torch')}, diffusers "
    assert run_command(Options, print, "Does nothing.", ["--place", "x", "--version"]) == 0
    assert run_houses("--version") == 0
    assert run_houses("sell", "--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(expected) for line in lines)


PROGRAM = """
import os, signal, sys
from dataclasses import dataclass
from imagenet64_diffusion.utils.command_line import option, run_command

@dataclass
class Options:
    what: str = option("nothing", "What to do.")

def verb(options):
    if options.what == "fail":
        raise ZeroDivisionError("a fault of ours")
    if options.what == "refuse":
        raise ValueError("a wrong input")
    # a shell's background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if options.what == "stop":
        os.kill(os.getpid(), signal.SIGINT)
    print("done, without torch" if "torch" not in sys.modules else "done")

sys.exit(run_command(Options, verb, ""))
"""


@pytest.mark.parametrize(
    ("what", "code", "out", "err"),
    [
        ("nothing", 0, "done, without torch\n", ""),
        ("fail", 1, "", "ZeroDivisionError: a fault of ours\n"),
        ("refuse", 2, "", "error: a wrong input\n"),
        ("stop", 130, "", "interrupted\n"),
    ],
)
def test_exit_codes_of_a_process(what, code, out, err):
    command = [sys.executable, "-c", PROGRAM, "--what", what]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (finished.returncode, finished.stdout) == (code, out)
    assert finished.stderr.endswith(err)
    assert ("Traceback" in finished.stderr) == (what == "fail")


def test_versions_and_usage_wait_for_no_library():
    program = (
        "import sys\nfrom imagenet64_diffusion.evaluate_models import main\n"
        "main(['--version']), main(['score', '--version']), main(['--help'])\n"
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True)
    assert finished.stdout.splitlines()[-1] == "[]"


COMMANDS = {
    "paint": SubCommand(Options, lambda options: print(f"painting {options}"), "Paints a house.", "--place x"),
    "sell": SubCommand(Options, lambda options: fail(options), "Sells it. Slowly.", "--place x\n--size 4"),
}


def fail(options):
    raise ValueError(f"nobody wants {options.place}")


def run_houses(*arguments) -> int:
    return run_sub_commands(COMMANDS, "Deals with houses.", [str(argument) for argument in arguments])


def test_a_sub_command_is_its_verb(capsys):
    assert run_houses("paint", "--place", "there", "--size", 2) == 0
    assert capsys.readouterr().out == f"painting {Options('there', 2)}\n"
    assert run_houses("sell", "--place", "there") == 2
    assert capsys.readouterr().err == "error: nobody wants there\n"
    assert run_houses("sell", "--place", "there", "--size", 0) == 2
    assert capsys.readouterr().err == "error: size is 0, but must be at least 1\n"


def test_a_sub_command_takes_a_file_of_options(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("place: there\nsize: 7\n")
    assert run_houses("paint", "--config", tmp_path / "options.yaml", "--size", 8) == 0
    assert capsys.readouterr().out == f"painting {Options('there', 8)}\n"
    (tmp_path / "options.yaml").write_text("colour: red\n")
    assert run_houses("paint", "--config", tmp_path / "options.yaml") == 2
    assert "names 'colour', which is not an option" in capsys.readouterr().err


def test_which_sub_commands_there_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/houses", "sell"])
    shown = (
        "usage: houses {paint,sell} [options]\n\nDeals with houses.\n\n  paint  Paints a house.\n  sell   Sells it.\n"
    )
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert run_houses(*arguments) == code
        captured = capsys.readouterr()
        assert (captured.out if code == 0 else captured.err).startswith(shown)
        assert (captured.err if code == 0 else captured.out) == ""
    # without arguments those of the process
    with pytest.raises(SystemExit):
        run_sub_commands(COMMANDS, "Deals with houses.")
    assert "--place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hint"), [("pant", ", perhaps paint"), ("sel", ", perhaps sell"), ("rent", ""), ("--size", "")]
)
def test_an_unknown_sub_command(capsys, name, hint):
    assert run_houses(name, "--place", "x") == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: there is no {name!r}{hint}: take one of paint, sell\n"
    assert captured.out == ""


def test_help_of_a_sub_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["houses"])
    with pytest.raises(SystemExit) as stop:
        run_houses("sell", "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: houses sell --place FOLDER [options]\n\nSells it. Slowly.\n\nplace:\n")
    assert "\nExample:\n\n    houses sell --place x \\\n        --size 4\n\nExit codes: 0 done; " in shown
