"""The parser behind every command line: HfArgumentParser with named groups, tidy help, files of options, near names.

It is a module of its own because it imports transformers, for which ``--version`` need not wait.
"""

import argparse
import dataclasses
import json
import math
import re
import shutil
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser

from .nearest_names import perhaps


_METAVARS = {int: "N", float: "X", str: "TEXT"}
_ONE = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "words"}
# of a value in an error
_MOST_CHARACTERS = 80


@dataclasses.dataclass(frozen=True)
class OptionType:
    """What values an option takes.

    Attributes:
        value: The type of one value: bool, int, float or str.
        optional: Whether it may have none.
        several: Whether it takes a list of values.
        count: How many values the list has; None for one or more.
        choices: What a value must be one of; empty where it may be anything.
    """

    value: type
    optional: bool = False
    several: bool = False
    count: int | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(cls, hint: Any, metadata: Mapping[str, Any]) -> "OptionType":
        """The type of a field of a dataclass of options, from its type hint and metadata."""
        optional = False
        if typing.get_origin(hint) in (typing.Union, types.UnionType):
            optional = True
            (hint,) = (argument for argument in typing.get_args(hint) if argument is not type(None))
        several = typing.get_origin(hint) is list
        if several:
            (hint,) = typing.get_args(hint)
        choices = tuple(metadata.get("choices", ()))
        if typing.get_origin(hint) is Literal:
            hint, choices = str, typing.get_args(hint)
        return cls(hint, optional, several, metadata.get("nargs"), choices)

    def __str__(self) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return f"{self.count or 'one or more'} {_SEVERAL[self.value]}" if self.several else _ONE[self.value]

    def refusal(self, value: Any) -> str:
        """What is wrong with a value, as the end of a sentence that the option's name begins."""
        hint = ""
        if isinstance(value, str) and self.choices:
            hint = perhaps(value, self.choices)
        elif isinstance(value, str) and self.value is float and not self.several:
            hint = _as_yaml_number(value)
        elif self.value is str and (isinstance(value, (bool, float)) or (value is None and self.several)):
            hint = ": put it in quotes"
        return f"is {_shown(value)}, but must be {self}{hint}"

    def take(self, value: Any) -> Any:
        """The value as the option holds it.

        What a file says is held to what a command line can say: a whole number does as a number and as text, and one
        value does as a list of one. Nothing else is turned into another type.

        Raises:
            ValueError: If the option does not take it; the message is `refusal`'s.
        """
        if value is None and self.optional:
            return None
        if not self.several:
            return self._take_one(value)
        values = value if isinstance(value, list) else [value]
        if not values or self.count not in (None, len(values)):
            raise ValueError(self.refusal(value))
        return [self._take_one(entry) for entry in values]

    def _take_one(self, value: Any) -> Any:
        # True is an int to Python
        if self.value in (float, str) and type(value) is int:
            value = self.value(str(value))
        if type(value) is not self.value or (self.choices and value not in self.choices):
            raise ValueError(self.refusal(value))
        return value


