"""One torch thread, and property tests that never watch the clock and draw the same examples in every run.

A soak (`make test-soak`) draws new ones, and many: it is where a rare counterexample is looked for.

cdlm must not be imported here: the shape-checking import hook is installed after this file is read.
"""

import os

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("soak", deadline=None, max_examples=500, print_blob=True)
settings.load_profile("fixed")  # --hypothesis-profile comes later and wins

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the CPU, unless `-m gpu` asks for those of a GPU: `auto` would take one that is there."""
    asked = config.option.markexpr
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a soak, raise tests that set a smaller number of examples of their own."""
    if settings.get_current_profile_name() != "soak":
        return
    examples = settings.get_profile("soak").max_examples
    for test in {item.obj for item in items if isinstance(item, pytest.Function) and is_hypothesis_test(item.obj)}:
        own = test._hypothesis_internal_use_settings  # hypothesis has no public name for it
        test._hypothesis_internal_use_settings = settings(own, max_examples=max(own.max_examples, examples))
