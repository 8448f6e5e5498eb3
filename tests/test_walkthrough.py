"""The pages for newcomers, typed as they stand: each command runs, in order, in one empty folder, on models that ship.

What depends on size alone is made small (`SMALL`). What cannot be here is left out by name (`ELSEWHERE`): models of the
Hub, text of others, several devices.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from test_docs import ROOT, commands_of

from cdlm.cli.main import main
from cdlm.data.sources import Stories

WALKED = ("README.md", "docs/guide.md")
SMALL = {
    "train": "--vocab_size 300 --batch_size 4 --validation_rows 8 --preview 0 --training.steps 2",
    "sample": "--n 2 --device cpu --quiet",
    "compare": "--n 8 --steps 8 --rules Patience",
    "calibrate": "--n 112 --steps 8 --max-change 95% --min-agreement 0 --confidence 0.6",
    "evaluate": "--mauve false",
    "train-judge": "--steps 5",
}
"""Options at the end of every command of that name; there they win."""
ELSEWHERE = re.compile(r"GSAI-ML|gpt2|wikitext|--devices|DIR|google-t5|completion|lm-eval|plot\.pdf")


@pytest.mark.parametrize("page", WALKED)
def test_every_command_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ran = 0
    for words in commands_of(page):
        if ELSEWHERE.search(" ".join(words)):
            continue
        main([*words, *shlex.split(SMALL.get(words[0], ""))])
        ran += 1
    assert ran > 10


def _prepare(folder: Path) -> None:
    """The files that a reader of the pages has: a checkout's settings, and text of one's own."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    stories = list(Stories(n=300, seed=1).documents("train"))
    for name in ("mybook.txt", "more.txt", "my_train.txt", "my_valid.txt", "theirs.txt"):
        (folder / name).write_text("\n".join(stories) + "\n")
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    (folder / "questions.txt").write_text("Anna went to the park.\nSam had a red ball.\n")
    (folder / "answers.txt").write_text("She met a dog.\nHe lost the ball.\n")
