"""Every page, typed as it stands: each command and each example runs, in order, in one empty folder.

What costs time alone is made small (`typed_commands.SMALL`, `SMALLER`). Folders that a page takes for granted are
models that ship, and names of the Hub are local folders of tiny models. What cannot run here says so on the page:
`<!-- not run: why -->`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
from doc_pages import PAGES, ROOT, Block, blocks_of
from foreign import copy_of, write_tokenizer
from typed_commands import type_command

from cdlm.data.sources import Stories
from cdlm.models import shipped

SMALLER = {
    "n=1024": "n=112",
    "n=64": "n=8",
    "steps=200": "steps=8",
    "in 64 128": "in 64",
    "train_steps=1000": "train_steps=2, batch_size=4",
    "evaluate(model, drawn)": "evaluate(model, drawn, judge_steps=5)",
}
"""Numbers of the examples and scripts, and what stands for them."""
RUNS = {"stories": ("demo", "mine"), "stories-masked": ("masked",), "e2e": ("e2e",), "arithmetic": ("arithmetic",)}
"""Run folders that pages take for granted, and the models that stand there."""
LONGER = {"llada": {"max_sequence_length": 512}, "Dream": {"max_position_embeddings": 512}}
"""Of the tiny models of the Hub: prompts of pages and their answers fit."""
ELSEWHERE = ("docs/studies/", "docs/lm-eval.md", "docs/several-machines.md")
"""Whose commands are not run: of studies (nor is `cdlm study` elsewhere), whose tables run small in `make
results-quick`; of a harness that downloads its tasks; on several devices. They are understood (`test_docs`)."""
WALKED = [
    page for page in PAGES
    if any(b.language == "python" or (b.commands and not page.startswith(ELSEWHERE)) for b in blocks_of(page))
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that ship, with less text."""
    folder = tmp_path_factory.mktemp("shipped")
    for name in shipped.names():
        shutil.copytree(shipped.place_of(name), folder / name)
        if (folder / name / "config.yaml").exists():  # a judge has none
            _with_less_text(folder / name / "config.yaml")
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of torch, as it is compiled
@pytest.mark.parametrize("page", WALKED)
def test_every_command_and_example_of_the_page_runs(
    page: str, models: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", models)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a quarter of the time; other tests check shapes
    _prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CDLM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks_of(page):
        if block.why_not is None:
            _run(block, names)


def _run(block: Block, names: dict[str, object]) -> None:
    if block.language == "python":
        made = compile(_smaller(block.code()), block.page, "exec", dont_inherit=True)
        exec(made, names)  # text of this repository, run as a reader would run it
    elif block.page.startswith(ELSEWHERE):
        return
    elif block.script:
        command = shlex.join([sys.executable, str(ROOT / "tests/typed_commands.py")])
        script = f'cdlm() {{ {command} "$@"; }}\n{_smaller(block.text)}'
        subprocess.run(["bash", "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    else:
        for words in (words for words in block.commands if words[0] != "study"):
            _make_room(words)
            print("$ cdlm", shlex.join(words))
            type_command(words)


def _smaller(text: str) -> str:
    for number, small in SMALLER.items():
        text = text.replace(number, small)
    return text


def _make_room(words: list[str]) -> None:
    """What a page makes itself is not there before."""
    if words[0] in ("train", "train-encoder") and "--resume" not in words:
        made = words[words.index("--out") + 1] if "--out" in words else words[2]
        shutil.rmtree(made, ignore_errors=True)


def _prepare(folder: Path) -> None:
    """What a reader of the pages has: a checkout's settings, text of one's own, trained models."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    for settings in (folder / "configs").iterdir():
        _with_less_text(settings)
    stories = list(Stories(n=300, seed=1).documents("train"))
    for name in ("mybook", "more", "my_train", "my_valid", "e2e_train", "e2e_valid"):
        (folder / f"{name}.txt").write_text("\n".join(stories) + "\n")
    (folder / "theirs.txt").write_text("\n".join(stories[:8]) + "\n")
    (folder / "data").mkdir()
    _write_lines(folder / "data" / "a.jsonl", [{"text": story} for story in stories])
    (folder / "questions.txt").write_text("Anna went to the park.\nSam had a red ball.\n")
    (folder / "answers.txt").write_text("She met a dog.\nHe lost the ball.\n")
    (folder / "long.txt").write_text(" ".join(stories[:3]) + "\n")
    _write_lines(folder / "questions.jsonl", [{"prompt": "What is 12 * 7?"}])
    _write_lines(folder / "both.jsonl", [{"prompt": "the cat sat on the", "answer": " mat."}])
    _write_lines(folder / "samples.jsonl", [{"text": story} for story in stories[:8]])
    for model, runs in RUNS.items():
        for run in runs:
            _put(model, folder / "runs" / run)
    _put("stories", folder / "you" / "stories")
    shutil.copytree(shipped.place_of("stories-judge"), folder / "gpt2")
    for name, family in {"GSAI-ML/LLaDA-8B-Instruct": "llada", "Dream-org/Dream-v0-Instruct-7B": "Dream"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_tokenizer(copy_of(family, folder / name, **LONGER[family]), family)


def _write_lines(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _put(model: str, folder: Path) -> None:
    """A model that ships, as a run folder."""
    shutil.copytree(shipped.place_of(model), folder)


def _with_less_text(settings: Path) -> None:
    """Stories and problems are made, and thousands take long."""
    settings.write_text(re.sub(r"\bn: \d{4,}", "n: 2000", settings.read_text()))
