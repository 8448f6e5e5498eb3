"""The pages tell the truth: their examples run, and their tables name what exists."""

import re
import tomllib
from importlib import import_module

import pytest
from doc_pages import PAGES, ROOT, commands_of

from cdlm.cli.main import find, function_of, parser_of
from cdlm.cli.train import _own
from cdlm.continuous.grids import GRIDS
from cdlm.continuous.projections import PROJECTIONS
from cdlm.continuous.solvers import SOLVERS
from cdlm.data.masking import MASKINGS
from cdlm.evaluation.workloads import WORKLOADS
from cdlm.halting import RULES
from cdlm.halting.signals import SIGNALS
from cdlm.lm_eval.command import understood
from cdlm.policies import POLICIES
from cdlm.studies.command import reader

FILES = re.compile(r"`?((?:cdlm|tests|benchmarks|configs)/[\w/.-]+\.(?:py|yaml))")
EXAMPLES = ("cdlm/studies/NAME.yaml", "cdlm/studies/my_study.py")
"""Files that stand for any of their kind."""
SHOWING = [page for page in PAGES if commands_of(page)]


def test_every_signal_is_described() -> None:
    page = (ROOT / "docs/write-a-criterion.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|", page.split("## Signals")[1].split("These are always there")[0], re.MULTILINE)
    assert sorted(rows) == sorted(SIGNALS)


def test_the_methods_page_names_files_that_exist_and_every_part_that_has_a_name() -> None:
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    files = re.findall(r"`(cdlm/[\w/]+\.py)`", page)
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
    # An implemented name stands beside its file; a planned one has no file.
    done = "\n".join(line for line in page.splitlines() if "`cdlm/" in line)
    rules = [line.split(" | ")[0] for line in page.split("## Halting")[1].split("## ")[0].splitlines()]
    assert [name for name in RULES if sum(f"`{name}`" in first for first in rules) != 1] == []
    assert page.count("`&`") == 1, "how rules are joined stands there twice"
    for name in (*RULES, *SOLVERS, *GRIDS, *PROJECTIONS, *MASKINGS, *POLICIES, *WORKLOADS):
        assert re.search(rf"`{name}\b", done), f"docs/methods.md does not say where {name} is"


def floors() -> dict[str, str]:
    """Rows of the table of floors: the packages of a floor, and its modules."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Floors")[1].split("## ")[0]
    return dict(re.findall(r"^\| (`cdlm\.[^|]*) \| (.*) \|$", page, re.MULTILINE))


def test_the_table_of_floors_names_every_module_and_no_other() -> None:
    named = {name: modules for packages, modules in floors().items() for name in re.findall(r"`cdlm\.(\w+)`", packages)}
    package = ROOT / "cdlm"
    for name in named.keys() - {"__main__", "api"}:
        folder = package / name
        there = {file.stem for file in folder.rglob("*.py")} - {"__init__", "__main__"}
        folders = {place.parent.name for place in folder.rglob("__init__.py")} - {name}
        listed = set(re.findall(r"`(\w+)`", named[name]))
        assert there <= listed <= there | folders, f"CONTRIBUTING.md and cdlm/{name} differ"
    tops = {place.stem for place in package.iterdir() if place.suffix == ".py" or (place / "__init__.py").exists()}
    assert named.keys() == tops - {"__init__"}


def test_the_floors_are_those_that_the_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [set(re.findall(r"\w+", layer)) for layer in contracts[0]["layers"]]
    rows = [set(re.findall(r"`cdlm\.(\w+)`", packages)) for packages in floors()]
    for layer in layers:  # a floor of several packages has several rows
        found: set[str] = set()
        while found != layer:
            assert rows, f"no row for {layer - found}"
            found |= rows.pop(0)
            assert found <= layer, f"{found - layer} stands on another floor"
    assert not rows


def test_every_file_that_a_page_names_is_there() -> None:
    pages = ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md"))]
    named = {(page, file) for page in pages for file in FILES.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert named
    assert [(page, file) for page, file in sorted(named) if not (ROOT / file).exists() and file not in EXAMPLES] == []


def test_the_new_names_of_the_migration_page_exist() -> None:
    page = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`(cdlm(?:\.\w+)+)", cell)}
    assert len(names) > 40
    assert [name for name in sorted(names) if resolve(name) is None] == []


def resolve(name: str) -> object:
    """The module or the object of a dotted name; None if there is none."""
    first, *rest = name.split(".")
    found: object = import_module(first)
    for i, part in enumerate(rest, 1):
        try:
            found = import_module(".".join([first, *rest[:i]]))
        except ModuleNotFoundError:
            found = getattr(found, part, None)
    return found


@pytest.mark.parametrize("page", SHOWING)
def test_every_command_that_a_page_shows_is_understood(page: str) -> None:
    """Its options exist, and their values are of the right kind; nothing is run."""
    found = commands_of(page)
    assert found
    for name, *argv in found:
        command = find(name)
        if name == "train":
            _own(argv)
        elif name == "study" and "--help" not in argv:
            reader(argv[0]).settings(argv[1:])
        elif name == "lm-eval":
            understood(argv)
        elif not command.own:
            parser_of(command, function_of(command)).values(argv)
