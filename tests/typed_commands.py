"""A command of a page with what makes it small. As a module it is the command itself, for the shell."""

import shlex
import sys

from cdlm.cli.main import main

SMALL = {
    "train": "--vocab_size 430 --batch_size 4 --validation_rows 8 --preview 0"
    " --training.steps 2 --training.validate-every 2",
    "sample": "--n 2 --device cpu --quiet",
    "compare": "--n 8 --steps 8 --rules Patience --live 2 --measure agreement --judge-steps 5",
    "calibrate": "--n 112 --confidence 0.6 --judge-steps 5",
    "evaluate": "--mauve false --judge-steps 5 --rows 8",
    "frontier": "--judge-steps 5",
    "distill": "--train-steps 2 --batch-size 4",
    "train-encoder": "--steps 2",
    "train-judge": "--steps 5",
    "train-sampler": "--n 16 --updates 2 --rows 2",
}
"""Options at the end of every command of that name; there they win."""
INSTEAD = {"compare": ("--steps", "--rules")}
"""Of a command, options with several values, which those of `SMALL` would be added to."""
FIRST = {"calibrate": "--measure agreement"}
"""Options before those of the page, which win."""
SMALLER = {
    ("sample", "--steps"): "--steps 8",
    ("sample", "--record"): "--n 16",
    ("evaluate", "--ode-steps"): "--ode-steps 2",
    ("calibrate", "--steps"): "--steps 8",
    ("calibrate", "--max-change"): "--max-change 95%",
    ("calibrate", "--max-loss"): "--max-loss 95% --n 24",
}
"""Options behind these, of commands that have a certain option."""


def type_command(words: list[str]) -> None:
    """Run it, small."""
    name, words = words[0], _without(INSTEAD.get(words[0], ()), words)
    more = [options for (command, option), options in SMALLER.items() if command == name and option in words]
    main([name, *shlex.split(FIRST.get(name, "")), *words[1:], *shlex.split(" ".join([SMALL.get(name, ""), *more]))])


def _without(options: tuple[str, ...], words: list[str]) -> list[str]:
    """The words without these options and their values."""
    kept, taken = list[str](), True
    for word in words:
        taken = word not in options if word.startswith("--") else taken
        if taken:
            kept.append(word)
    return kept


if __name__ == "__main__":
    type_command(sys.argv[1:])
