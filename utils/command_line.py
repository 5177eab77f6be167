"""What the command lines have in common: options from a dataclass, parsed by jsonargparse, and exit codes."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import operator
import os
import platform
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import jsonargparse
import yaml

from ..version import __version__
from .nearest_names import perhaps


OptionsType = TypeVar("OptionsType")

EXIT_CODES = (
    "Exit codes: 0 done; 1 an unexpected failure, with its traceback; 2 a wrong option or input, with a sentence that"
    " names it (IMAGENET64_TRACEBACK=1 shows where it comes from); 128 and the number of the signal when stopped, so"
    " 130 after Ctrl-C and 143 after kill."
)
_BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "words"}


class StoppedBySignalError(Exception):
    """A signal stopped the command, and the same call resumes it."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.signal_number = signal_number


class OtherRankError(ValueError):
    """An error that another rank of the same run has met, and reports."""


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata: Any) -> Any:
    """A field of a dataclass of options, required if it has no default, with its text in ``--help``.

    Metadata are ``group``, the heading in ``--help``; ``metavar``; ``choices``; ``nargs``, the length of a list;
    ``at_least``, ``above``, ``at_most`` and ``below``, its range.
    """
    metadata["help"] = help
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class CheckedOptions:
    """Base of the dataclasses of options: their values are checked however they are made."""

    def __post_init__(self) -> None:
        """Raises ValueError for a value out of its range or choices, or an empty one that is required."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value, metadata = getattr(self, item.name), item.metadata
            if value in ("", []) and item.default is item.default_factory:
                raise ValueError(f"{item.name} is empty: {metadata['help']}")
            bounds = {name: metadata[name] for name in _BOUNDS if name in metadata}
            for entry in value if isinstance(value, list) else [value]:
                if entry is None:
                    continue
                if not all(_BOUNDS[name](entry, bound) for name, bound in bounds.items()):
                    raise ValueError(f"{item.name} is {entry}, but must be {_range(**bounds)}")
                if entry not in metadata.get("choices", [entry]):
                    raise ValueError(f"{item.name} is {entry!r}, but must be {_one_of(metadata['choices'], entry)}")


def _range(at_least: Any = None, above: Any = None, at_most: Any = None, below: Any = None) -> str:
    if at_most is None and below is None:
        return f"above {above}" if at_least is None else f"at least {at_least}"
    begin = f"({above}" if at_least is None else f"[{at_least}"
    return f"in {begin}, " + (f"{below})" if at_most is None else f"{at_most}]")


def _one_of(choices: Sequence[str], value: object) -> str:
    return f"one of {', '.join(choices)}{perhaps(value, choices)}"


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

    ``--help`` shows the example, arguments on one line or several. ``--config`` also takes the names of the YAML files
    in the folder ``presets``. SystemExit is raised after ``--help`` and what else only prints something.
    """
    return _run(lambda words: (command, parse_options(options_class, description, words, example, presets)), argv)


