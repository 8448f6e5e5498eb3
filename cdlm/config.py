"""Names to objects: the settings of a run, and the constructor texts of rules, solvers, grids and masks."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cdlm import halting
from cdlm.continuous.grids import Grid, LogT, UniformT, UpperEnds, Warped
from cdlm.continuous.projections import Drawn, Expectation, Greedy, MultiHot, Projection, Uneven
from cdlm.continuous.published.langflow import LangFlowLayout
from cdlm.continuous.published.layout import Layout
from cdlm.continuous.published.plaid import PlaidLayout
from cdlm.continuous.published.ssd import SSDLayout
from cdlm.continuous.solvers import Ancestral, Euler, Heun, Renoise, Solver, TorchDiffEq
from cdlm.continuous.systems import SYSTEMS as CONTINUOUS
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.errors import CdlmError
from cdlm.data.masking import Block, Completion, Masking, Mixture, Prefix, RandomSubset, Span, Unconditional
from cdlm.data.sources import SOURCES, Source, Stories
from cdlm.halting import Criterion, Never
from cdlm.masked.policies.confidence import Factor, Threshold
from cdlm.masked.policies.dream import Dream, DreamThreshold
from cdlm.masked.policies.entropy import EntropyBound
from cdlm.masked.policies.klass import KLASS
from cdlm.masked.policies.llada import LLaDA
from cdlm.masked.policies.policy import Policy
from cdlm.masked.system import SYSTEMS as MASKED
from cdlm.models import hub
from cdlm.models.system import Special, System, SystemConfig
from cdlm.training.options import TrainOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")
Names = Mapping[str, Callable[..., Any]]


def _names(*objects: Callable[..., Any]) -> Names:
    return MappingProxyType({o.__name__: o for o in objects})


_rules = [o for o in vars(halting).values() if isinstance(o, type) and not inspect.isabstract(o)]
RULES: Mapping[str, type[Criterion]] = MappingProxyType(
    {rule.__name__: rule for rule in (halting.Patience, *_rules)}  # the first is the example of messages
)
POLICIES: Mapping[str, type[Policy]] = MappingProxyType(
    {p.__name__: p for p in (LLaDA, Dream, DreamThreshold, Threshold, Factor, EntropyBound, KLASS)}
)
SOLVERS = _names(Euler, Heun, TorchDiffEq, Ancestral, Renoise)
GRIDS = _names(Warped, UniformT, LogT, UpperEnds)
PROJECTIONS = _names(Expectation, Greedy, Drawn, MultiHot, Uneven)
MASKINGS = _names(Prefix, RandomSubset, Span, Unconditional, Block, Completion, Mixture)
SYSTEMS: Mapping[str, type[SystemConfig]] = MappingProxyType({**CONTINUOUS, **MASKED})
"""Systems that can be trained, by their name in config.json."""
LAYOUTS: Mapping[str, type[Layout]] = MappingProxyType(
    {"plaid": PlaidLayout, "ssd": SSDLayout, "langflow": LangFlowLayout}
)

DEFAULT_MASKING = "Mixture(((0.4, Prefix()), (0.4, RandomSubset()), (0.2, Unconditional())))"


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Args:
        source: the text: Stories, Arithmetic, Stdlib, Files or Hub, with its settings.
        system: the model: CDCD, Plaid, SSD, LangFlow or Masked, with its settings.
        tokenizer: name or folder of a Hugging Face tokenizer; by default a byte-level BPE is trained on the text.
        vocab_size: tokens of the BPE that is trained.
        length: positions of a row.
        rows: pack joins documents and cuts rows from them; document gives each its own row, filled too, with the
            end-of-text token as text up to the row's end, so that the model learns where to end.
        masking: which positions are to be generated, as a constructor text.
        batch_size: rows of a batch, per process.
        validation_rows: held-out rows that are scored at each validation.
        preview: samples that are written at each validation.
        workers: processes that read data; 0 reads in the training process.
        cache: folder of tokenised data.
        training: how to train.
    """

    source: Source = field(default_factory=Stories)
    system: SystemConfig = field(default_factory=CDCD)
    tokenizer: str | None = None
    vocab_size: int = 480
    length: int = 64
    rows: Literal["pack", "document", "filled"] = "pack"
    masking: str = DEFAULT_MASKING
    batch_size: int = 64
    validation_rows: int = 256
    preview: int = 4
    workers: int = 0
    cache: str = "~/.cache/cdlm"
    training: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        for name in ("length", "batch_size", "validation_rows"):
            if getattr(self, name) < 1:
                raise CdlmError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("preview", "workers"):
            if getattr(self, name) < 0:
                raise CdlmError(f"{name} must be >= 0, got {getattr(self, name)}")
        law, block = masking(self.masking), getattr(self.system, "block", None)
        if block is None:
            return
        if block > self.length:
            raise CdlmError(f"a block of {block} does not fit into rows of {self.length}: lower block or raise length")
        if block not in law.blocks:
            raise CdlmError(
                f"a system that generates blocks of {block} learns it with that law, masking Block({block}), and got"
                f" {self.masking}"
            )

    def to_yaml(self) -> str:
        """The settings as a YAML file, which `read_run` and `--config` read back."""
        import yaml

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: class_values(values[name]) for name in ("source", "system")}
        values["training"] = asdict(self.training)
        return yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=120)


