"""What the command lines have in common."""

from dataclasses import dataclass, field

import pytest

from imagenet64_diffusion.command_line import SubCommand, option, parse_options, run_sub_commands, run_verb


@dataclass
class Options:
    """Options of a verb that does nothing."""

    place: str = field(metadata={"help": "Where."})
    size: int = option(3, "How large.")
    kind: str = option("plain", "Which.", choices=["plain", "fancy"])
    names: list[str] = field(default_factory=lambda: ["a"], metadata={"help": "Some names; default: a."})
    fast: bool = option(False, "Whether to hurry.")

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size is {self.size}, but must be at least 1")


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
        ('{"weight": 3}', "names 'weight', which is not an option"),
        ('{"config": "x"}', "names 'config', which is not an option"),
        ('{"kind": "odd"}', "kind is 'odd', but must be one of plain, fancy"),
    ],
)
def test_wrong_files(tmp_path, capsys, text, message):
    file = tmp_path / "options.json"
    file.write_text(text)
    assert run_verb(Options, print, "Does nothing.", ["--config", str(file), "--place", "x"]) == 2
    assert message in capsys.readouterr().err


def test_exit_codes(capsys, monkeypatch):
    def fail_with(error):
        def verb(options):
            raise error

        return run_verb(Options, verb, "Does nothing.", ["--place", "x"])

    assert run_verb(Options, lambda options: None, "Does nothing.", ["--place", "x"]) == 0
    assert fail_with(ValueError("no good")) == 2
    assert capsys.readouterr().err == "error: no good\n"
    assert fail_with(OSError(28, "No space left on device", "model")) == 2
    assert "No space left on device: 'model'" in capsys.readouterr().err
    assert fail_with(KeyboardInterrupt()) == 130
    assert run_verb(Options, print, "Does nothing.", ["--place", "x", "--size", "0"]) == 2
    assert "error: size is 0, but must be at least 1" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        fail_with(ZeroDivisionError())
    monkeypatch.setenv("IMAGENET64_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no good"):
        fail_with(ValueError("no good"))


@pytest.mark.parametrize(
    "arguments", [[], ["--place"], ["--place", "x", "--colour", "red"], ["--place", "x", "--kind", "z"]]
)
def test_arguments_that_do_not_parse(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        run_verb(Options, print, "Does nothing.", arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Does nothing." in shown
    assert "How large. (default: 3)" in shown
    assert "Some names; default: a. (default" not in shown
    assert "Where. (default" not in shown


COMMANDS = {
    "paint": SubCommand(Options, lambda options: print(f"painting {options}"), "Paints a house.", "--place x"),
    "sell": SubCommand(Options, lambda options: fail(options), "Sells it. Slowly.", "--place x\n--size 4"),
}


def fail(options):
    raise ValueError(f"nobody wants {options.place}")


def run_command(*arguments) -> int:
    return run_sub_commands(COMMANDS, "Deals with houses.", [str(argument) for argument in arguments])


def test_a_sub_command_is_its_verb(capsys):
    assert run_command("paint", "--place", "there", "--size", 2) == 0
    assert capsys.readouterr().out == f"painting {Options('there', 2)}\n"
    assert run_command("sell", "--place", "there") == 2
    assert capsys.readouterr().err == "error: nobody wants there\n"
    assert run_command("sell", "--place", "there", "--size", 0) == 2
    assert capsys.readouterr().err == "error: size is 0, but must be at least 1\n"


def test_a_sub_command_takes_a_file_of_options(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("place: there\nsize: 7\n")
    assert run_command("paint", "--config", tmp_path / "options.yaml", "--size", 8) == 0
    assert capsys.readouterr().out == f"painting {Options('there', 8)}\n"
    (tmp_path / "options.yaml").write_text("colour: red\n")
    assert run_command("paint", "--config", tmp_path / "options.yaml") == 2
    assert "names 'colour', which is not an option" in capsys.readouterr().err


def test_which_sub_commands_there_are(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/houses", "sell"])
    shown = (
        "usage: houses {paint,sell} [options]\n\nDeals with houses.\n\n  paint  Paints a house.\n  sell   Sells it.\n"
    )
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        assert run_command(*arguments) == code
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
    assert run_command(name, "--place", "x") == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: there is no {name!r}{hint}: take one of paint, sell\n"
    assert captured.out == ""


def test_help_of_a_sub_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["houses"])
    with pytest.raises(SystemExit) as stop:
        run_command("sell", "--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: houses sell [-h]")
    assert "\nSells it. Slowly.\n\nExample:\n\n    houses sell --place x \\\n        --size 4\n\noptions:" in shown
