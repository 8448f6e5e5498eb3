"""The command line of a function: what arguments give, what is refused, and what the help lists."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm import studies
from cdlm.cli.args import CommandParser, reading
from cdlm.cli.commands import COMMANDS
from cdlm.cli.main import function_of, main, parser_of
from cdlm.cli.train import parser as train_parser
from cdlm.core.errors import CdlmError
from cdlm.studies.command import reader


class Solver:
    """Something that only Python can pass."""


@dataclass(frozen=True)
class Parent:
    """What is shared."""

    low: float = 0.0
    """The lower end."""


@dataclass(frozen=True)
class Ends(Parent):
    """The ends of a range. There are two."""

    high: float = 1.0
    """The upper end, 100% of it."""
    both_open: bool = False
    """Neither belongs to it."""

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise CdlmError(f"low must be <= high, got {self.low}")


@dataclass(frozen=True)
class Judge:
    """The judge."""

    judge: str | None = None
    """Its folder."""


ENDS, JUDGE = Ends(high=2.0), Judge()


def command(
    run: str,
    file: Path | None = None,
    *,
    n: int = 8,
    rate: float | None = 0.5,
    steps: list[int] | None = None,
    rules: Sequence[str] = ("A", "B"),
    cache: Literal["prefix", "dual"] | None = None,
    solver: str | Solver | None = None,
    places: list[Path] | None = None,
    mauve: bool = True,
    out_dir: Path = Path("out"),
    ends: Ends = ENDS,
    judge: Judge = JUDGE,
) -> None:
    """Do something.

    Or something else.

    Args:
        run: a folder, or
            a name.
        file: what is read.
        out_dir: where to.
    """


PARSER = CommandParser(command, "cdlm command")
PLAIN = {"run": "R", "ends": ENDS, "judge": JUDGE}


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ("R", {}),
        ("R F", {"file": Path("F")}),
        ("R --n 3 F", {"file": Path("F"), "n": 3}),
        ("--n=3 R F", {"file": Path("F"), "n": 3}),
        ("R --n -3", {"n": -3}),
        ("R --rate 1e-3", {"rate": 1e-3}),
        ("R --rate none", {"rate": None}),
        ("R --steps 100 200", {"steps": [100, 200]}),
        ("R --steps 100 --n 1 --steps 200", {"steps": [100, 200], "n": 1}),
        ("--steps=100 R", {"steps": [100]}),
        ("R --rules C", {"rules": ["C"]}),
        ("R --cache dual", {"cache": "dual"}),
        ("R --solver Heun()", {"solver": "Heun()"}),
        ("R --solver none", {"solver": "none"}),
        ("R --solver=--x", {"solver": "--x"}),
        ("R --places a b", {"places": [Path("a"), Path("b")]}),
        ("R --out-dir x", {"out_dir": Path("x")}),
        ("R --out_dir x", {"out_dir": Path("x")}),
        ("R --out_dir=a_b", {"out_dir": Path("a_b")}),
        ("R --mauve", {"mauve": True}),
        ("R --no-mauve", {"mauve": False}),
        ("R --mauve false", {"mauve": False}),
        ("R --mauve=no", {"mauve": False}),
        ("--mauve R", {"mauve": True}),
        ("--mauve TRUE R", {"mauve": True}),
        ("R --high 3", {"ends": Ends(0.0, 3.0)}),
        ("R --low 1 --both_open", {"ends": Ends(1.0, 2.0, True)}),
        ("R --both-open --judge gpt2", {"ends": Ends(0.0, 2.0, True), "judge": Judge("gpt2")}),
    ],
)
def test_arguments_and_their_values(argv: str, values: dict[str, Any]) -> None:
    found = PARSER.values(argv.split())
    assert found == PLAIN | values
    inspect.signature(command).bind(**found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "required: run"),
        ("R F G", "one word too many: 'G'"),
        ("R --colour red", "cdlm command has no setting --colour"),
        ("R --stesp 3", "has no setting --stesp (did you mean --steps?)"),
        ("R --out_dri x", "has no setting --out-dri (did you mean --out-dir?)"),
        ("R --bothopen", "(did you mean --both-open?)"),
        ("R --step 3", "has no setting --step (did you mean --steps?)"),
        ("R --n few", "--n: expected a whole number, got 'few'"),
        ("R --n 1.5", "--n: expected a whole number, got '1.5'"),
        ("R --rate much", "--rate: expected a number, got 'much'"),
        ("R --steps 1 x", "--steps: expected a whole number, got 'x'"),
        ("R --steps", "--steps needs at least one value"),
        ("R --n --steps 3", "--n needs at least one value"),
        ("R --cache full", "'full' (choose from 'prefix', 'dual')"),
        ("R --mauve=maybe", "--mauve is true or false, got 'maybe'"),
        ("R --low 3", "low must be <= high, got 3.0"),
    ],
)
def test_bad_arguments_are_one_line(argv: str, message: str) -> None:
    with pytest.raises(CdlmError) as caught:
        PARSER.values(argv.split())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_help_lists_groups_defaults_and_texts() -> None:
    shown = PARSER.format_help()
    words = " ".join(shown.split())
    assert words.startswith("usage: cdlm command run [file] [settings] Do something. Or something else.")
    assert "\nThe ends of a range:\n" in shown
    assert "\nThe judge:\n" in shown
    for text in (
        "a folder, or a name", "what is read", "--out-dir PATH where to (default: out)", "(default: A B)",
        "--cache {prefix,dual}", "--low X The lower end (default: 0.0)", "The upper end, 100% of it (default: 2.0)",
        "--both-open, --no-both-open Neither belongs to it The judge:", "--judge TEXT Its folder", "--n N (default: 8)",
    ):  # fmt: skip
        assert text in words, text
    assert "_dir" not in words


@pytest.mark.parametrize("hint", [Solver, Solver | None, dict[str, int], list[Solver]])
def test_a_type_without_a_text_is_a_mistake_of_the_program(hint: Any) -> None:
    with pytest.raises(TypeError, match="no value on the command line"):
        reading(hint)


def test_two_settings_of_one_name_are_a_mistake_of_the_program() -> None:
    def twice(*, high: float = 1.0, ends: Ends = ENDS) -> None:
        """Nothing."""

    twice.__annotations__ = {"high": float, "ends": Ends, "return": None}
    with pytest.raises(Exception, match="conflicting option"):
        CommandParser(twice, "cdlm twice")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(TEXTS, st.lists(st.integers(-(2**63) + 1, 2**63 - 1), min_size=1), st.floats(allow_nan=False), st.booleans())
def test_every_value_comes_back(text: str, steps: list[int], rate: float, mauve: bool) -> None:
    """Written as --name=value, and as a mapping, whatever the text is."""
    argv = ["R", f"--solver={text}", *(f"--steps={step}" for step in steps), f"--rate={rate}", f"--mauve={mauve}"]
    given = {"solver": text, "steps": steps, "rate": rate, "mauve": mauve}
    assert PARSER.values(argv) == PLAIN | given


@dataclass(frozen=True, kw_only=True)
class Settings:
    """An experiment.

    Args:
        n: samples.
    """

    models: list[str]
    n: int
    block: int | None
    quiet: bool = False


@pytest.fixture
def experiment() -> CommandParser:
    return CommandParser(Settings, "cdlm study it", {"models": ["a", "b"], "block": None, "n": 3})


def test_a_file_is_over_the_defaults_and_the_command_line_over_the_file(experiment: CommandParser) -> None:
    assert experiment.values([]) == {"models": ["a", "b"], "n": 3, "block": None}
    file = experiment.read({"n": 4, "block": 2, "quiet": True})
    values = experiment.arguments({**file, **experiment.settings(["--n", "5", "--models", "c"])})
    assert values == {"models": ["c"], "n": 5, "block": 2, "quiet": True}
    assert "samples (default: 3)" in experiment.format_help()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": "many"}, "expected a whole number, got 'many'"),
        ({"n": None}, "--n needs a value"),
        ({"nix": 1}, "no setting --nix"),
        ({"nix": None}, "no setting --nix"),
        ({"model": ["a"]}, "did you mean --models?"),
    ],
)
def test_bad_files_are_refused_like_bad_arguments(
    settings: dict[str, Any], message: str, experiment: CommandParser
) -> None:
    with pytest.raises(CdlmError) as caught:
        experiment.read(settings)
    assert message in str(caught.value)


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(CdlmError, match="--models, --n must be given"):
        CommandParser(Settings, "cdlm study it", {"block": 1}).values([])


# --- the commands themselves ---

PLAIN_COMMANDS = [command for command in COMMANDS if not command.own]


def every_parser() -> list[CommandParser]:
    """Of every command whose settings are those of a function, and of every study."""
    made = [parser_of(command, function_of(command)) for command in PLAIN_COMMANDS]
    return made + [reader(name) for name in studies.names()]


@pytest.mark.parametrize("parser", every_parser(), ids=lambda parser: parser.prog)
def test_dashes_and_underscores_are_the_same_in_every_option(parser: CommandParser) -> None:
    words = ["x" for p in parser.members.values() if p.positional and p.default is inspect.Parameter.empty]
    for name, parameter in parser.members.items():
        if parameter.positional:
            continue
        settings = reading(parameter.hint)
        value = [] if "type" not in settings and "choices" not in settings else [str(settings.get("choices", "1")[0])]
        dashed, underscored = ([*words, f"--{text}", *value] for text in (name.replace("_", "-"), name))
        assert parser.settings(dashed) == parser.settings(underscored)
        assert name in parser.settings(dashed)


@pytest.mark.parametrize("parser", every_parser(), ids=lambda parser: parser.prog)
def test_every_setting_has_a_help(parser: CommandParser) -> None:
    assert [name for name, parameter in parser.members.items() if not parameter.text] == []


@pytest.mark.parametrize("command", PLAIN_COMMANDS, ids=lambda command: command.name)
def test_the_help_of_every_command_lists_its_groups(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command.name, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    hints = get_type_hints(function_of(command))
    for group in (hint for hint in hints.values() if inspect.isclass(hint) and is_dataclass(hint)):
        assert (group.__doc__ or "").split("\n")[0].rstrip(".").split(". ")[0] in " ".join(shown.split())
        for field in fields(group):
            assert f"--{field.name.replace('_', '-')}" in shown


def test_the_help_of_training_has_dashes_too() -> None:
    options = [option for action in train_parser()._actions for option in action.option_strings]
    assert {"--training.validate-every", "--batch-size", "--out"} <= set(options)
    assert not any("_" in option for option in options)
