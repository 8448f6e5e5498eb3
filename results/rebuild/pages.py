"""Pages: templates whose numbers come from the JSON files of tables."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cdlm.core.errors import CdlmError
from rebuild.document import NotThere
from rebuild.filters import FILTERS
from rebuild.tables import Tables

LONGEST = 300
"""Lines of a page."""
MARK = "<!-- Rendered by results/build.py from results/{}: change that file, not this one. -->"


def templates(folder: Path) -> list[str]:
    """Names of all templates, with their folders."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.md"))


@dataclass(frozen=True)
class Pages:
    """Renders templates.

    Args:
        folder: of the templates.
        tables: folder of the JSON files.
        out: folder of the pages.
    """

    folder: Path
    tables: Path
    out: Path

    def render(self, name: str) -> str:
        """The page of a template.

        Raises:
            NotThere: it needs a table that was not built.
            CdlmError: it asks for what its tables have not, with the template's line; or it is too long.
        """
        environment = _environment(self.folder)
        tables = Tables(self.tables, environment)
        try:
            text = environment.get_template(name, globals=tables.names).render()
        except (TemplateError, CdlmError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            kind = NotThere if isinstance(error, NotThere) else CdlmError
            raise kind(f"{self._of(name)}, line {_line(error, self.folder / name)}: {error}") from error
        if unsaid := tables.read.keys() - tables.footed:
            raise CdlmError(f"{self._of(name)} has no made_by({min(unsaid)!r}): say where its numbers come from")
        page = f"{self._mark(name)}\n\n{text}"
        if (lines := page.count("\n")) > LONGEST:
            raise CdlmError(f"{self._of(name)} gives {lines} lines, more than {LONGEST}: cut it, or make two pages")
        return page

    def _of(self, name: str) -> str:
        return f"results/{self.folder.name}/{name}"

    def _mark(self, name: str) -> str:
        return MARK.format(f"{self.folder.name}/{name}")

    def is_rendered(self, name: str) -> bool:
        """Whether the page stands there and was rendered, not written by hand."""
        place = self.out / name
        return place.exists() and place.read_text(encoding="utf-8").startswith(self._mark(name))


def _environment(folder: Path) -> Environment:
    made = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder), undefined=StrictUndefined, autoescape=False, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= FILTERS
    return made


def _line(error: BaseException, template: Path) -> int | str:
    """Where in the template an error comes from."""
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == template]
    return lines[-1] or "?" if lines else "?"
