"""The commands. Each is a line here and a module, which is imported when the command is run."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command of the command line."""

    name: str
    module: str
    """It has a function of the command's name, whose parameters are the settings, or, if `own`, `run` and `parser`."""
    help: str
    own: bool = False
    """The module reads the arguments itself: `run(argv)` runs them, `parser()` is for completion."""


COMMANDS = (
    Command("train", "cdlm.cli.train", "train a model on text, into a run folder", own=True),
    Command("distill", "cdlm.cli.commands.distill", "distil a continuous model to students of few steps"),
    Command("sample", "cdlm.cli.commands.sample", "draw samples from a model, with adaptive halting"),
    Command("watch", "cdlm.cli.commands.watch", "write a page in which one watches samples form"),
    Command("replay", "cdlm.cli.commands.replay", "try halting rules on recorded runs, without the model"),
    Command("calibrate", "cdlm.cli.commands.calibrate", "choose a rule's setting by the quality it may lose"),
    Command(
        "train-halting", "cdlm.cli.commands.train_halting", "train a small head on recorded runs that says when to halt"
    ),
    Command(
        "train-sampler", "cdlm.cli.commands.train_sampler", "train a layer that draws several tokens a call, for Adjust"
    ),
    Command("compare", "cdlm.cli.commands.compare", "draw quality over calls of halting rules: table and plot"),
    Command("frontier", "cdlm.cli.commands.frontier", "compare ways to sample at equal entropy: table and plot"),
    Command("study", "cdlm.studies.command", "small experiments about halting: cdlm study NAME", own=True),
    Command("evaluate", "cdlm.cli.commands.evaluate", "measure samples beside real text, or the likelihood of text"),
    Command("lm-eval", "cdlm.lm_eval.command", "run lm-evaluation-harness on a model: cdlm lm-eval run", own=True),
    Command("convert", "cdlm.cli.commands.convert", "published weights of plaid, ssd, langflow, elf to a model folder"),
    Command("pack", "cdlm.cli.commands.pack", "copy a model to share: half precision, without what is of its training"),
    Command("merge", "cdlm.cli.commands.merge", "add an adapter of cdlm train --lora to the weights of its base"),
    Command("train-encoder", "cdlm.cli.commands.train_encoder", "train a small encoder on a run's text, for its space"),
    Command("train-judge", "cdlm.cli.commands.train_judge", "train a small autoregressive judge on a run's text"),
    Command("completion", "cdlm.cli.completion", "print a script that completes commands and settings", own=True),
)
