"""Where everything is that the placeholders of a table stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rebuild.definition import WORK, Loops
from rebuild.models import Training


@dataclass(frozen=True)
class Places:
    """Where a table is built.

    Args:
        root: of the checkout.
        work: folder of the table.
        data: places of its files.
        trainings: of all its models.
    """

    root: Path
    work: Path
    data: Mapping[str, Path]
    trainings: tuple[Training, ...]

    def of(self, loops: Loops) -> dict[str, list[str]]:
        """What each placeholder stands for in the loops of an entry.

        A model is the one with the same values of the loops that both are in; `{model*}` is all of these, and
        `{model.name}` the name of its folder.
        """
        found = {WORK: [str(self.work)], **{name: [str(place)] for name, place in self.data.items()}}
        for name in dict.fromkeys(training.name for training in self.trainings):
            fitting = [t for t in self.trainings if t.name == name and _agree(t.loops, loops)]
            found[f"{name}*"] = [str(self.folders[t.label]) for t in fitting]
            found[name] = found[f"{name}*"]
            found[f"{name}.name"] = [self.folders[training.label].name for training in fitting]
        return found

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The run folder of each model, by its label."""
        return {training.label: training.place for training in self.trainings}

    def cleaned(self, value: Any) -> Any:
        """Plain data without paths of this machine and without NaN: placeholders and null stand in their place."""
        if isinstance(value, dict):
            return {key: self.cleaned(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self.cleaned(part) for part in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, str):
            for path, name in self._names:
                value = value.replace(path, name)
        return value

    @cached_property
    def _names(self) -> list[tuple[str, str]]:
        """Paths and names of folders with what to write for them, whole paths first."""
        names = {str(place): f"{{{name}}}" for name, place in self.data.items()}
        names |= {str(place): f"{{{label}}}" for label, place in self.folders.items()}
        names |= {str(self.work): f"{{{WORK}}}", f"{self.root}/": ""}
        names |= {place.name: label for label, place in self.folders.items()}
        return sorted(names.items(), key=lambda pair: ("/" not in pair[0], -len(pair[0])))


def _agree(ours: Loops, theirs: Loops) -> bool:
    return all(theirs[name] == value for name, value in ours.items() if name in theirs)
