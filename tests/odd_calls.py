"""Calls of the public functions with one argument of a wrong kind, and what came of them: a line of JSON each.

Run as a program: users have no type checks such as those of the tests.
"""

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from toys import autoregressive_with_tokenizer, masked_with_tokenizer, with_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import cdlm
from cdlm.evaluation.evaluate import Distances
from cdlm.hf import halted
from cdlm.masked.model import Function
from cdlm.sampling.requests import Request


class Odd:
    """Nothing that is expected anywhere, and without a name that could be shown."""

    def __repr__(self) -> str:
        raise ValueError("no name")


VALUES: Mapping[str, Any] = {
    "None": None, "-1": -1, "0": 0, "10**23": 10**23, "10**5000": 10**5000, "nan": float("nan"), "inf": float("inf"),
    "1.5": 1.5, "1j": 1j, "True": True, "''": "", "'x'": "x", "b'x'": b"x", "'\\ud800'": "\ud800", "'a\\nb'": "a\nb",
    "[]": [], "[None]": [None], "[1, 'a']": [1, "a"], "{}": {}, "{'a'}": {"a"}, "object()": object(), "odd": Odd(),
    "Odd": Odd, "lambda": lambda *_: 1, "np.int64(3)": np.int64(3), "np.arange(3.0)": np.arange(3.0),
    "tensor(2)": torch.tensor(2), "tensor([[1.5]])": torch.tensor([[1.5]]),
}  # fmt: skip

NUMBERS = {"0", "1.5", "10**23"}  # of a number >= 0; 10**23 is none of these: no tensor takes it
OPTIONAL: set[str] = {"None"}
RUNS: Mapping[str, set[str]] = {
    "seed": {"0"}, "index": {"0"}, "start": {"None", "0"}, "record": {"True"}, "recorded": {"True"},
    "template": {"True"}, "shift": {"True"}, "halted.shift": {"None", "True"},
    "watch": {"True"}, "rules": {"None", "[]"}, "beside": {"[]"},
    "mask_id": {"0"}, "eos_id": {"None", "0"}, "eot_id": {"None", "0"},
    "with_seed": {"0"}, "check_made_for": {"[]", "''", "{}"}, "select": {"[]"},
    "item": {"-1", "0", "True", "tensor(2)"},
    "prompt": {"''", "'x'", "'a\\nb'"}, "request.prompt": {"None", "''", "'x'", "'\\ud800'", "'a\\nb'"},
    "token": {"None", "0"}, "row": {"[]", "[None]"}, "constraint": {"None", "0"}, "constraints": {"None", "{}"},
    "temperature": {"None", "0", "1.5"}, "cfg_scale": {"None", "0", "1.5"}, "init_scale": {"None", "0", "1.5"},
    "softmax_temperature": {"None", "1.5"}, "score_temperature": {"None", "1.5"},
    "guidance": {"None", "-1", "0", "1.5"},
    "read_out": {"None", "1.5"}, "valid": {"None"}, "progress": {"None", "True"}, "flag": {"True"},
    "logits_fn": set(), "function": {"lambda"}, "mauve": {"None", "True"},
}  # fmt: skip
"""The values that are right, by the last part of a call's name; elsewhere None alone may be."""
NEVER_NONE = set(
    "model n chat run steps_of blocks_of replayable check_recordable refuses with_criterion with_sampling with_steps"
    " save page name device devices length.decode prompts.decode prompts.likelihood answers levels stops constants"
    " options sampling.session tokens given texts judge features".split()
)


METHODS = (
    "with_criterion with_seed with_sampling with_steps recorded run steps_of blocks_of replayable check_recordable"
    " check_made_for refuses"
)


HALTED = "halt policy mask_id halted.shift temperature cfg_scale cache seed"


def generated(name: str, value: Any) -> Any:
    """One argument of `cdlm.hf.halted`, given to transformers' generate."""
    settings = {"mask_id": 9, "max_new_tokens": 1, "custom_generate": halted}
    settings[name.rpartition(".")[2]] = value
    return network().generate(torch.tensor([[3]]), **settings)


