"""Bad input of what connects to other programs: functions of tokens, the harness's arguments, launchers, conversations
and answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from foreign import copy_of, write_tokenizer
from hostile.settings import CALLS, WHOLE
from hostile.trials import Trial
from torch import Tensor

import cdlm
from cdlm.cli.main import main
from cdlm.lm_eval import CdlmLM

VOCAB = 9


def logits(*shape: int) -> Tensor:
    """Of a model that knows nothing."""
    return torch.zeros(*shape, VOCAB)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "positions ignored": lambda tokens, mask, positions: logits(*tokens.shape),
    "positions ignored, by default none": lambda tokens, mask, positions=None: logits(*tokens.shape),
    "positions as an axis": lambda tokens, mask, positions: logits(1, len(positions)),
    "one position less": lambda tokens, mask, positions: logits(len(positions) - 1),
    "no vocabulary": lambda tokens, mask, positions: torch.zeros(len(positions)),
    "one token": lambda tokens, mask, positions: torch.zeros(len(positions), 1),
    "whole numbers": lambda tokens, mask, positions: logits(len(positions)).long(),
    "no numbers": lambda tokens, mask, positions: logits(len(positions)) * torch.nan,
    "a list": lambda tokens, mask, positions: logits(len(positions)).tolist(),
    "nothing": lambda tokens, mask, positions: None,
    "positions without a name": lambda tokens, mask, positions, /: logits(len(positions)),
    "a third argument of another name": lambda tokens, mask, places: logits(len(places)),
    "tokens alone": lambda tokens: logits(*tokens.shape),
    "a row less": lambda tokens, mask: logits(len(tokens) - 1, tokens.shape[1]),
    "a column more": lambda tokens, mask: logits(len(tokens), tokens.shape[1] + 1),
}
"""What is no masked model."""


def function_trials() -> Iterator[Trial]:
    """Each of these functions, decoded: no rule, a rule that reads all positions, and a prompt that is padded."""
    ways: Mapping[str, Mapping[str, Any]] = {
        "no rule": {"prompts": [[1]]},
        "a rule": {"prompts": [[1]], "halt": "Patience(2)"},
        "padding": {"prompts": [[1], [1, 2, 3]]},
    }
    fixed = {"length": 4, "constants": cdlm.Constants(8)}
    for kind, function in FUNCTIONS.items():
        for way, settings in ways.items():
            yield Trial(kind, f"decode, {way}", partial(cdlm.decode, function, **fixed, **settings))  # pyright: ignore


NUMBERS = (
    "new_tokens max_length block threshold factor top_p top_k alg_temp mc seed batch_size max_batch_size steps"
    " temperature cfg_scale"
)
NAMES = (
    "halt policy alg cache precision device device_map truncate add_bos_token escape_until no_eos eos_last thresold"
    " solver pretrained.x"
)


def argument_trials(folder: Path) -> Iterator[Trial]:
    """Each odd text as each argument of a model in lm-evaluation-harness."""
    for names, texts in ((NUMBERS, WHOLE), (NAMES, CALLS)):
        for name in names.split():
            for kind, text in texts.items():
                call = partial(CdlmLM.create_from_arg_string, f"pretrained={folder},{name}={text}")
                yield Trial(kind, f"model_args {name}", call, kind != "hexadecimal" and (name, kind) not in RIGHT)
    for kind, text in CALLS.items():
        yield Trial(kind, "model_args", partial(CdlmLM.create_from_arg_string, text))


RIGHT = {(name, "a fraction") for name in ("factor", "temperature", "cfg_scale")}
"""Odd arguments that are right."""


MACHINES: Mapping[str, Mapping[str, str]] = {
    "nothing in the environment": {},
    "no number of the machine": {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    "a machine too many": {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "2"},
    "a machine below zero": {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "-1"},
    "a machine that is a word": {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "NODE_RANK": "first"},
}
"""Environments that two machines do not match."""


def machine_trials(place: Path) -> Iterator[Trial]:
    """Numbers of machines that are none, and environments that do not match two."""
    text = place / "text.txt"
    text.write_text("the cat sat on the mat\n" * 99)
    train = ["train", f"--text={text}", f"--out={place / 'out'}", "--steps=1"]
    for kind, number in WHOLE.items():
        for name in ("--num-nodes", "--training.num_nodes"):
            yield Trial(kind, f"train {name}", lambda name=name, number=number: main([*train, f"{name}={number}"]))
    for kind, found in MACHINES.items():
        yield Trial(kind, "train --num-nodes 2", partial(_within, found, [*train, "--num-nodes=2"]))


def _within(environment: Mapping[str, str], argv: list[str]) -> None:
    """A command in an environment; in a process of its own."""
    os.environ.update(environment)
    main(argv)


ANSWERS: Mapping[str, str | bytes] = {
    "an empty file": "", "an empty answer": '{"prompt": "the", "answer": ""}', "no prompt": '{"answer": "the"}',
    "no answer": '{"prompt": "the"}', "a number": '{"prompt": "the", "answer": 3}', "no object": '["the", "cat"]',
    "a prompt that is a number": '{"prompt": 3, "answer": "the"}', "no JSON": "{the cat}",
    "half a character": '{"prompt": "the", "answer": "\\ud800"}', "bytes": b"\xff\xfe\x00",
    "longer than the model": f'{{"prompt": "the", "answer": "{500 * "the cat "}"}}',
    "no messages": '{"messages": [], "answer": "the"}', "deep": "[" * 5000,
    "a message without content": '{"messages": [{"role": "user"}], "answer": "the"}',
    "the assistant's message last": '{"messages": [{"role": "assistant", "content": "a"}], "answer": "the"}',
}  # fmt: skip
"""Files of prompts and answers that are none."""
EMPTY = {"nothing": "", "a blank": " ", "a blank line": "\n"}


def conversation_trials(folder: Path, place: Path) -> Iterator[Trial]:
    """Odd messages of the system, maps of devices, and files of answers, of a foreign model."""
    sample = ["sample", str(folder), "--n=1", "--new-tokens=2", "--device=cpu", "--quiet"]
    for kind, text in {**CALLS, **EMPTY}.items():
        argv = [*sample, "--prompt=the", "--chat", f"--system={text}"]
        yield Trial(kind, "sample --system", lambda argv=argv: main(argv), kind in EMPTY or kind == "half a character")
        argv = [*sample, "--prompt=the", f"--device-map={text}"]
        yield Trial(kind, "sample --device-map", lambda argv=argv: main(argv))
    yield Trial("no chat", "sample --system", lambda: main([*sample, "--prompt=the", "--system=x"]))
    yield Trial("no prompt", "sample --chat", lambda: main([*sample, "--chat"]))
    for number, (kind, text) in enumerate(ANSWERS.items()):
        file = place / f"{number}.jsonl"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        argv = ["evaluate", str(folder), "--likelihood", "--chat", "--device=cpu", "--quiet", f"--answers={file}"]
        yield Trial(kind, "evaluate --answers", lambda argv=argv: main(argv))


def interface_trials(place: Path) -> Iterator[Trial]:
    """All of these."""
    folder = copy_of("llada", place / "llada")
    write_tokenizer(folder, "llada")
    yield from function_trials()
    yield from argument_trials(folder)
    yield from machine_trials(place)
    yield from conversation_trials(folder, place)