def criterion(rule: str | Criterion | None) -> Criterion:
    """A halting rule from its text, such as `For(NormConvergence(0.01), 5) | Patience(20)`; None never halts."""
    if rule == "auto":
        raise CdlmError("auto is a rule that was calibrated for a model and its sampler: here, name the rule itself")
    return Never() if rule is None else _object(rule, Criterion, RULES, "halting rule")


def policies(text: str) -> list[Policy]:
    """A policy, or the settings to try of one that is only named, from strict to loose."""
    kind = POLICIES.get(text.strip())
    return [policy(text)] if kind is None else list(kind.sweep())


def sweep(text: str, budget: int) -> list[Criterion]:
    """Settings of a rule to try on runs of `budget` steps, from strict to loose.

    `Patience` and `Patience(...)` are the settings of the rule itself; other parameters stay, `KL(..., warmup=0.3)`,
    and so does what stands around it, `FromStep(Patience(...), 40)`. A text without `...` is one rule.
    """
    text = text.strip()
    if text in RULES:
        text += "(...)"
    calls = [node for node in ast.walk(_tree(text, RULES, "halting rule")) if isinstance(node, ast.Call)]
    holes = [call for call in calls if any(isinstance(a, ast.Constant) and a.value is ... for a in call.args)]
    if not holes:
        return [criterion(text)]
    if len(holes) > 1 or len(holes[0].args) > 1:
        raise CdlmError(f"one rule at a time can be swept, and ... stands for all that is: got {text!r}")
    name, fixed = ast.unparse(holes[0].func), holes[0].keywords
    if name not in RULES:
        raise _unknown(name, RULES, "halting rule")
    try:
        rules = RULES[name].sweep(budget, **{str(k.arg): _build(k.value, RULES, "halting rule") for k in fixed})
    except TypeError as error:
        raise CdlmError(f"cannot sweep {text!r} ({error}): it is {_example(RULES, name)}") from error
    start, end = holes[0].col_offset, holes[0].end_col_offset
    return [criterion(text[:start] + repr(rule) + text[end:]) for rule in rules]


def policy(text: str | Policy) -> Policy:
    """An unmasking policy from its text, such as `LLaDA(steps=64, block=32)` or `Threshold(0.9, block=32)`."""
    if isinstance(text, str) and text.strip() in POLICIES:
        text = f"{text.strip()}()"
    return _object(text, Policy, POLICIES, "unmasking policy")


def solver(text: str | Solver) -> Solver:
    """A solver from its text, such as `Heun()` or `TorchDiffEq("dopri5")`."""
    return _object(text, Solver, SOLVERS, "solver")


def grid(text: str | Grid) -> Grid:
    """A grid from its text: `Warped()`, `LogT()` or `UniformT()`."""
    return _object(text, Grid, GRIDS, "grid")


def layout(name: str) -> Layout:
    """A published file format by its name."""
    if name not in LAYOUTS:
        raise _unknown(name, LAYOUTS, "published format")
    return LAYOUTS[name]()


def projection(text: str | Projection) -> Projection:
    """A projection from its text, such as `MultiHot(0.2)`."""
    return _object(text, Projection, PROJECTIONS, "projection")


