"""What pages say in comments, and the site shows: `<!-- docstrings: NAME -->` and `<!-- help: commands -->`.

A comment is invisible where the repository is read on the web, so a page reads well there too. The links of an index
page are its navigation as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import is_dataclass
from importlib import import_module
from inspect import isclass
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

INDEXES = ("docs/index", "docs/studies/README", "docs/reference/README")
"""Pages whose links to other pages are the navigation, a caption for each heading."""
TITLES = {"/README": "Overview </README>"}
"""Pages whose own title says too little in the navigation."""
COMMENT = re.compile(r"^<!-- (docstrings|help): ([\w.]+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(([\w./-]+)\.md\)")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", plain_docstring, priority=400)  # before Google's sections are read
    app.connect("autodoc-process-signature", signature_of_settings)
    return {"parallel_read_safe": True}


def read_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the comments of a page, and give an index its navigation."""
    source[0] = COMMENT.sub(lambda found: MAKERS[found[1]](found[2]), source[0])
    if page in INDEXES:
        source[0] += navigation(page, source[0])


def navigation(page: str, text: str) -> str:
    """Hidden lists of contents: of each heading the pages that are linked below it, each page once."""
    seen: set[str] = set()
    lists = []
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        links = [place for link in LINK.findall(body) if (place := resolved(page, link)) not in seen]
        links = list(dict.fromkeys(links if page == INDEXES[0] else inside(page, links)))
        seen |= set(links)
        caption = f":caption: {title}\n" if page == INDEXES[0] else ""
        entries = [TITLES.get(link, link) for link in links]
        lists += ["```{toctree}\n:hidden:\n" + caption + "\n" + "\n".join(entries) + "\n```\n"] if links else []
    return "\n\n" + "\n".join(lists)


def inside(page: str, links: Iterable[str]) -> list[str]:
    """Links that stay in the folder of the page."""
    folder = f"/{PurePosixPath(page).parent}/"
    return [link for link in links if link.startswith(folder)]


def resolved(page: str, link: str) -> str:
    """The page that a relative link of another means, from the top."""
    parts: list[str] = []
    for part in (PurePosixPath(page).parent / link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/" + "/".join(parts)


def docstrings(name: str) -> str:
    """Docstrings of the public names of a module; or of the classes of a registry, such as `cdlm.halting.RULES`."""
    try:
        module = import_module(name)
    except ModuleNotFoundError:
        home, _, constant = name.rpartition(".")
        registry: Mapping[str, type] = getattr(import_module(home), constant)
        return rst(directive(kind, public_place(home, kind)) for kind in registry.values())
    return rst(directive(getattr(module, public), f"{name}.{public}", members=True) for public in public_names(module))


def public_place(home: str, kind: type) -> str:
    """Where a class is imported from: the module of its registry, if that has it, or its own."""
    offered = getattr(import_module(home), kind.__name__, None) is kind
    return f"{home if offered else kind.__module__}.{kind.__name__}"


def public_names(module: Any) -> list[str]:
    """What a module offers: its `__all__`, or what it defines itself without an underscore, in its order."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    own = vars(module).items()
    return [name for name, value in own if name[0] != "_" and getattr(value, "__module__", "") == module.__name__]


def directive(thing: object, name: str, members: bool = False) -> str:
    """Let Sphinx read the docstring of a class or a function."""
    if isclass(thing):
        return f".. autoclass:: {name}\n" + ("   :members:\n" if members else "")
    return f".. autofunction:: {name}\n"


def rst(directives: Iterable[str]) -> str:
    return "```{eval-rst}\n" + "\n".join(directives) + "```"


def help_of_commands(_: str) -> str:
    """The help of every command, as it is printed."""
    from cdlm.cli.commands import COMMANDS

    shown = (f"## cdlm {command.name}\n\n```text\n{printed_help(command.name)}\n```\n" for command in COMMANDS)
    return "\n".join(shown)


def printed_help(command: str) -> str:
    """What `cdlm COMMAND --help` prints, at 100 columns."""
    from cdlm.cli.main import main

    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        main([command, "--help"])
    return printed.getvalue().replace(r" \x08", "").strip()  # a backspace of jsonargparse's


MAKERS = {"docstrings": docstrings, "help": help_of_commands}


def plain_docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Read docstrings as they are meant: `code` between single backticks, and no markup beside it."""
    text = "\n".join(lines)
    parts = re.split(r"(``.*?``|`[^`]+`)", text, flags=re.DOTALL)
    parts[::2] = [re.sub(r"([*|]|(?<=\w)_(?!\w))", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``".replace("\n", " ") for part in parts[1::2]]
    lines[:] = "".join(parts).split("\n")
    if what in ("attribute", "property"):
        lines.insert(0, "\\ ")  # nothing; else what stands before a colon would be taken for a type


def signature_of_settings(
    app: Sphinx, what: str, name: str, thing: Any, options: object, shown: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Of a dataclass its fields, where a check of the arguments hides them."""
    if what != "class" or not is_dataclass(thing):
        return shown, returned
    fields = signature(thing.__init__, bound_method=True)
    text = stringify_signature(fields, unqualified_typehints=True, show_return_annotation=False)
    return text.replace("<factory>", "..."), None
