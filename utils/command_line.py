"""What the command lines have in common: options from a dataclass, parsed by jsonargparse, and exit codes."""

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import jsonargparse
import yaml

from ..version import __version__
from .nearest_names import nearest_name, perhaps


OptionsType = TypeVar("OptionsType")

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected failure, with its traceback; 2 a wrong option or input, with a sentence that"
    " names it (IMAGENET64_TRACEBACK=1 shows where it comes from); 128 and the number of the signal when stopped, so"
    " 130 after Ctrl-C and 143 after kill."
)
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "words"}


class StoppedBySignalError(Exception):
    """A signal stopped the command, and the same call resumes it.

    Attributes:
        signal_number: Which signal.
    """

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class OtherRankError(ValueError):
    """An error that another rank of the same run has met, and reports."""


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A field of a dataclass of options; one without a default is required.

    Args:
        default: Its default.
        help: What ``--help`` says, which adds the default where this does not speak of it.
        metadata: ``group``, the heading in ``--help``; ``metavar``; ``choices``; ``nargs``, the length of a list;
            ``at_least``, ``above``, ``at_most`` and ``below``, its range.
    """
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


def option_list(default: Sequence[Any], help: str, **metadata: Any) -> Any:
    """`option` for a list of values; each instance of the dataclass has a list of its own."""
    return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})


class CheckedOptions:
    """Base of the dataclasses of options: their values are checked however they are made.

    A subclass with a ``__post_init__`` of its own calls this one's first.
    """

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range or choices, or an empty one that is required."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value, metadata = getattr(self, item.name), item.metadata
            if value in ("", []) and item.default is item.default_factory:
                raise ValueError(f"{item.name} is empty: {metadata['help']}")
            for entry in value if isinstance(value, list) else [value]:
                if entry is None:
                    continue
                if not _is_in_range(entry, metadata):
                    raise ValueError(f"{item.name} is {entry}, but must be {_range(metadata)}")
                if entry not in metadata.get("choices", [entry]):
                    raise ValueError(f"{item.name} is {entry!r}, but must be {_one_of(metadata['choices'], entry)}")


def _is_in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    return (
        ("at_least" not in metadata or value >= metadata["at_least"])
        and ("above" not in metadata or value > metadata["above"])
        and ("at_most" not in metadata or value <= metadata["at_most"])
        and ("below" not in metadata or value < metadata["below"])
    )


def _range(metadata: Mapping[str, Any]) -> str:
    if "at_most" not in metadata and "below" not in metadata:
        return f"at least {metadata['at_least']}" if "at_least" in metadata else f"above {metadata['above']}"
    begin = f"[{metadata['at_least']}" if "at_least" in metadata else f"({metadata['above']}"
    return f"in {begin}, " + (f"{metadata['at_most']}]" if "at_most" in metadata else f"{metadata['below']})")


def _one_of(choices: Sequence[str], value: object) -> str:
    return f"one of {', '.join(choices)}{perhaps(value, choices)}"


def version_line() -> str:
    """The versions of this program and of the libraries that its results depend on."""
    versions = [f"{library} {importlib.metadata.version(library)}" for library in ("torch", "diffusers")]
    return f"imagenet64-diffusion {__version__} ({', '.join(versions)}, Python {platform.python_version()})"


class SubCommand(NamedTuple):
    """One of the things that a command does: its options, its function, what it does, and an example."""

    options_class: type
    command: Callable[[Any], Any]
    description: str
    example: str = ""


def run_command(
    options_class: type[OptionsType],
    command: Callable[[OptionsType], Any],
    description: str,
    argv: Sequence[str] | None = None,
    example: str = "",
    presets: Path | None = None,
) -> int:
    """Parses the command line, runs the command, and turns what goes wrong into a sentence and an exit code.

    Args:
        options_class: Dataclass of the options; see `option`.
        command: The function behind the command line.
        description: What the command does, for ``--help``.
        argv: The arguments; by default those of the process.
        example: Arguments that it might be called with, for ``--help``; each line after the first continues it.
        presets: Folder of YAML files of options that ``--config`` also takes by their names.

    Returns:
        The exit code: 0, or 2 for a wrong option or input, or 128 and the number of the signal that stopped it. With
        IMAGENET64_TRACEBACK=1 in the environment errors come with their traceback instead.

    Raises:
        SystemExit: With 0 after ``--help`` and the other options that only print something.
        Exception: Whatever else the command raises, a fault of ours: Python shows the traceback and ends with 1.
    """
    return _run(lambda words: (command, parse_options(options_class, description, words, example, presets)), argv)


def run_sub_commands(commands: Mapping[str, SubCommand], description: str, argv: Sequence[str] | None = None) -> int:
    """`run_command` for a command line whose first word says which of several things to do."""
    program = Path(sys.argv[0]).name

    def parse(words: list[str]) -> tuple[Callable[[Any], Any], Any]:
        if words and words[0] in commands and "--print_shtab" not in words:
            entry = commands[words[0]]
            named = f"{program} {words[0]}"
            return entry.command, parse_options(
                entry.options_class, entry.description, words[1:], entry.example, program=named
            )
        # only to print something, or to refuse what was said: parse_args does not return
        parser = Parser(prog=program, usage=f"{program} {{{','.join(commands)}}} [options]", description=description)
        parser.add_general_options()
        added = parser.add_subcommands(dest="subcommand", title="subcommands")
        for name, entry in commands.items():
            sub_parser = Parser.of(entry.options_class, f"{program} {name}", entry.description, entry.example)
            added.add_subcommand(name, sub_parser, help=entry.description.split(". ")[0].rstrip(".") + ".")
        return parser.error, parser.parse_args(words)

    return _run(parse, argv)


def parse_options(
    options_class: type[OptionsType],
    description: str,
    argv: Sequence[str] | None = None,
    example: str = "",
    presets: Path | None = None,
    program: str | None = None,
) -> OptionsType:
    """The options from the command line and from the file that ``--config`` names; the command line wins.

    The arguments are those of `run_command`. Raises ValueError if there is something wrong with one of them.
    """
    parser = Parser.of(options_class, program or Path(sys.argv[0]).name, description, example, presets)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", nargs="?")
    words = sys.argv[1:] if argv is None else list(argv)
    found, others = finder.parse_known_args(words)
    if found.config is not None:
        parser.set_defaults(_read_config(found.config, parser.kinds, presets))
        words = others
    values = parser.parse_args(words)
    return options_class(**{name: values[name] for name in parser.kinds})


def call_command(command: Callable[[Any], Any], options: Any) -> None:
    """Calls the function behind a command line; tests that only parse replace this."""
    command(options)


def _run(parse: Callable[[list[str]], tuple[Callable[[Any], Any], Any]], argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--version" in words:
        print(version_line())
        return 0
    try:
        call_command(*parse(words))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("IMAGENET64_TRACEBACK") == "1":
            raise
        if not isinstance(error, OtherRankError):
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


def _read_config(name: str, kinds: Mapping[str, "_Kind"], presets: Path | None) -> dict[str, Any]:
    """The options in the file, or of the preset, that ``--config`` names."""
    file, known = Path(name), {path.stem: path for path in sorted(presets.glob("*.yaml"))} if presets else {}
    if not file.is_file():
        if name not in known:
            hint = f", and it is none of {', '.join(known)}{perhaps(name, known)}" if known else ""
            raise ValueError(f"--config is {name}, but there is no such file{hint}")
        file = known[name]
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))  # JSON is YAML too
        if not isinstance(entries, dict):
            found = "nothing" if entries is None else f"a {type(entries).__name__}"
            raise ValueError(f"holds {found}, but must hold options and their values")
        for option_name, value in entries.items():
            if option_name not in kinds:
                raise ValueError(f"names {option_name!r}, which is not an option{perhaps(option_name, kinds)}")
            entries[option_name] = kinds[option_name].from_file(value, option_name)
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} is not text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"--config {file}: {error}") from error
    return entries


class _Kind:
    """What values a field of a dataclass takes: the type of one, whether none will do, whether several."""

    def __init__(self, hint: Any, metadata: Mapping[str, Any]):
        self.optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        if self.optional:
            (hint,) = (argument for argument in typing.get_args(hint) if argument is not type(None))
        self.several = typing.get_origin(hint) is list
        (self.value,) = typing.get_args(hint) if self.several else (hint,)
        self.choices = tuple(metadata.get("choices", ()))
        self.count = metadata.get("nargs", "+") if self.several else None

    def refusal(self, value: Any) -> str:
        if self.choices:
            kind = _one_of(self.choices, value)
        else:
            several = f"{'one or more' if self.count == '+' else self.count} {_SEVERAL.get(self.value)}"
            kind = several if self.several else _ONE[self.value]
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        shown = repr(value) if isinstance(value, str) else text
        return f"is {shown if len(shown) <= 80 else shown[:80] + '...'}, but must be {kind}"

    def from_file(self, value: Any, name: str) -> Any:
        """A value of a file: one does as a list of one, a whole number as text, and text as a number."""
        if value is None and self.optional:
            return None
        values = list(value) if isinstance(value, list) else [value]
        right = bool(values) and self.count in ("+", None, len(values)) and (self.several or values == [value])
        for i, entry in enumerate(values):
            try:
                # YAML takes 5e-3 for text
                if type(entry) in {float: (int, str), str: (int,)}.get(self.value, ()):
                    values[i] = self.value(entry)
            except ValueError:
                raise ValueError(f"{name} {self.refusal(entry)}") from None
            if type(values[i]) is not self.value or values[i] not in (self.choices or values):
                right = False
        if not right:
            quotes = ": put it in quotes" if self.value is str and not isinstance(value, (list, dict)) else ""
            raise ValueError(f"{name} {self.refusal(value)}{'' if self.choices else quotes}")
        return values if self.several else values[0]


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, with the help and the errors of this package: one sentence, raised as ValueError."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_HelpFormatter, add_help=False, allow_abbrev=False, **options)
        self.kinds: dict[str, _Kind] = {}

    @classmethod
    def of(
        cls, options_class: type, program: str, description: str, example: str = "", presets: Path | None = None
    ) -> "Parser":
        """The parser of a dataclass of options."""
        hints = typing.get_type_hints(options_class)
        epilog = f"Example:\n\n{_example(program, example)}\n\n{EXIT_CODES}" if example else EXIT_CODES
        parser = cls(prog=program, description=description, epilog=epilog)
        fields = dataclasses.fields(options_class)
        required = {f.name for f in fields if f.default is f.default_factory}
        groups: dict[str, Any] = {}
        usage = [program]
        # what must be said comes first, then what a base class does not have
        own = options_class.__annotations__
        for item in sorted(fields, key=lambda f: (f.name not in required, f.name not in own)):
            title = item.metadata.get("group", "options")
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            kind = parser.kinds[item.name] = _Kind(hints[item.name], item.metadata)
            parser._add_option(groups[title], item, kind, item.name in required)
            if item.name in required:
                usage.append(f"--{item.name} {item.metadata.get('metavar', _METAVARS[kind.value])}")
        parser.usage = _wrapped([*usage, "[options]"]).replace("%", "%%")
        known = "".join(f", {path.stem}" for path in sorted(presets.glob("*.yaml"))) if presets else ""
        parser.add_general_options(config=f"YAML or JSON file of options{known and ', or one of ' + known[2:]}")
        return parser

    @staticmethod
    def _add_option(group: Any, item: Any, kind: _Kind, required: bool) -> None:
        has_factory = item.default_factory is not dataclasses.MISSING
        described: dict[str, Any] = {"help": item.metadata.get("help", ""), "required": required}
        described["default"] = None if required else item.default_factory() if has_factory else item.default
        if kind.value is bool:
            described |= {"action": jsonargparse.ActionYesNo, "nargs": "?"}
        else:
            value: Any = Literal[kind.choices] if kind.choices else kind.value
            described["type"] = value | None if kind.optional else value
            default_metavar = f"{{{','.join(kind.choices)}}}" if kind.choices else _METAVARS[kind.value]
            described["metavar"] = item.metadata.get("metavar", default_metavar)
            described |= {"nargs": kind.count} if kind.several else {}
        group.add_argument(f"--{item.name}", **described)

    def add_general_options(self, config: str = "") -> None:
        """``--help`` and the other options that every command has; ``--config`` if there is a text for it."""
        group = self.add_argument_group("general")
        group.add_argument("-h", "--help", action="help", help="Show this text and end.")
        version = "Show the versions of this program and its libraries."
        group.add_argument("--version", action="version", help=version, version="")
        if config:
            # jsonargparse adds --print_config where it is told so, else beside the groups
            group._print_config = "--print_config"  # type: ignore[attr-defined]
            config_help = f"{config}; the command line wins."
            group.add_argument("--config", action=jsonargparse.ActionConfigFile, metavar="FILE", help=config_help)
            printing = self._option_string_actions["--print_config"]
            printing.help = "Print all options as a YAML file for --config, and end."
        group.add_argument(
            "--print_shtab",
            action=_PrintCompletion,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            metavar="SHELL",
            help="Print completions for bash, zsh, fish or tcsh, and end.",
        )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError with the message as one sentence that names the option and the nearest name."""
        raise ValueError(self._sentence(" ".join(str(message).split()))) from ex

    def _sentence(self, message: str) -> str:
        if found := re.search(r'(?:Parser key "|argument --)(\w+).*?[Vv]alue: (.*)$', message):
            name, value = found.groups()
            return f"{name} {self.kinds[name].refusal(value[1:-1] if value.startswith(chr(39)) else value)}"
        if found := re.search(r"unrecognized arguments: (.*)|Option '([^']*)' is not accepted", message):
            words = (found[1] or f"--{found[2]}").split()
            name = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
            spelled = [text for text in self._option_string_actions if text.startswith("--")]
            near = perhaps("--" + name[2:].replace("-", "_"), spelled) if name else ""
            return f"unrecognized arguments: {' '.join(words)}{near}"
        if found := re.search(r"invalid choice: '?([^' ]*)'? \(choose from (.*)\)", message):
            names = found[2].replace("'", "").split(", ")
            nearest = nearest_name(found[1], names)
            hint = f", perhaps {nearest}" if nearest else ""
            return f"there is no {found[1]!r}{hint}: take one of {', '.join(names)}"
        if found := re.search(r'expected "subcommand" to be one of \{(.*?)\}', message):
            return f"name a subcommand: one of {found[1].replace(',', ', ')}"
        if found := re.search(r"the following arguments are required: (.*)", message):
            return f"the following arguments are required: --{found[1].replace(', ', ', --')}"
        return re.sub(r"^argument (--\w+)\S*:", r"\1:", message)


