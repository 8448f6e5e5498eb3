"""The arguments of a model in the harness, its `model_args`: one table, with the names that other projects use."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from cdlm import api
from cdlm.core.checks import Settings, check_choice, check_whole, shown
from cdlm.core.devices import Precision
from cdlm.core.errors import CdlmError
from cdlm.core.parsing import nearest
from cdlm.halting import Criterion
from cdlm.policies.confidence import Factor, Threshold
from cdlm.policies.dream import ALGORITHMS, Dream
from cdlm.policies.llada import LLaDA
from cdlm.policies.policy import Policy
from cdlm.sampling.loop import check_batch_size
from cdlm.sampling.requests import check_length
from cdlm.sampling.session import Model, Sampling


@dataclass(frozen=True)
class ModelArguments(Settings):
    """What `model_args` may hold. Beside these, the flat settings of a model's family, as of `cdlm.generate`: `steps`,
    `policy`, `temperature`, `cfg_scale`, `cache`, `solver`, `grid`, `commit` and so on.

    Args:
        pretrained: run folder or Hub id; in Python also a loaded model.
        halt: halting rule, "auto" for the one that was calibrated; None never halts.
        new_tokens: tokens of an answer. Of a masked model so many are generated behind each prompt; of a continuous one
            they are the most that is kept of its row. By default what a task asks for, or what is left of a row.
        max_length: positions of prompt and answer together; by default the model's.
        truncate: cut prompts that are too long from the left, as the harness's own models do; if not, refuse them.
        add_bos_token: put the token that begins a text before every prompt.
        escape_until: do not cut answers at a task's stop strings.
        block: of the policy, positions of a block.
        threshold: the policy is `Threshold`, with this least probability.
        factor: the policy is `Factor`, with this f.
        alg: of the policy: one of Dream's, or of LLaDA's orders "low_confidence" and "random".
        alg_temp, top_p, top_k: of the policy `Dream`.
        no_eos, eos_last: of the policy `LLaDA`.
        mc: draws of the bound of each answer whose likelihood is asked for.
        seed: with a prompt it fixes the answer.
        batch_size: rows in flight; "auto" is the model's own number.
        max_batch_size: the most that "auto" stands for.
        device: "auto", or a device; CUDA where there is none is the same as "auto".
        precision: "fp32" or "bf16"; "auto" as in the files.
        device_map: of foreign models, how to divide them among devices, such as "auto".
    """

    pretrained: str | Path | Model | None = None
    halt: str | Criterion | None = None
    new_tokens: int | None = None
    max_length: int | None = None
    truncate: bool = False
    add_bos_token: bool = False
    escape_until: bool = False
    block: int | None = None
    threshold: float | None = None
    factor: float | None = None
    alg: str | None = None
    alg_temp: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    no_eos: bool | None = None
    eos_last: bool | None = None
    mc: int = 128
    seed: int = 0
    batch_size: int | str | None = None
    max_batch_size: int | None = None
    device: str | None = None
    precision: Precision | None = None
    device_map: str | Mapping[str, int | str] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Flat settings of the model's family."""

    def __post_init__(self) -> None:
        check_whole("model_args", mc=self.mc)
        check_whole("model_args", least=0, seed=self.seed)
        for name in ("new_tokens", "max_length"):
            if getattr(self, name) is not None:
                check_length(getattr(self, name))
        for size in (self.batch_size, self.max_batch_size):
            if size is not None:
                check_batch_size(size)
        if self.pretrained is None:
            raise CdlmError("model_args needs pretrained: a run folder, a Hub id or a folder of LLaDA or Dream")

    def rows_of(self, model: Model) -> int:
        """Rows in flight."""
        own = model.batch_size if self.max_batch_size is None else min(model.batch_size, self.max_batch_size)
        return self.batch_size if isinstance(self.batch_size, int) else own