def _shown(value: Any) -> str:
    """A value as files of options write it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, (str, int, float, list, dict)) else str(value)
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + "..."


def _as_yaml_number(text: str) -> str:
    """How YAML wants a number that it took for text: 5e-3 has neither a point nor a sign where it looks for them."""
    try:
        number = float(text)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    written = repr(number)
    return f": write {written if '.' in written else written.replace('e', '.0e')}"


def _wrapped(parts: Sequence[str]) -> str:
    """The parts of a usage, on lines that fit the terminal; argparse wraps only what it has made itself."""
    lines, start = [parts[0]], len("usage: ")
    for part in parts[1:]:
        if start + len(lines[-1]) + 1 + len(part) < shutil.get_terminal_size().columns:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return f"\n{' ' * start}".join(lines)


class _HelpFormatter(argparse.HelpFormatter):
    """One spelling of each option, its default where its text does not speak of it, indented text as it is."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog, **{"max_help_position": 32, **options})

    def add_argument(self, action: argparse.Action) -> None:
        # the option without its no_ speaks of both
        if not (action.const is False and action.nargs == 0):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        if action.nargs == 0:
            return ", ".join(action.option_strings)
        if action.const is True:
            return f"{name}, --no_{action.dest}" if action.default else name
        return f"{name} {self._format_args(action, action.dest.upper())}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        return "\n\n".join(
            paragraph
            if paragraph.startswith(" ")
            else super(_HelpFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default is False or default in (None, [], "", argparse.SUPPRESS) or "default" in text.lower():
            return text
        if isinstance(default, list):
            shown = " ".join(map(str, default))
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
        return f"{text} (default: {shown.replace('%', '%%')})"


class OptionParser(HfArgumentParser):
    """The parser of a dataclass of options, whose fields' metadata says what `command_line.option` documents.

    Args:
        options_class: The dataclass.
        program: What the help calls the command.
        description: What it does.
        epilog: What stands at the end of the help; indented paragraphs stay as they are.
        version: What ``--version`` says.
        presets: Folder of files of options that ``--config`` also takes by their names.
    """

    def __init__(
        self,
        options_class: type,
        program: str,
        description: str,
        epilog: str = "",
        version: str = "",
        presets: Path | None = None,
    ):
        hints = typing.get_type_hints(options_class)
        self._types: dict[str, OptionType] = {}
        self._required: list[str] = []
        self._presets = presets
        groups: dict[str, list[tuple[str, Any, Any]]] = {}
        usage = [program]
        for field in dataclasses.fields(options_class):
            metadata = dict(field.metadata)
            group = groups.setdefault(metadata.pop("group", "options"), [])
            kind = self._types[field.name] = OptionType.of(hints[field.name], metadata)
            has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if metadata.pop("required", not has_default):
                # a file may give it too, so that argparse cannot say what is missing
                self._required.append(field.name)
                usage.append(f"--{field.name} {metadata.get('metavar', _METAVARS[kind.value])}")
                default: dict[str, Any] = {"default": None}
            else:
                default = {"default": field.default, "default_factory": field.default_factory}
            if kind.value is bool:
                # the others do without a value
                if kind.optional:
                    metadata.setdefault("metavar", "{true,false}")
            elif not kind.choices:
                metadata.setdefault("metavar", _METAVARS[kind.value])
            entry = (field.name, hints[field.name], dataclasses.field(**default, metadata=metadata, kw_only=True))
            group.append(entry)
        # what must be said comes first
        for group in groups.values():
            group.sort(key=lambda entry: entry[0] not in self._required)
        headings = sorted(groups, key=lambda title: groups[title][0][0] not in self._required)
        super().__init__(
            # HfArgumentParser makes a group of each dataclass that has this name in it
            [
                dataclasses.make_dataclass("Group", groups[title], namespace={"_argument_group_name": title})
                for title in headings
            ],
            prog=program,
            usage=_wrapped([*usage, "[options]"]).replace("%", "%%"),
            description=description,
            epilog=epilog,
            formatter_class=_HelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        for action in self._actions:
            if action.dest in self._types and self._types[action.dest].count is not None:
                # HfArgumentParser lets every list be of any length
                action.nargs = self._types[action.dest].count
        general = self.add_argument_group("general")
        general.add_argument("-h", "--help", action="help", help="Show this text and end.")
        general.add_argument(
            "--version", action="version", version=version, help="Show the versions of this program and its libraries."
        )
        names = f", or one of {', '.join(self._preset_names())}" if presets is not None else ""
        general.add_argument(
            "--config", metavar="FILE", help=f"YAML or JSON file of options{names}; the command line wins."
        )

    def parse(self, arguments: Sequence[str]) -> dict[str, Any]:
        """The value of each option, from the command line and from the file that ``--config`` names.

        Raises:
            ValueError: If the file cannot be read, names an unknown option or has a value that the option cannot take.
            SystemExit: If the command line cannot be parsed, with the code 2; after ``--help`` with 0.
        """
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        config = finder.parse_known_args(arguments)[0].config
        if config is not None:
            self.set_defaults(**self._read(self._find(config)))
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            name = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
            near = perhaps("--" + name[2:].replace("-", "_"), self._option_names()) if name else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
        values = {name: getattr(namespace, name) for name in self._types}
        missing = [f"--{name}" for name in self._required if values[name] is None]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return values

    def error(self, message: str) -> NoReturn:
        """Ends the process with the code 2, after the usage and the message."""
        self.print_usage(sys.stderr)
        # argparse names every spelling of an option
        message = re.sub(r"^argument (--\w+)\S*:( is)?", lambda match: match[1] + (match[2] or ":"), message)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            kind = dataclasses.replace(self._types[action.dest], several=False)
            raise argparse.ArgumentError(action, f"is {arg_string!r}, but must be {kind}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, self._types[action.dest].refusal(value))

    def _option_names(self) -> list[str]:
        return [f"--{name}" for name in (*self._types, "config", "version", "help")]

    def _preset_names(self) -> list[str]:
        return [] if self._presets is None else sorted(file.stem for file in self._presets.glob("*.yaml"))

    def _find(self, config: str) -> Path:
        file = Path(config)
        if file.is_file():
            return file
        names = self._preset_names()
        if self._presets is not None and config in names:
            return self._presets / f"{config}.yaml"
        known = f", and it is none of {', '.join(names)}{perhaps(config, names)}" if names else ""
        raise ValueError(f"--config is {config}, but there is no such file{known}")

    def _read(self, file: Path) -> dict[str, Any]:
        """The options that a file gives."""
        values = _read_mapping(file)
        for name, value in values.items():
            if name not in self._types:
                raise ValueError(f"--config {file} names {name!r}, which is not an option{perhaps(name, self._types)}")
            try:
                values[name] = self._types[name].take(value)
            except ValueError as error:
                raise ValueError(f"--config {file}: {name} {error}") from error
        return values


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {file} is not text: {error}") from error
    if file.suffix in (".yaml", ".yml"):
        import yaml

        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--config {file} is not YAML: {' '.join(str(error).split())}") from error
    else:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"--config {file} holds {found}, but must hold options and their values")
    return values
