"""Functions that are no masked model, and odd arguments of models in lm-evaluation-harness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from foreign import copy_of, write_tokenizer
from hostile.interfaces import argument_trials, function_trials
from hostile.trials import report
folder = copy_of("llada", Path(sys.argv[1]))
write_tokenizer(folder, "llada")
report([*function_trials(), *list(argument_trials(folder))[::7]])
"""


def test_odd_functions_and_arguments_are_refused_in_one_line(tmp_path: Path) -> None:
    """In a process without the type checks of these tests. Every 7th of the arguments; `python -m hostile` runs all."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path / "llada")], capture_output=True, text=True,
        check=True, cwd=HERE, env={"PYTHONPATH": f"{HERE}:{HERE.parent}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) > 100
    assert not [words for _, bad, _, words in found if bad]
