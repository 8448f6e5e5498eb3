"""Bad arguments of what is written as a call: rules, policies, solvers, grids and the like."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

from hostile.trials import Trial

from cdlm.continuous.grids import GRIDS
from cdlm.continuous.projections import PROJECTIONS
from cdlm.continuous.solvers import SOLVERS
from cdlm.core.parsing import Registry
from cdlm.data.masking import MASKINGS
from cdlm.data.sources import SOURCES
from cdlm.evaluation.metrics.features import FEATURES
from cdlm.evaluation.workloads import WORKLOADS
from cdlm.halting import RULES
from cdlm.policies import POLICIES
from cdlm.runs.config import SYSTEMS

REGISTRIES: tuple[Registry[Any], ...] = (RULES, POLICIES, SOLVERS, GRIDS, PROJECTIONS, MASKINGS, WORKLOADS, FEATURES)
BUILT: tuple[Registry[Any], ...] = (SOURCES, SYSTEMS)
"""Classes whose settings come from files and the command line, not as a call."""
ODD: Mapping[str, Any] = {
    "minus one": -1, "zero": 0, "a huge number": 10**23, "a large number": 2**62, "not a number": math.nan,
    "infinity": math.inf, "minus infinity": -math.inf, "a float": 1.5, "a small float": 0.3, "two": 2, "truth": True,
    "nothing": None, "a text": "x", "an empty text": "", "a list": [], "a nested list": [[1]], "a mapping": {},
    "an object": object(), "bytes": b"x", "a class": int, "a function": len, "a complex number": 1j,
}  # fmt: skip


NEEDED: Mapping[str, Any] = {
    "steps": 3, "threshold": 0.5, "first": RULES.parse("Patience(3)"), "second": RULES.parse("Patience(3)"),
    "rule": RULES.parse("Patience(3)"), "grid": GRIDS.parse("LogT()"), "share": 0.5, "size": 4, "paths": ("a.txt",),
    "name": "user/data", "parts": ((1.0, MASKINGS.parse("Prefix()")),), "nats": 0.1, "delta": 0.1, "method": "rk4",
    "path": "runs/layer",
}  # fmt: skip
"""Good values of parameters that have no default."""
FROM_FILES = ("Learned", "Stop", "EDIT", "Guided")
"""Rules and policies whose constructors read a file."""
TEXTS = frozenset({"a text", "an empty text"})
LARGE = frozenset({"a large number", "a float", "a small float", "two", "infinity", "a huge number"})
SMALL = frozenset({"zero", "a small float"})


def parameters(made: type[Any]) -> Mapping[str, inspect.Parameter]:
    """What a class is called with."""
    return inspect.signature(made).parameters


def may_be_right(about: inspect.Parameter, kind: str) -> bool:
    """Whether an odd value is right for some parameter of this type, and ranges decide; elsewhere it is nonsense."""
    hint = str(about.annotation)
    right = {
        "str": TEXTS, "bool": {"truth"}, "float": LARGE | SMALL | {"minus one", "minus infinity"},
        "int": {"two", "zero", "minus one", "a large number"}, "None": {"nothing"}, "tuple": {"a list"},
    }  # fmt: skip
    return any(name in hint and kind in kinds for name, kinds in right.items())


def rule_trials() -> Iterator[Trial]:
    """Each odd value in place of each argument of each class."""
    for registry in (*REGISTRIES, *BUILT):
        for name, made in registry.items():
            known = parameters(made)
            given = {p: NEEDED[p] for p, about in known.items() if about.default is about.empty and p in NEEDED}
            for parameter, about in known.items() if name not in FROM_FILES else ():
                for kind, value in ODD.items():
                    call = lambda made=made, given={**given, parameter: value}: made(**given)  # noqa: E731
                    yield Trial(kind, f"{registry.what} {name}.{parameter}", call, not may_be_right(about, kind))


def text_trials() -> Iterator[Trial]:
    """Texts that are no calls, for each registry."""
    for registry in REGISTRIES:
        example = next(iter(registry))
        texts = {
            "nothing": "", "brackets": 10_000 * "(", "1,000 &": " & ".join(1000 * [f"{example}(2)"]),
            "a power": f"{example}(10**23)", "a name": example, "unknown": "Nope(1)", "a lambda": "lambda: 0",
            "an attribute": f"{example}.__class__", "a comprehension": "[x for x in ()]", "import": "__import__('os')",
            "two": f"{example}(1), {example}(1)", "a number": "5", "a text": "'x'", "a star": f"{example}(*[1])",
            "two stars": f"{example}(**{{}})", "an f-string": "f'{1}'", "a walrus": "(a := 1)",
            "half a character": "\ud800", "NUL": "a\0b", "a line": "a\nb", "deep minus": f"{example}({'-' * 5000}1)",
            "deep": "Never(" * 3000, "a million": "a" * 10**6, "deep lists": "[" * 3000 + "]" * 3000, "bytes": "b'x'",
            "a nested call": f"{example}({example}(1))", "twice": f"{example}(a=1, a=1)",
            "many arguments": f"{example}({', '.join(1000 * ['1'])})",
        }  # fmt: skip
        for kind, text in texts.items():
            yield Trial(kind, registry.what, lambda registry=registry, text=text: registry.parse(text))
        for kind, value in ODD.items():
            yield Trial(
                kind, f"{registry.what}, an object", lambda registry=registry, value=value: registry.parse(value)
            )