@cache
def network() -> Any:
    """A bidirectional Llama of ten tokens."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings: dict[str, Any] = {"vocab_size": 10, "is_causal": False, **sizes}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def calls(folder: str) -> dict[str, Callable[[Any], object]]:
    """Each parameter of the public functions, as a function of its value."""
    makes = with_tokenizer, masked_with_tokenizer, autoregressive_with_tokenizer
    model, masked, causal = (make(length=4) for make in makes)
    model.save_pretrained(folder)
    session, samples = cdlm.open_session(model, steps=1), cdlm.generate(model, n=3, steps=1)
    watched, page = cdlm.generate(model, n=1, steps=1, watch=True), f"{folder}/page.html"
    constants = cdlm.Constants(8)

    def nothing(tokens: Any, _: Any) -> Any:
        return torch.zeros(*tokens.shape, 9)

    asked = {"index": 0, "tokens": torch.zeros(4, dtype=torch.int64), "given": torch.arange(4) < 2}
    fixed = {"constants": constants, "length": 2}
    judged = {"model": cdlm.load("stories", device="cpu"), "texts": ["A dog."], "device": "cpu"}
    table: list[tuple[str, Callable[..., object], dict[str, Any], str]] = [
        ("generate", cdlm.generate, {"model": model, "steps": 1}, "prompts n length sampling halt seed batch_size"
         " record watch progress chat system template new_tokens solver grid projection softmax_temperature"
         " score_temperature guidance init_scale passes commit reopen"),
        ("generate", cdlm.generate, {"model": model}, "model steps"),
        ("generate masked", cdlm.generate, {"model": masked}, "policy temperature cfg_scale cache steps new_tokens"),
        ("generate causal", cdlm.generate, {"model": causal}, "temperature"),
        ("likelihood", cdlm.likelihood, {"model": masked, "prompts": ["a"], "answers": ["b"], "levels": 1}, "model"
         " prompts answers chat system template levels seed batch_size ode progress"),
        ("likelihood continuous", cdlm.likelihood, {"model": model, "prompts": ["a"], "answers": ["b"], "levels": 1},
         "ode read_out"),
        ("decode", cdlm.decode, {"logits_fn": nothing, "prompts": [[1]], **fixed}, "prompts length logits_fn constants"
         " n seed batch_size record watch constraints halt sampling"),
        ("load", cdlm.load, {"name": folder, "device": "cpu"}, "name device precision device_map"),
        ("open_session", cdlm.open_session, {"model": folder, "device": "cpu"}, "model sampling seed batch_size device"
         " devices precision"),
        ("requests", session.requests, {}, "prompts n length new_tokens chat system template"),
        ("request", Request, asked, "index tokens given valid start"),
        ("evaluate", cdlm.evaluate, judged, "model texts judge judge_steps distances device"),
        ("Constants", cdlm.Constants, {"mask_id": 3}, "mask_id eos_id eot_id shift stops"),
    ]  # fmt: skip
    found: dict[str, Callable[[Any], object]] = {
        f"{title} {name}": lambda value, call=call, base=base, name=name: call(**{**base, name: value})
        for title, call, base, names in table
        for name in names.split()
    }
    found |= {f"halted {name}": partial(generated, name) for name in HALTED.split()}
    found |= {f"session {name}": getattr(session, name) for name in METHODS.split()}
    return found | {
        "evaluate flag": lambda v: cdlm.evaluate(**judged, progress=v),
        "Distances features": lambda v: Distances(features=v),
        "Distances mauve": lambda v: Distances(mauve=v),
        "open_session flag": lambda v: cdlm.open_session(model, progress=v),
        "request request.prompt": lambda v: Request(**asked, prompt=v),
        "a prompt": lambda v: cdlm.generate(model, [v], steps=1),
        "a token": lambda v: cdlm.decode(nothing, [[v]], **fixed),
        "a row": lambda v: cdlm.decode(nothing, [v], **fixed),
        "a constraint": lambda v: cdlm.decode(nothing, [[1]], constraints={1: v}, **fixed),
        "samples save": samples.save,
        "samples select": samples.select,
        "samples page": watched.watch,
        "samples rules": lambda v: watched.watch(page, rules=v),
        "samples beside": lambda v: watched.watch(page, beside=v),
        "samples item": samples.__getitem__,
        "Session options": lambda v: cdlm.Session(model, model.sampling, v),
        "Session model": lambda v: cdlm.Session(v, model.sampling),
        "Session sampling.session": lambda v: cdlm.Session(model, v),
        "Function function": lambda v: Function(v, constants),
        "Function constants": partial(Function, nothing),
    }


def expected(call: str, value: str) -> bool:
    """Whether a value is right for a call."""
    name = call.rpartition(" ")[2]
    if name in RUNS:
        return value in RUNS[name]
    owners = call.lower().split()[:-1]
    return value == "None" and not {name, *(f"{name}.{owner}" for owner in owners)} & NEVER_NONE


def outcome(call: Callable[[Any], object], value: Any) -> tuple[str, str]:
    """Nothing or the kind of error, and its text."""
    try:
        call(value)
    except Exception as error:  # what it is, is the question
        return type(error).__name__, str(error)
    return "", ""


def main() -> None:
    """Print every call with its outcome."""
    warnings.simplefilter("ignore")
    with TemporaryDirectory() as folder:
        for name, call in calls(str(Path(folder) / "model")).items():
            for label, value in VALUES.items():
                print(json.dumps([name, label, expected(name, label), *outcome(call, value)]), file=sys.__stdout__)


if __name__ == "__main__":
    main()
