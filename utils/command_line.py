"""What the command lines have in common: options from a dataclass, a file of options, exit codes."""

import dataclasses
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..version import __version__
from .nearest_names import nearest_name


Options = TypeVar("Options")

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected failure, with its traceback; 2 a wrong option or input, with a sentence that"
    " names it (IMAGENET64_TRACEBACK=1 shows where it comes from); 128 and the number of the signal when stopped, so"
    " 130 after Ctrl-C and 143 after kill."
)


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
        help: What ``--help`` says, which adds the default where this does not speak of it.
        metadata: ``group``, the heading under which ``--help`` lists it; ``required``, for fields that have a default
            only because others of their dataclass do; and further arguments of `argparse.ArgumentParser.add_argument`,
            such as ``choices``, ``metavar`` and ``nargs``.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def option_list(default: Sequence[Any], help: str, **metadata: Any) -> Any:
    """`option` for a list of values; each instance of the dataclass has a list of its own."""
    return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})


def version_line() -> str:
    """The versions of this program and of the libraries that its results depend on."""
    versions = [f"{library} {importlib.metadata.version(library)}" for library in ("torch", "diffusers")]
    return f"imagenet64-diffusion {__version__} ({', '.join(versions)}, Python {platform.python_version()})"


def run_command(
    options_class: type[Options],
    verb: Callable[[Options], Any],
    description: str,
    argv: Sequence[str] | None = None,
    program: str | None = None,
    example: str = "",
    presets: Path | None = None,
) -> int:
    """Parses the command line, runs the verb, and turns what goes wrong into a sentence and an exit code.

    Args:
        options_class: Dataclass of the options; each field's metadata holds its help text and group.
        verb: The function behind the command.
        description: What the command does, for ``--help``.
        argv: The arguments; by default those of the process.
        program: What ``--help`` calls the command; by default its file.
        example: Arguments that it might be called with, for ``--help``; each line after the first goes on with it.
        presets: Folder of files of options that ``--config`` also takes by their names.

    Returns:
        The exit code: 0, or 2 for a wrong option or input, or 128 and the number of the signal that stopped it: 130
        when interrupted, 143 when terminated. With IMAGENET64_TRACEBACK=1 in the environment errors come with their
        traceback instead.

    Raises:
        SystemExit: With 2 if the command line cannot be parsed, and with 0 after ``--help``.
        Exception: Whatever else the verb raises, a fault of ours: Python shows the traceback and ends with 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--version" in arguments:
        print(version_line())
        return 0
    try:
        options = parse_options(options_class, description, arguments, program, example, presets)
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
        example: Arguments that it might be called with, as for `run_command`.
    """

    options_class: type
    verb: Callable[[Any], Any]
    description: str
    example: str


def run_sub_commands(commands: Mapping[str, SubCommand], description: str, argv: Sequence[str] | None = None) -> int:
    """`run_command` for a command line whose first word says which of several things to do.

    Args:
        commands: By their names.
        description: What they are for, for ``--help``.
        argv: The arguments; by default those of the process.

    Returns:
        The exit code of `run_command`; 2 where the first word is none of the names.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = Path(sys.argv[0]).name
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_commands_help(commands, description, program), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, *rest = arguments
    if name == "--version":
        print(version_line())
        return 0
    if name not in commands:
        near = nearest_name(name, commands)
        hint = f", perhaps {near}" if near else ""
        print(f"error: there is no {name!r}{hint}: take one of {', '.join(commands)}", file=sys.stderr)
        return 2
    command = commands[name]
    return run_command(
        command.options_class, command.verb, command.description, rest, f"{program} {name}", command.example
    )


def parse_options(
    options_class: type[Options],
    description: str,
    argv: Sequence[str] | None = None,
    program: str | None = None,
    example: str = "",
    presets: Path | None = None,
) -> Options:
    """The options from the command line and from the file that ``--config`` names; the command line wins.

    The arguments are those of `run_command`.

    Raises:
        ValueError: If the file cannot be read, names an unknown option, or a value is of the wrong type or out of
            range.
        SystemExit: If the command line cannot be parsed, and after ``--help``.
    """
    # transformers takes a while to import, which is for whoever parses a command line, not for who calls the function
    from .option_parser import OptionParser

    program = program or Path(sys.argv[0]).name
    epilog = f"Example:\n\n{_example(program, example)}\n\n{EXIT_CODES}" if example else EXIT_CODES
    parser = OptionParser(options_class, program, description, epilog, version_line(), presets)
    return options_class(**parser.parse(sys.argv[1:] if argv is None else argv))


def _commands_help(commands: Mapping[str, SubCommand], description: str, program: str) -> str:
    width = max(map(len, commands))
    summaries = {name: command.description.split(". ")[0].rstrip(".") + "." for name, command in commands.items()}
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in summaries.items())
    return (
        f"usage: {program} {{{','.join(commands)}}} [options]\n\n{description}\n\n{listed}\n\n"
        f"{program} <name> --help shows the options of each, {program} --version the versions."
    )


def _example(program: str, arguments: str) -> str:
    """The command with its arguments, indented, its lines joined as a shell joins them."""
    start = f"python {program}" if program.split()[0].endswith(".py") else program
    first, *others = f"{start} {arguments}".splitlines()
    return " \\\n".join([f"    {first}", *(f"        {line}" for line in others)])
