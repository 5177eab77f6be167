"""What the command lines have in common: options from a dataclass, a file of options, exit codes."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar


Options = TypeVar("Options")


class StoppedBySignalError(Exception):
    """The work was stopped by a signal, and can be gone on with.

    Attributes:
        signal_number: Which signal.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class ElsewhereError(ValueError):
    """An error that another process of the same run has met, and reports."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass of options.

    Args:
        default: Its default.
        help: What ``--help`` says.
        metadata: Further arguments of `argparse.ArgumentParser.add_argument`, such as ``choices``.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text that does not speak of it, and keeps the lines of indented text."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            paragraph
            if paragraph.startswith(" ")
            else super(_HelpFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], "") or "default" in (action.help or "").lower():
            return action.help
        return super()._get_help_string(action)


def run_verb(
    options_class: type[Options],
    verb: Callable[[Options], Any],
    description: str,
    argv: Sequence[str] | None = None,
    program: str | None = None,
) -> int:
    """Parses the command line, runs the verb, and turns what goes wrong into a sentence and an exit code.

    Args:
        options_class: Dataclass of the options; each field's metadata holds its help text.
        verb: The function behind the command.
        description: What the command does, for ``--help``.
        argv: The arguments; by default those of the process.
        program: What ``--help`` calls the command; by default its file.

    Returns:
        The exit code: 0, or 2 for a wrong option or input, or 128 and the number of the signal that stopped it: 130
        when interrupted, 143 when terminated. With IMAGENET64_TRACEBACK=1 in the environment errors come with their
        traceback instead.
    """
    options = None
    try:
        options = parse_options(options_class, description, argv, program)
        verb(options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("IMAGENET64_TRACEBACK") == "1":
            raise
        if not isinstance(error, ElsewhereError):
            print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedBySignalError as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@dataclasses.dataclass(frozen=True)
class SubCommand:
    """One of the things that a command does.

    Attributes:
        options_class: Dataclass of its options.
        verb: The function behind it.
        description: What it does; its first sentence stands in the list of commands.
        example: Arguments that it might be called with, for ``--help``; each line after the first goes on with it.
    """

    options_class: type
    verb: Callable[[Any], Any]
    description: str
    example: str


def run_sub_commands(commands: Mapping[str, SubCommand], description: str, argv: Sequence[str] | None = None) -> int:
    """`run_verb` for a command line whose first word says which of several things to do.

    Args:
        commands: By their names.
        description: What they are for, for ``--help``.
        argv: The arguments; by default those of the process.

    Returns:
        The exit code of `run_verb`; 2 where the first word is none of the names.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = Path(sys.argv[0]).name
    width = max(map(len, commands))
    summaries = {name: command.description.split(". ")[0].rstrip(".") + "." for name, command in commands.items()}
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())
    usage = (
        f"usage: {program} {{{','.join(commands)}}} [options]\n\n{description}\n\n{listed}\n\n{program} <name> --help"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f", perhaps {near[0]}" if near else ""
        print(f"error: there is no {name!r}{hint}: take one of {', '.join(commands)}", file=sys.stderr)
        return 2
    command = commands[name]
    lines = f"{program} {name} {command.example}".splitlines()
    example = " \\\n".join("    " + line for line in (lines[0], *("    " + line for line in lines[1:])))
    description = f"{command.description}\n\nExample:\n\n{example}"
    return run_verb(command.options_class, command.verb, description, rest, program=f"{program} {name}")


def parse_options(
    options_class: type[Options], description: str, argv: Sequence[str] | None = None, program: str | None = None
) -> Options:
    """The options from the command line and from the file that ``--config`` names; the command line wins.

    Raises:
        ValueError: If the file cannot be read, names an unknown option, or a value is out of range.
    """
    # transformers takes seconds to import, which is for whoever parses a command line, not for who calls the function
    from transformers import HfArgumentParser

    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(options_class, prog=program, description=description, formatter_class=_HelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file of options; the command line wins.")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config_file = finder.parse_known_args(arguments)[0].config
    if config_file is not None:
        _take_defaults(parser, Path(config_file))
    namespace = parser.parse_args(arguments)
    values = {name: value for name, value in vars(namespace).items() if name != "config"}
    return options_class(**values)


def _take_defaults(parser: argparse.ArgumentParser, file: Path) -> None:
    """Makes the values of a file the parser's defaults."""
    text = file.read_text(encoding="utf-8")
    if file.suffix in (".yaml", ".yml"):
        import yaml

        values = yaml.safe_load(text)
    else:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config {file} holds a {type(values).__name__}, but must hold options and their values")
    actions = {action.dest: action for action in parser._actions}
    for name, value in values.items():
        if name not in actions or name in ("config", "help"):
            raise ValueError(f"--config {file} names {name!r}, which is not an option")
        choices = actions[name].choices
        if choices is not None and value is not None and value not in choices:
            raise ValueError(
                f"--config {file}: {name} is {value!r}, but must be one of {', '.join(map(str, choices))}"
            )
        actions[name].required = False
    parser.set_defaults(**values)