def run_sub_commands(commands: Mapping[str, SubCommand], description: str, argv: Sequence[str] | None = None) -> int:
    """`run_command` for a command line whose first word says which of several things to do."""
    program, names = Path(sys.argv[0]).name, ", ".join(commands)

    def parse(words: list[str]) -> tuple[Callable[[Any], Any], Any]:
        if not words:
            raise ValueError(f"name a subcommand: one of {names}")
        if not words[0].startswith("-") and words[0] not in commands:
            raise ValueError(f"there is no {words[0]!r}: take one of {names}{perhaps(words[0], commands)}")
        if words[0] in commands and "--print_shtab" not in words:
            options_class, command, text, example = commands[words[0]]
            name = f"{program} {words[0]}"
            return command, parse_options(options_class, text, words[1:], example, program=name)
        # only to print something, or to refuse what was said: parse_args does not return
        parser = Parser(program, description)
        parser.usage = f"{program} {{{','.join(commands)}}} [options]"
        added = parser.add_subcommands(dest="subcommand", title="subcommands")
        for name, (options_class, _, text, example) in commands.items():
            sub_parser = Parser(f"{program} {name}", text, options_class, example)
            added.add_subcommand(name, sub_parser, help=text.split(". ")[0].rstrip(".") + ".")
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
    """The options from the command line and from the file that ``--config`` names; the command line wins."""
    parser = Parser(program or Path(sys.argv[0]).name, description, options_class, example, presets)
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
        # of the libraries that the results depend on
        versions = [f"{library} {importlib.metadata.version(library)}" for library in ("torch", "diffusers")]
        print(f"imagenet64-diffusion {__version__} ({', '.join(versions)}, Python {platform.python_version()})")
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
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file} is neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"--config {file} is {str(entries)[:80]!r}, but must hold options and their values")
    for option_name, value in entries.items():
        if option_name not in kinds:
            raise ValueError(f"--config {file} names {option_name!r}, which is no option{perhaps(option_name, kinds)}")
        entries[option_name] = kinds[option_name].from_file(value, f"--config {file}: {option_name}")
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
        listed = f"{{{','.join(self.choices)}}}" if self.choices else _METAVARS.get(self.value)
        self.metavar = metadata.get("metavar", listed)
        self.count = metadata.get("nargs", "+") if self.several else None

    def refusal(self, value: Any) -> str:
        kind = _one_of(self.choices, value) if self.choices else _ONE[self.value]
        if self.several and not self.choices:
            kind = f"{'one or more' if self.count == '+' else self.count} {_SEVERAL[self.value]}"
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
        shown = repr(value) if isinstance(value, str) else text
        return f"is {shown if len(shown) <= 80 else shown[:80] + '...'}, but must be {kind}"

    def from_file(self, value: Any, name: str) -> Any:
        """A value of a file: one does as a list of one, a whole number as text, and text as a number."""
        if value is None and self.optional:
            return None
        values = value if self.several and isinstance(value, list) else [value]
        # YAML takes 5e-3 for text
        convertible = {float: (int, str), str: (int,)}.get(self.value, ())
        with contextlib.suppress(ValueError):
            values = [self.value(entry) if type(entry) in convertible else entry for entry in values]
        are_right = all(type(entry) is self.value and entry in (self.choices or values) for entry in values)
        if not values or self.count not in ("+", None, len(values)) or not are_right:
            is_other = self.value is str and not self.choices and not isinstance(value, (list, dict))
            raise ValueError(f"{name} {self.refusal(value)}{': put it in quotes' if is_other else ''}")
        return values if self.several else values[0]


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser of a dataclass of options, with help and errors of our own: one sentence, a ValueError."""

    def __init__(
        self, program: str, description: str, options_class: Any = None, example: str = "", presets: Path | None = None
    ):
        epilog = EXIT_CODES
        if example:
            called = f"{'python ' if program.split()[0].endswith('.py') else ''}{program} {example}"
            epilog = "Example:\n\n    " + called.replace("\n", " \\\n        ") + f"\n\n{EXIT_CODES}"
        texts: dict[str, Any] = {"prog": program, "description": description, "epilog": epilog}
        super().__init__(formatter_class=_HelpFormatter, add_help=False, allow_abbrev=False, **texts)
        self.kinds: dict[str, _Kind] = {}
        self.usage = f"{program} [options]"
        if options_class is not None:
            self._add_options(options_class)
        group = self.add_argument_group("general")
        group.add_argument("-h", "--help", action="help", help="Show this text and end.")
        version = "Show the versions of this program and its libraries."
        group.add_argument("--version", action="version", help=version, version="")
        if options_class is not None:
            # jsonargparse adds --print_config where it is told so, else beside the groups
            group._print_config = "--print_config"  # type: ignore[attr-defined]
            known = "".join(f", {path.stem}" for path in sorted(presets.glob("*.yaml"))) if presets else ""
            config = f"YAML or JSON file of options{known and ', or one of ' + known[2:]}; the command line wins."
            group.add_argument("--config", action=jsonargparse.ActionConfigFile, metavar="FILE", help=config)
            printing = self._option_string_actions["--print_config"]
            printing.help = "Print all options as a YAML file for --config, and end."
        nothing: dict[str, Any] = {"dest": argparse.SUPPRESS, "default": argparse.SUPPRESS, "metavar": "SHELL"}
        shells = "Print completions for bash, zsh, fish or tcsh, and end."
        group.add_argument("--print_shtab", action=_PrintCompletion, help=shells, **nothing)

    def _add_options(self, options_class: type) -> None:
        hints, own = typing.get_type_hints(options_class), options_class.__annotations__
        fields = dataclasses.fields(options_class)
        required = {f.name for f in fields if f.default is f.default_factory}
        groups: dict[str, Any] = {}
        usage = self.prog
        # what must be said comes first, then what a base class does not have
        for item in sorted(fields, key=lambda f: (f.name not in required, f.name not in own)):
            title = item.metadata.get("group", "options")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            kind = self.kinds[item.name] = _Kind(hints[item.name], item.metadata)
            described: dict[str, Any] = {"help": item.metadata["help"], "default": item.default}
            if item.name in required:
                described |= {"default": None, "required": True}
                usage += f" --{item.name} {kind.metavar}"
            elif item.default_factory is not dataclasses.MISSING:
                described["default"] = item.default_factory()
            if kind.value is bool:
                described |= {"action": jsonargparse.ActionYesNo, "nargs": "?"}
            else:
                value: Any = Literal[kind.choices] if kind.choices else kind.value
                described |= {"type": value | None if kind.optional else value, "metavar": kind.metavar}
                described |= {"nargs": kind.count} if kind.several else {}
            groups[title].add_argument(f"--{item.name}", **described)
        # argparse wraps only a usage that it has made itself
        indent, width = " " * len("usage: "), shutil.get_terminal_size().columns
        wrapped = textwrap.fill(f"usage: {usage} [options]", width, subsequent_indent=indent, break_on_hyphens=False)
        self.usage = wrapped.removeprefix("usage: ").replace("%", "%%")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises ValueError with the message as one sentence that names the option and the nearest name."""
        message = re.sub(r"^argument (--\w+)\S*:", r"\1:", " ".join(str(message).split()))
        if found := re.search(r'(?:Parser key "|^--)(\w+).*?[Vv]alue: (.*)$', message):
            name, value = found.groups()
            message = f"{name} {self.kinds[name].refusal(value[1:-1] if value.startswith(chr(39)) else value)}"
        elif found := re.search(r"unrecognized arguments: (.*)|Option '([^']*)' is not accepted", message):
            words = (found[1] or f"--{found[2]}").split()
            name = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
            spelled = [text for text in self._option_string_actions if text.startswith("--")]
            near = perhaps("--" + name[2:].replace("-", "_"), spelled) if name else ""
            message = f"unrecognized arguments: {' '.join(words)}{near}"
        elif found := re.search(r"the following arguments are required: (.*)", message):
            message = f"the following arguments are required: --{found[1].replace(', ', ', --')}"
        raise ValueError(message) from ex


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
        names = action.option_strings
        if isinstance(action, jsonargparse.ActionYesNo) or names == ["--print_config"]:
            return ", ".join(names if action.default in (True, None) else names[:1])
        return super()._format_action_invocation(action)

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