class _PrintCompletion(argparse.Action):
    """``--print_shtab``: jsonargparse's completions, made by shtab."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        root = getattr(parser, "parent_parser", parser)
        print(root.get_completion_script(f"shtab-{values}"))
        sys.exit(0)


class _HelpFormatter(argparse.HelpFormatter):
    """One spelling of each option, its default where its text does not speak of it, indented text as it is."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 32, **options})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]
        if isinstance(action, jsonargparse.ActionYesNo):
            return ", ".join(action.option_strings) if action.default in (True, None) else name
        if action.nargs == 0 or name == "--print_config":
            return ", ".join(action.option_strings)
        return f"{name} {self._format_args(action, action.dest.upper())}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith(" ") else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in text.split("\n\n")
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is False or default in (None, [], "", argparse.SUPPRESS) or "default" in text.lower():
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
        return f"{text} (default: {shown.replace('%', '%%')})"


def _wrapped(parts: Sequence[str]) -> str:
    """The parts of a usage, on lines that fit the terminal; argparse wraps only what it has made itself."""
    lines, start = [parts[0]], len("usage: ")
    for part in parts[1:]:
        if start + len(lines[-1]) + 1 + len(part) < shutil.get_terminal_size().columns:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return f"\n{' ' * start}".join(lines)


def _example(program: str, arguments: str) -> str:
    """The command with its arguments, indented, its lines joined as a shell joins them."""
    start = f"python {program}" if program.split()[0].endswith(".py") else program
    first, *others = f"{start} {arguments}".splitlines()
    return " \\\n".join([f"    {first}", *(f"        {line}" for line in others)])
