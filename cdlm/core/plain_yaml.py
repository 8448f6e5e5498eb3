"""YAML as plain data: mappings, lists, texts, numbers, true, false and null; nothing in it grows or runs.

Everything that cdlm reads as YAML goes through here, so that a file from elsewhere is refused in one line if it holds a
tag, an anchor, an alias, a key twice, or more levels than settings have.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from cdlm.core.errors import CdlmError
from cdlm.core.files import reading

LARGEST = 2**20
"""Bytes of a file of settings."""
DEEPEST = 32
"""Levels of mappings and lists."""
_PLAIN_TAGS = {
    None,
    "!",
    *(f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null")),
}
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
)


def read_mapping(file: Path, of: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        of: what it holds, for the error, such as "settings of a run".

    Raises:
        CdlmError: it cannot be read, or it is not a mapping of plain data.
    """
    place, advice = str(file)[:200], f"expected a YAML file of {of}"
    try:
        with reading(Path(place), advice, pipes=True), file.open("rb") as content:
            raw = content.read(LARGEST + 1)
            text = raw.decode("utf-8-sig")
    except ValueError as error:  # a NUL in its name
        raise CdlmError(f"{place!r} is no name of a file ({error}): {advice}") from error
    if len(raw) > LARGEST:
        raise CdlmError(f"{place} has more than {LARGEST:,} bytes: {advice}, which is short")
    return mapping_of(text, place, of)


def mapping_of(text: str, place: str, of: str) -> dict[str, Any]:
    """The mapping in a YAML text that comes from `place`.

    Raises:
        CdlmError: it is not a mapping of plain data.
    """
    try:
        values = load(text)
    except _error() as error:
        raise CdlmError(f"{place} cannot be read as YAML ({explained(error)}); mend it, or copy it again") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CdlmError(
            f"{place} holds no names with values: expected {of}, one 'name: value' a line; write it, or copy it again"
        )
    return values


def load(text: str) -> Any:
    """The plain data of a YAML text.

    Raises:
        yaml.YAMLError: it holds something else; `explained` says what, in a few words.
    """
    import yaml

    try:
        _check(text)
        return yaml.load(text, Loader=loader())  # a safe loader, of nothing but plain data
    except (ValueError, RecursionError, MemoryError) as error:  # half a surrogate pair, a number of 5,000 digits
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def explained(error: Exception) -> str:
    """What is wrong with a YAML text, in one line."""
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f", line {mark.line + 1}"
    return " ".join(str(getattr(error, "problem", None) or error).split())[:200] + place


@cache
def loader() -> type[Any]:
    """The safe loader, with the numbers of YAML 1.2 (1e-3, and no 1:30) and without dates."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set[str]()
            for name in (key.value for key, _ in node.value if isinstance(key.value, str)):
                if name in seen:
                    raise _odd(f"{name[:40]!r} stands there twice", node.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            value = super().construct_yaml_int(node)
            if value.bit_length() > 64:
                raise _odd(f"a whole number of {value.bit_length()} bits, more than 64", node.start_mark)
            return value

    left_out = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp", "merge")]
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag not in left_out]
        for first, known in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", _WHOLE, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
    return Loader


def _check(text: str) -> None:
    """Look through the events of a text, before anything is made of them."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=loader()):
        odd = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            odd = "anchors (&) and aliases (*) are not read: write the value out"
        elif getattr(event, "tag", None) not in _PLAIN_TAGS:
            odd = "tags (!) other than those of plain data are not read"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            odd = f"more than {DEEPEST} levels" if depth > DEEPEST else None
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if odd:
            raise _odd(odd, event.start_mark)


def _odd(problem: str, mark: Any) -> Exception:
    import yaml

    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _error() -> type[Exception]:
    import yaml

    return yaml.YAMLError
