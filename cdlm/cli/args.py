"""The command line of a function or dataclass: parameters are options, and frozen dataclasses are groups of options.

    def sample(run: str, prompts: Path | None = None, *, n: int = 8, machine: MachineOptions = MACHINE) -> None: ...

Parameters before the star are positional; those after it are options, `--batch-size` (or `--batch_size`) of
`batch_size`. A parameter whose type is a dataclass is a group: its fields are options under a heading, which is the
first line of its docstring, and its value is an instance. Helps are the texts of "Args:" sections and the docstrings of
fields.

Types: text, `Path`, numbers, `Literal` of texts, flags (`--quiet`, `--no-quiet`, `--quiet false`), lists of these
(`--steps 100 200`), each `| None`. Of a union with other classes (`str | Solver | None`) the command line has the text.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from docstring_parser import DocstringStyle, parse_from_object

from cdlm.core.checks import LARGEST
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_path
from cdlm.core.parsing import nearest

MISSING: Any = inspect.Parameter.empty
_OPTION = re.compile(r"(--[A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
_TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


class Parameter(NamedTuple):
    """One setting: an option, a positional, or a group if its type is a dataclass."""

    name: str
    hint: Any
    default: Any
    """`MISSING` if it must be given."""
    text: str
    """For the help."""
    positional: bool = False


class CommandParser(argparse.ArgumentParser):
    """Reads the arguments of a function.

    Args:
        call: the function, or a dataclass.
        prog: how it is called, such as "cdlm sample".
        defaults: over those of the signature, by name; what must be given may have its value here.
    """

    def __init__(self, call: Callable[..., Any], prog: str, defaults: Mapping[str, Any] | None = None):
        description, self._parameters = parameters(call)
        self._preset = dict(defaults or {})
        self._options: dict[str, str] = {}  # with the opposite of those that are flags
        self.members: dict[str, Parameter] = {}
        """Every setting by its name, those of groups too."""
        words = [prog, *(p.name if p.default is MISSING else f"[{p.name}]" for p in self._parameters if p.positional)]
        super().__init__(
            prog=prog, usage=" ".join([*words, "[settings]"]), description=_escaped(description), allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        groups = [parameter for parameter in self._parameters if _is_group(parameter.hint)]
        for parameter in self._parameters:
            if parameter not in groups:
                self.add(parameter)
        for group in groups:
            title, members = members_of(group)
            place = self.add_argument_group(title)
            for member in members:
                self.add(member, place)
        self._preset = self.read(defaults) if defaults else {}

    def add(self, parameter: Parameter, place: Any = None) -> None:
        """One more setting, in a group of argparse's or among the first."""
        self.members[parameter.name] = parameter
        place = self if place is None else place
        default = self._preset.get(parameter.name, parameter.default)
        settings = {**reading(parameter.hint), "help": _help(parameter.text, default)}
        if parameter.positional:
            settings.pop("metavar", None)
            if parameter.default is not MISSING:
                settings |= {"nargs": "*" if "nargs" in settings else "?", "default": None}
            place.add_argument(parameter.name, **settings)
            return
        made = place.add_argument(_option(parameter.name), dest=parameter.name, **settings).option_strings
        self._options |= dict(zip(made, reversed(made), strict=True)) if len(made) > 1 else {made[0]: ""}

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """What to call the function with; parameters that have a default and are not given are left out.

        Raises:
            CdlmError: the arguments do not fit.
        """
        return self.arguments(self.settings(argv))

    def settings(self, argv: Sequence[str]) -> dict[str, Any]:
        """The settings that the arguments name, with groups taken apart."""
        found, rest = self.parse_known_intermixed_args(list(self._plain(argv)))
        if rest:
            self.error(f"one word too many: {rest[0]!r}")
        return {name: v for name, v in vars(found).items() if v is not None or not self.members[name].positional}

    def read(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a mapping, such as that of a YAML file: numbers, texts, lists and None."""
        lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
        words = [f"--{name}={item}" for name, items in lists.items() for item in items if item is not None]
        found = self.settings(words)
        for name in settings.keys() - found.keys():  # None, and lists without items
            self._check_empty(name, settings[name])
            found[name] = settings[name]
        return found

    def arguments(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What to call the function with, of settings over the defaults."""
        given = {**self._preset, **settings}
        missing = [_option(p.name) for p in self.members.values() if p.default is MISSING and p.name not in given]
        if missing:
            self.error(f"{', '.join(missing)} must be given")
        return {p.name: value for p in self._parameters if (value := self._value(p, given)) is not MISSING}

    def error(self, message: str) -> Any:
        """Every refusal comes here."""
        raise CdlmError(f"{message} ({self.prog} --help lists the settings)")

    def _value(self, parameter: Parameter, given: Mapping[str, Any]) -> Any:
        if not _is_group(parameter.hint):
            return given.get(parameter.name, MISSING)
        own = {field.name: given[field.name] for field in fields(parameter.hint) if field.name in given}
        return parameter.hint(**own) if parameter.default is MISSING else replace(parameter.default, **own)

    def _check_empty(self, name: str, value: Any) -> None:
        option = _option(name)
        if name not in self.members:
            raise self._unknown(option)
        if value is None and types.NoneType not in get_args(self.members[name].hint):
            self.error(f"{option} needs a value")

    def _unknown(self, option: str) -> CdlmError:
        known = nearest(option, self._options)
        return CdlmError(f"{self.prog} has no setting {option}{known}: {self.prog} --help lists them")

    def _plain(self, argv: Sequence[str]) -> Iterator[str]:
        """The arguments with dashes in the names of options, and flags without their values."""
        rest = list(argv)
        while rest:
            word = rest.pop(0)
            match = _OPTION.fullmatch(word)
            if match is None or word == "--help":
                yield word
                continue
            name, value = match[1].replace("_", "-"), match[2]
            if name not in self._options:
                raise self._unknown(name)
            if opposite := self._options[name]:
                if value is None and rest and rest[0].lower() in _TRUTHS:
                    value = rest.pop(0)
                yield name if self._truth(name, value) else opposite
            elif value is None and (not rest or _OPTION.fullmatch(rest[0])):
                self.error(f"{name} needs at least one value")
            else:
                yield name if value is None else f"{name}={value}"

    def _truth(self, name: str, value: str | None) -> bool:
        if value is not None and value.lower() not in _TRUTHS:
            self.error(f"{name} is true or false, got {value!r}")
        return value is None or _TRUTHS[value.lower()]


def parameters(call: Callable[..., Any]) -> tuple[str, list[Parameter]]:
    """What a function or dataclass does, and its settings."""
    text, helps = documented(call)
    hints = get_type_hints(call)
    kind: Any = call
    if is_dataclass(kind):
        made = [Parameter(f.name, hints[f.name], _default(f), helps.get(f.name, "")) for f in fields(kind)]
    else:
        made = [
            Parameter(name, hints[name], p.default, helps.get(name, ""), p.kind is not p.KEYWORD_ONLY)
            for name, p in inspect.signature(call).parameters.items()
        ]
    return text, made


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def members_of(group: Parameter) -> tuple[str, list[Parameter]]:
    """The heading of a group, and its options with the defaults that they have in this command."""
    text, members = parameters(group.hint)
    if group.default is not MISSING:
        members = [member._replace(default=getattr(group.default, member.name)) for member in members]
    return text.split(". ")[0].rstrip("."), members


def documented(call: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The docstring without its sections, and the text of each parameter; a class has those of its bases too."""
    helps: dict[str, str] = {}
    classes = [c for c in reversed(call.__mro__) if is_dataclass(c)] if inspect.isclass(call) else [call]
    docstrings = [parse_from_object(part, style=DocstringStyle.GOOGLE) for part in classes]
    for docstring in docstrings:
        helps |= {p.arg_name: _one_line(p.description) for p in docstring.params if p.description}
    own = docstrings[-1]
    return " ".join(filter(None, (_one_line(own.short_description), _one_line(own.long_description)))), helps


def reading(hint: Any) -> dict[str, Any]:
    """How argparse reads values of a type.

    Raises:
        TypeError: nothing on the command line is a value of this type.
    """
    union = get_origin(hint) in (Union, types.UnionType)
    parts = [part for part in (get_args(hint) if union else [hint]) if part is not types.NoneType]
    known = {part: made for part in parts if (made := _reading_of(part))}
    if not known:
        raise TypeError(f"no value on the command line is a {hint}")
    found = known.get(str, next(iter(known.values())))
    if types.NoneType in get_args(hint) and found.get("type") in (_whole, _number):
        return {**found, "type": _or_none(found["type"])}
    return found


def _reading_of(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) in (list, tuple, Sequence):
        return {**reading(get_args(kind)[0]), "nargs": "+", "action": "extend"}
    simple: dict[Any, dict[str, Any]] = {
        bool: {"action": argparse.BooleanOptionalAction},
        str: {"type": str, "metavar": "TEXT"},
        Path: {"type": path_of, "metavar": "PATH"},
        int: {"type": _whole, "metavar": "N"},
        float: {"type": _number, "metavar": "X"},
    }
    return simple.get(kind, {})


def path_of(text: str) -> Path:
    """A path from a text that can be one."""
    try:
        check_path(text)
    except CdlmError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if abs(number) > LARGEST:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2**63, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from None


def _or_none(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads "none", the value of a number that may be left out, beside numbers."""
    return lambda text: None if text.lower() in ("none", "null") else read(text)


def _is_group(hint: Any) -> bool:
    return inspect.isclass(hint) and is_dataclass(hint)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(text: str, default: Any) -> str:
    """The text and the default, unless that is None: the text says what happens then."""
    text = text.rstrip(".")
    if default is None or default is MISSING or default is False:
        return _escaped(text)
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return _escaped(f"{text} (default: {shown})" if shown else text)


def _escaped(text: str) -> str:
    """For argparse, which formats it."""
    return text.replace("%", "%%")


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