def masking(text: str | Masking) -> Masking:
    """A masking law from its text, such as `Mixture(((0.5, Prefix()), (0.5, RandomSubset())))`."""
    return _object(text, Masking, MASKINGS, "masking law")


def run_parser(prog: str) -> ArgumentParser:
    """A parser of the settings of a run, from the command line and from YAML files."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of --training.* stands there
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    return parser


def parse_run(argv: list[str], prog: str = "cdlm train") -> RunConfig:
    """The configuration that the arguments of a command line describe. `--config` may also be the YAML itself.

    Raises:
        CdlmError: an argument or a value is not known.
    """
    from jsonargparse import ArgumentError

    argv = [_today(word) if last == "--config" else word for last, word in zip(["", *argv], argv, strict=False)]
    try:
        parser = run_parser(prog)
        named = parser.parse_args(argv)
        # A class that is named would keep the default class's values of the settings that both have. So the classes are
        # found out first, and the settings read again, each from its own defaults.
        parser = run_parser(prog)
        parser.set_defaults({key: {"class_path": named[key].class_path} for key in ("source", "system")})
        settings = parser.parse_args(argv)
        values = {key: value for key, value in vars(parser.instantiate(settings)).items() if key != "config"}
        return RunConfig(**values)
    except ArgumentError as error:
        message = str(error.message or error)
        wrong = re.search(r'key "(source|system)":\s+Expected a dot import path string: (\w+)', message)
        if wrong:
            raise _unknown(wrong[2], _names(*_classes(wrong[1])), wrong[1]) from error
        raise CdlmError(f"{message} ({prog} --help lists the settings)") from error


def _classes(setting: str) -> list[type[Any]]:
    """What may stand in a setting of `RunConfig` that is a choice of classes."""
    return list(SYSTEMS.values()) if setting == "system" else list(SOURCES)


def class_values(value: Any) -> dict[str, Any]:
    """A source or a system as it stands in a file: its class, without a module if it is one of ours, and settings."""
    kind = type(value)
    name = kind.__name__ if kind in (*SOURCES, *SYSTEMS.values()) else f"{kind.__module__}.{kind.__qualname__}"
    return {"class_path": name, "init_args": asdict(value)}


@cache
def _dumper() -> type[Any]:
    """A YAML dumper that quotes every text that the parser of settings would take for something else."""
    import yaml
    from jsonargparse import get_loader

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        try:
            plain = get_loader("yaml")(value) == value
        except yaml.YAMLError:
            plain = False
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if plain else '"')

    Dumper.add_representer(str, text)
    return Dumper


def _today(config: str) -> str:
    """The settings of a file of an earlier version under the names of today; other files as they are."""
    import yaml

    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return config  # the parser says what is wrong with it
    if not isinstance(values, dict):
        return config
    parts = {name: _renamed(values[name]) for name in ("source", "system") if isinstance(values.get(name), dict)}
    changed = any(part != values[name] for name, part in parts.items())
    return json.dumps(values | parts) if changed else config


def _renamed(part: dict[str, Any]) -> dict[str, Any]:
    """A class and its settings: the class without its module, which may have moved, and the settings' new names."""
    if "class_path" not in part:
        return {hub.RENAMED.get(name, name): value for name, value in part.items()}
    path, settings = str(part["class_path"]), part.get("init_args") or {}
    name = path.rpartition(".")[2] if path.startswith("cdlm.") else path
    return {**part, "class_path": name, "init_args": _renamed(settings)}


def read_run(folder: str | Path) -> RunConfig:
    """The configuration of a run folder, of this version or an earlier one.

    Raises:
        CdlmError: the folder is not that of a training run, or its settings are not known.
    """
    file = Path(folder) / "config.yaml"
    if not file.exists():
        raise CdlmError(f"{folder} has no config.yaml: expected the folder of a training run")
    return parse_run(["--config", str(file)])


def build_system(config: Mapping[str, Any]) -> System:
    """The system that a `config.json` describes, with fresh weights."""
    special = Special(config.get("mask_id"), config.get("eos_id"))
    return system_config(config).build(config["vocab"], special)