POLICY_PARTS = {
    "block": "block", "threshold": "tau", "factor": "f", "alg": "alg", "alg_temp": "alg_temp", "top_p": "top_p",
    "top_k": "top_k", "no_eos": "no_eos", "eos_last": "eos_last",
}  # fmt: skip
"""Arguments that are parts of a policy, and their names there."""
ALIASES: Mapping[str, str] = {
    "model_path": "pretrained", "model": "pretrained",
    "max_new_tokens": "new_tokens", "gen_length": "new_tokens", "max_gen_toks": "new_tokens",
    "block_size": "block", "block_length": "block", "diffusion_steps": "steps", "remasking": "alg",
    "cfg": "cfg_scale", "use_cache": "cache", "mc_num": "mc", "dtype": "precision", "torch_dtype": "precision",
    "logits_eos_inf": "no_eos", "confidence_eos_eot_inf": "eos_last",
}  # fmt: skip
"""Arguments by the names that other projects use."""
_OWN = {f.name for f in fields(ModelArguments)} - {"settings"}
_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32", "auto": None}
_TEXTS = ("pretrained", "device", "device_map")
"""Arguments in whose text a ";" is no comma."""


def known() -> list[str]:
    """Every name that an argument may have."""
    return sorted({*_OWN, *api.all_flat_names(), *ALIASES, "dual_cache", "trust_remote_code"})


def read_pairs(text: str) -> dict[str, Any]:
    """Arguments from `name=value,name=value`; commas within brackets and quotes separate nothing.

    Raises:
        CdlmError: a part is no `name=value`, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for part in _split(text):
        name, sign, value = part.partition("=")
        if not sign:
            raise CdlmError(f"model_args is name=value,name=value, got {shown(part)}")
        if name.strip() in found:
            raise CdlmError(f"model_args has {name.strip()} twice: leave one out")
        found[name.strip()] = _value(value.strip())
    return found


def _split(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if sign == "," and not depth and not quote:
            parts.append("")
            continue
        if quote or sign in "\"'":
            quote = "" if sign == quote else quote or sign
        else:
            depth = max(0, depth + (sign in "([{") - (sign in ")]}"))
        parts[-1] += sign
    return [part for part in parts if part.strip()]


def _value(text: str) -> Any:
    """A truth, a number or a text in quotes as what it is; any other text as it is written."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def read_arguments(given: Mapping[str, Any]) -> ModelArguments:
    """The arguments, by their own names or by those of other projects.

    Raises:
        CdlmError: an argument is unknown, given twice, or of a wrong kind.
    """
    values: dict[str, Any] = {}
    for name, value in _with_cache(given).items():
        own = ALIASES.get(name, name)
        if own not in _OWN and own not in api.all_flat_names():
            raise _unknown(name)
        if own in values:
            raise CdlmError(f"model_args has {own} twice, once as {name}: leave one out")
        values[own] = _converted(own, value)
    values = {name: value for name, value in values.items() if value is not None}
    flat = {name: values.pop(name) for name in list(values) if name not in _OWN}
    return ModelArguments(**values, settings=flat)


def _unknown(name: str) -> CdlmError:
    if name == "trust_remote_code":
        return CdlmError("no code of a model is ever run here: leave out trust_remote_code")
    if ")" in name or "(" in name:
        return CdlmError(
            f"model_args has no {shown(name)}: it was split at a comma within a value; write ; for a comma there, as"
            " in halt=SchED(11.85; 3.95)"
        )
    return CdlmError(f"model_args has no {shown(name)}{nearest(name, known())}: docs/lm-eval.md lists the arguments")


