"""cdlm: diffusion language models in embedding space, with adaptive halting.

`load`, `generate` and `Samples` are imported on first use, so that importing a part costs that part alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdlm.generation import decode, generate, load
    from cdlm.sampling.samples import Samples

    __version__: str

__all__ = ["Samples", "decode", "generate", "load"]

_HOMES = {
    "decode": "cdlm.generation",
    "generate": "cdlm.generation",
    "load": "cdlm.generation",
    "Samples": "cdlm.sampling.samples",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'cdlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("cdlm")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"
