"""What modules of a network give in a call, kept for those that ask for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from cdlm.core.errors import CdlmError


class Watch:
    """Keeps the outputs of some modules of a network, by name. Without modules it costs nothing.

    Args:
        modules: by the names that their outputs are kept under.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.modules = modules

    @contextmanager
    def kept(self, rows: int) -> Iterator[dict[str, Tensor]]:
        """The outputs [b n d] of the call that is made within the block, of its first `rows` rows.

        The hooks are gone after it: nothing stays at the model, which others may use too.

        Raises:
            CdlmError: a module gives no features of each position, or is not called.
        """
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_hook(partial(_keep, found, name, rows)).remove)
            yield found
        if missing := self.modules.keys() - found.keys():
            raise CdlmError(f"module {min(missing)} is not called by the network: name one whose output is [b n d]")


def _keep(found: dict[str, Tensor], name: str, rows: int, module: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 3:
        raise CdlmError(f"module {name} gives no features of each position: name one whose output is [b n d]")
    found[name] = output[:rows]