def _with_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with Fast-dLLM's two switches of caches as one setting, and without what is switched off."""
    values = dict(given)
    dual = values.pop("dual_cache", None)
    if values.get("trust_remote_code") in (False, None):
        values.pop("trust_remote_code", None)
    if not isinstance(dual, bool | None):
        raise CdlmError(f"dual_cache is true or false, got {shown(dual)}")
    if dual:
        if values.pop("use_cache", True) is not True or "cache" in values:
            raise CdlmError("dual_cache=true stands beside use_cache=true alone: leave out the other")
        values["cache"] = "dual"
    elif isinstance(values.get("use_cache"), bool):
        values["use_cache"] = "prefix" if values["use_cache"] else None
    return values


def _converted(name: str, value: Any) -> Any:
    if name == "precision":
        return _PRECISIONS.get(str(value).removeprefix("torch."), value)
    if name == "batch_size" and isinstance(value, str):
        if value.partition(":")[0] == "auto":
            return None
        return int(value) if value.isdecimal() and len(value) < 19 else value  # longer ones are refused as texts
    if isinstance(value, str) and name not in _TEXTS:
        text = value.replace(";", ",").strip()
        return None if text.lower() == "none" and name != "commit" else text
    return value


def sampling_of(model: Model, arguments: ModelArguments) -> tuple[Sampling, str]:
    """How the arguments sample a model, and what of them has no effect; empty if all has one.

    Raises:
        CdlmError: an argument is of another family, or of another policy.
    """
    settings = dict(arguments.settings)
    parts = {name: value for name in POLICY_PARTS if (value := getattr(arguments, name)) is not None}
    base = model.base_of({*settings, *parts})
    if not parts:
        return api.sampling_of(model, None, settings), ""
    if "policy" not in base.flat_names():
        raise CdlmError(
            f"model_args has {', '.join(parts)}, of masked models, and {model.name} is {base.family}: leave it out"
        )
    if "policy" in settings:
        raise CdlmError(f"a policy has its own {', '.join(parts)}: write it in {shown(settings['policy'])}")
    own: Any = base  # of a family with policies
    policy, unused = _policy_of(own.policy, parts, settings.pop("steps", None))
    return api.sampling_of(model, base.with_flat(policy=policy), settings), unused


def _policy_of(base: Policy, parts: Mapping[str, Any], steps: int | None) -> tuple[Policy, str]:
    """The policy that parts of one describe; what they do not say is as in `base` if it is of that kind."""
    kind = _kind_of(base, parts)
    named = {f.name for f in fields(kind)}
    changes = {("remasking" if kind is LLaDA and n == "alg" else POLICY_PARTS[n]): v for n, v in parts.items()}
    if kind in (Threshold, Factor):
        changes.pop("alg", None)
    if wrong := [name for name in changes if name not in named]:
        raise CdlmError(f"the policy {kind.__name__} has no {wrong[0]}{nearest(wrong[0], named)}: leave it out")
    unused = ""
    if steps is not None and "steps" not in named:
        unused = f"{kind.__name__} takes the steps that it takes: steps={steps} is not used"
    elif steps is not None:
        changes["steps"] = steps
    return replace(base if type(base) is kind else kind(), **changes), unused


def _kind_of(base: Policy, parts: Mapping[str, Any]) -> type[Any]:
    alg, ways = parts.get("alg"), [name for name in ("threshold", "factor") if name in parts]
    if len(ways) == 2:
        raise CdlmError("threshold and factor are two policies: give one")
    if alg is not None:
        check_choice("model_args", (*ALGORITHMS, *ORDERS, "confidence_threshold"), alg=alg)
    if ways:
        if alg not in (None, "confidence_threshold", "low_confidence"):
            raise CdlmError(f"{ways[0]} is a policy that ranks by confidence: leave out alg={alg}")
        return Threshold if ways == ["threshold"] else Factor
    if alg == "confidence_threshold":
        raise CdlmError("alg=confidence_threshold needs a threshold, such as threshold=0.9")
    return type(base) if alg is None else Dream if alg in ALGORITHMS else LLaDA


ORDERS: tuple[Literal["low_confidence", "random"], ...] = ("low_confidence", "random")
"""How LLaDA's policy ranks."""