def system_config(config: Mapping[str, Any]) -> SystemConfig:
    """The settings of the system that a `config.json` describes."""
    settings = {key: value for key, value in config.items() if key not in ("mask_id", "eos_id")}
    name, vocab = settings.pop("system", None), settings.pop("vocab", None)
    if not isinstance(name, str) or name not in SYSTEMS:
        raise CdlmError(f"config.json asks for the system {name!r}: this version knows {', '.join(SYSTEMS)}")
    try:
        if not isinstance(vocab, int):
            raise TypeError(f"the size of the vocabulary is {vocab!r}")
        return SYSTEMS[name](**settings)
    except TypeError as error:
        raise CdlmError(f"config.json does not fit the system {name!r} of this version ({error})") from error


def _object(text: str | T, kind: type[T], names: Names, what: str) -> T:
    if isinstance(text, kind):
        return text
    result = parse(str(text), names, what)
    if not isinstance(result, kind):
        raise CdlmError(f"expected a {what}, got {text!r}: write one of {', '.join(names)} with its arguments")
    return result


def parse(text: str, names: Names, what: str) -> Any:
    """Objects from a constructor text, by a whitelist: known names called with literals, tuples, `&` and `|`.

    Nothing is evaluated: the text is only taken apart into its syntax tree.
    """
    return _build(_tree(text.strip(), names, what), names, what)


def _tree(text: str, names: Names, what: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CdlmError(
            f"cannot read the {what} {text[:60]!r}: write it like a call, for example {_example(names)}"
        ) from error


def _build(node: ast.expr, names: Names, what: str) -> Any:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Tuple() | ast.List():
            return tuple(_build(item, names, what) for item in node.elts)
        case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
            return _combine(node, names, what)
        case ast.Call(func=ast.Name()):
            return _call(node, names, what)
        case ast.Name(id=name) if name in names:
            raise CdlmError(f"{name} is written as a call in a {what}: {_example(names, name)}")
        case ast.Name(id=name):
            raise CdlmError(
                f"{_unknown(name, names, what)}, written as a call, for example {_example(names)}; a text stands in"
                " quotes"
            )
    raise CdlmError(f"the {what} may only hold calls, numbers, texts, &, | and commas, got {ast.unparse(node)!r}")


def _combine(node: ast.BinOp, names: Names, what: str) -> Any:
    left, right = _build(node.left, names, what), _build(node.right, names, what)
    if not (isinstance(left, Criterion) and isinstance(right, Criterion)):
        raise CdlmError(f"& and | join two halting rules, got {ast.unparse(node)!r}")
    return left & right if isinstance(node.op, ast.BitAnd) else left | right


def _call(node: ast.Call, names: Names, what: str) -> Any:
    name = node.func.id if isinstance(node.func, ast.Name) else ""
    if name not in names:
        raise _unknown(name, names, what)
    signature = inspect.signature(names[name])
    for keyword in node.keywords:
        if keyword.arg not in signature.parameters:
            known = list(signature.parameters)
            hint = _nearest(str(keyword.arg), known)
            raise CdlmError(f"{name} has no parameter {keyword.arg!r}{hint}: it is {name}{_plain(signature)}")
    arguments = [_build(item, names, what) for item in node.args]
    keywords = {str(k.arg): _build(k.value, names, what) for k in node.keywords}
    try:
        if len(keywords) < len(node.keywords):
            raise TypeError("a parameter is given twice")
        return names[name](*arguments, **keywords)
    except (TypeError, AttributeError) as error:  # also what a constructor says of a value of a wrong kind
        raise CdlmError(f"cannot build {ast.unparse(node)!r} ({error}): it is {name}{_plain(signature)}") from error


def _plain(signature: inspect.Signature) -> str:
    return str(signature.replace(return_annotation=inspect.Signature.empty)).replace("'", "")


def _unknown(name: str, names: Names, what: str) -> CdlmError:
    return CdlmError(f"there is no {what} {name!r}{_nearest(name, names)}: use one of {', '.join(names)}")


def _nearest(name: str, names: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], 1, 0.5)
    found = [n for n in names if n.lower() in close]
    return f" (did you mean {found[0]}?)" if found else ""


def _example(names: Names, name: str | None = None) -> str:
    name = name or next(iter(names))
    return f"{name}{_plain(inspect.signature(names[name]))}"
