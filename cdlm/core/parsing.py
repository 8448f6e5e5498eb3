"""Objects from constructor texts, such as `Patience(20)`: listed classes alone can be named; nothing is evaluated."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind, by the names that texts and messages use.

    Args:
        what: what one of them is called, such as "halting rule".
        kind: their base class. If it has `&` and `|`, a text may join two of them.
        classes: classes known by their own name; the first is the example of messages.
        named: classes known by another name.
    """

    def __init__(self, what: str, kind: type[T], *classes: type[T], **named: type[T]):
        self.what, self.kind = what, kind
        self._classes = {made.__name__: made for made in classes} | named

    def __getitem__(self, name: str) -> type[T]:
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            CdlmError: there is none; the message has the nearest name.
        """
        if name not in self._classes:
            raise self.unknown(name)
        return self._classes[name]

    def parse(self, text: str | T) -> T:
        """The object that a text describes: listed classes, called with literals and tuples. An object is returned.

        Raises:
            CdlmError: the text is anything else.
        """
        if isinstance(text, self.kind):
            return text
        if not isinstance(text, str):
            raise self._no(text)
        try:
            made = self.build(self.tree(text))
        except (RecursionError, MemoryError) as error:
            raise self._unreadable(text) from error
        if not isinstance(made, self.kind):
            raise self._no(text)
        return made

    def _no(self, value: object) -> CdlmError:
        return CdlmError(f"{shown(value)} is no {self.what}: write one of {', '.join(self)} with its arguments")

    def tree(self, text: str) -> ast.expr:
        """The syntax tree of a text."""
        try:
            return ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._unreadable(text.strip()) from error

    def build(self, node: ast.expr) -> Any:
        """The object, number, text or tuple that a part of a syntax tree describes."""
        match node:
            case ast.Constant(value=int() as value) if abs(value) >= 2**63:
                raise CdlmError(f"a number of a {self.what} is below 2**63, and one here has {value.bit_length()} bits")
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.Name(id="inf"):
                return math.inf
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return -value
            case ast.Tuple() | ast.List():
                return tuple(self.build(item) for item in node.elts)
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                return self._join(node)
            case ast.Call(func=ast.Name()):
                return self._call(node)
            case ast.Name(id=name) if name in self:
                raise CdlmError(f"{name} is written as a call in a {self.what}: {self.example(name)}")
            case ast.Name(id=name):
                raise CdlmError(
                    f"{self.unknown(name)}, written as a call, for example {self.example()}; a text stands in quotes"
                )
        raise CdlmError(
            f"the {self.what} may only hold calls, numbers, texts, &, | and commas, got {shown(ast.unparse(node))}"
        )

    def sweep(self, text: str, settings: Callable[..., Sequence[T]]) -> list[T]:
        """Settings of one object to try.

        `Patience` and `Patience(...)` are the settings of that class. The rest of the text stays as it is: other
        parameters, `KL(..., warmup=0.3)`, and what is around it, `FromStep(Patience(...), 40)`. A text without `...` is
        one object.

        Args:
            text: what to sweep.
            settings: gives those of a class with some of its parameters fixed.

        Raises:
            CdlmError: the text is wrong, the class has nothing to sweep, or two would be swept.
        """
        text = text.strip()
        if text in self:
            text += "(...)"
        whole = self.tree(text)
        calls = [node for node in ast.walk(whole) if isinstance(node, ast.Call)]
        holes = [call for call in calls if any(isinstance(a, ast.Constant) and a.value is ... for a in call.args)]
        if not holes:
            return [self.parse(text)]
        if len(holes) > 1 or len(holes[0].args) > 1:
            raise CdlmError(
                f"one {self.what} at a time can be swept, and ... stands for all of its settings: got {shown(text)}"
            )
        name, fixed = ast.unparse(holes[0].func), holes[0].keywords
        try:
            found = settings(self.find(name), **{str(k.arg): self.build(k.value) for k in fixed})
        except TypeError as error:
            raise CdlmError(f"cannot sweep {shown(text)} ({error}): it is {self.example(name)}") from error
        if holes[0] is whole:
            return list(found)
        hole = str(ast.get_source_segment(text, holes[0]))
        return [self.parse(text.replace(hole, repr(one))) for one in found]

    def unknown(self, name: str) -> CdlmError:
        """The error that nothing is called `name`, with the nearest name and all others."""
        return CdlmError(
            f"there is no {self.what} {shown(name)}{nearest(name[:80], self)}: use one of {', '.join(self)}"
        )

    def example(self, name: str | None = None) -> str:
        """How to call a class, by default the first: `Patience(steps: int)`."""
        name = name or next(iter(self))
        return f"{name}{_plain(inspect.signature(self[name]))}"

    def _unreadable(self, text: str) -> CdlmError:
        return CdlmError(f"cannot read the {self.what} {text[:60]!r}: write it like a call, such as {self.example()}")

    def _join(self, node: ast.BinOp) -> Any:
        if not hasattr(self.kind, "__and__"):
            raise CdlmError(f"a {self.what} cannot be joined with & or |, got {shown(ast.unparse(node))}")
        left, right = self.build(node.left), self.build(node.right)
        if not (isinstance(left, self.kind) and isinstance(right, self.kind)):
            raise CdlmError(f"& and | join two {self.what}s, got {shown(ast.unparse(node))}")
        return operator.and_(left, right) if isinstance(node.op, ast.BitAnd) else operator.or_(left, right)

    def _call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        made = self.find(name)
        signature = inspect.signature(made)
        for keyword in node.keywords:
            if keyword.arg not in signature.parameters:
                hint = nearest(str(keyword.arg), signature.parameters)
                raise CdlmError(f"{name} has no parameter {keyword.arg!r}{hint}: it is {name}{_plain(signature)}")
        arguments = [self.build(item) for item in node.args]
        keywords = {str(k.arg): self.build(k.value) for k in node.keywords}
        try:
            if len(keywords) < len(node.keywords):
                raise TypeError("a parameter is given twice")
            return made(*arguments, **keywords)
        except (TypeError, AttributeError) as error:  # a constructor that is given a value of a wrong kind
            raise CdlmError(
                f"cannot build {shown(ast.unparse(node))} ({error}): it is {name}{_plain(signature)}"
            ) from error


def brief(made: object) -> str:
    """The text of a dataclass with what is not its default, as `Registry.parse` reads it: `Threshold(tau=0.5)`.

    `digest`, which says what a file was when a rule or policy was set, is left out; other objects are their repr.
    """
    if not is_dataclass(made):
        return repr(made)
    given = [
        f"{field.name}={getattr(made, field.name)!r}"
        for field in fields(made)
        if field.init and field.name != "digest" and getattr(made, field.name) != field.default
    ]
    return f"{type(made).__name__}({', '.join(given)})"


def nearest(name: str, names: Collection[str]) -> str:
    """` (did you mean NAME?)` of the name that is most like it, or nothing if none is."""
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], 1, 0.5)
    found = [n for n in names if n.lower() in close]
    return f" (did you mean {found[0]}?)" if found else ""


def _plain(signature: inspect.Signature) -> str:
    return str(signature.replace(return_annotation=inspect.Signature.empty)).replace("'", "")
