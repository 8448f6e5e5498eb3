"""cdlm: diffusion language models in embedding space, with adaptive halting.

`load`, `generate` and `Samples` are imported on first use, so that importing a part costs that part alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdlm.api import decode, generate, load
    from cdlm.sampling.samples import Samples

__all__ = ["Samples", "decode", "generate", "load"]

_HOMES = {
    "decode": "cdlm.api",
    "generate": "cdlm.api",
    "load": "cdlm.api",
    "Samples": "cdlm.core.types",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'cdlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
