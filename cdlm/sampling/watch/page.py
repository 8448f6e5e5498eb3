"""One HTML file in which a person watches samples form. It needs no network, and what models say is text in it.

The data stand in the file as JSON in which nothing can end the element that holds them. The page's own script reads
them and sets texts as texts. A policy in the file lets that script and that style alone run, and no connection.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_path, write_text
from cdlm.core.inert import visible
from cdlm.core.parsing import brief
from cdlm.halting import Criterion, parse_criterion
from cdlm.halting.replay import check_recorded
from cdlm.sampling.samples import Samples
from cdlm.sampling.watch.frames import LEFT_OUT, need_origin, panel

MOST_SAMPLES = 8
"""Samples of a model that a page shows."""
IN_NOTEBOOK = 2
"""The same of a page that stands in a notebook, which is saved with it."""
HEIGHT = 720
"""Of a page in a notebook, in pixels."""


def write_page(path: object, samples: Samples, rules: object = None, beside: object = ()) -> Path:
    """Write the page of samples of one or more models, whole or not at all; see `Samples.watch`.

    Raises:
        CdlmError: see there.
    """
    target = check_page(path)
    if not isinstance(beside, list | tuple) or not all(isinstance(run, Samples) for run in beside):
        raise CdlmError(f"beside samples stand others, in a list, got {shown(beside)}")
    write_text(target, page([samples, *beside], None if rules is None else checked_rules(rules)))
    return target


def check_page(path: object) -> Path:
    """The place of a page.

    Raises:
        CdlmError: it is no path, or its name is none of a page.
    """
    if not isinstance(path, str | Path):
        raise CdlmError(f"a page is written to a file, such as page.html, got {shown(path)}")
    check_path(str(path))
    if Path(path).suffix.lower() not in (".html", ".htm"):
        raise CdlmError(f"a page is an HTML file, got {str(path)!r}: end its name in .html")
    return Path(path)


def page(runs: Sequence[Samples], rules: Sequence[Criterion] | None = None, most_samples: int = MOST_SAMPLES) -> str:
    """The text of the page of samples of one or more models, see `write_page`."""
    for run in runs:
        need_origin(run)
    panels = [panel(run, rules, most_samples) for run in runs]
    _check_tried(panels, rules)
    return _filled({"panels": panels})


def checked_rules(rules: object) -> list[Criterion]:
    """Rules as objects.

    Raises:
        CdlmError: they are no list, or one of them is no rule, or one that no record can tell of.
    """
    if not isinstance(rules, list | tuple) or not all(isinstance(rule, str | Criterion) for rule in rules):
        raise CdlmError(f'rules are a list, such as ["Patience(8)"], got {shown(rules)}')
    made = [parse_criterion(rule) for rule in rules]
    check_recorded(made)
    for rule in made:
        if rule.live:
            raise CdlmError(
                f"{brief(rule)} changes the steps that follow, or reads what no record keeps, so that it has to run:"
                " leave it out"
            )
    return made


def _check_tried(panels: Sequence[Mapping[str, Any]], rules: Sequence[Criterion] | None) -> None:
    """Raise where rules were given, and on none of the models could any be tried."""
    if rules and not any(one["rules"] for one in panels):
        why = str(panels[0]["notes"][0]).removeprefix(LEFT_OUT)
        raise CdlmError(f"none of the rules can be tried on these samples: {why.removesuffix('.')}")


def _filled(data: Mapping[str, Any]) -> str:
    """The page with its style, script and data."""
    style, script = _part("page.css"), _part("page.js")
    parts = {
        "title": html.escape(f"Samples of {' and '.join(one['name'] for one in data['panels'])}"),
        "style": style, "script": script, "data": as_json(data), "policy": html.escape(_policy(style, script)),
    }  # fmt: skip
    # In one pass, so that nothing in a part is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html"))


def _part(name: str) -> str:
    return (files("cdlm.sampling.watch") / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """What may run in the page: this style and script, by their hashes, and nothing from anywhere else."""
    return (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def as_json(data: object) -> str:
    """JSON that can stand in an element of HTML: ASCII, without a character that could begin or end a tag."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def notebook(samples: Samples) -> str:
    """HTML of samples in a notebook: the page in a frame that has no access to the notebook, or the plain texts."""
    try:
        need_origin(samples)
    except CdlmError:
        return f"<pre>{html.escape(visible(repr(samples)))}</pre>"
    inner = html.escape(page([samples], most_samples=IN_NOTEBOOK))
    return (
        f'<iframe sandbox="allow-scripts" title="Samples forming" width="100%" height="{HEIGHT}" style="border:0"'
        f' srcdoc="{inner}"></iframe>'
    )
