"""cdlm: diffusion language models in embedding space, with adaptive halting.

The names below are imported on first use, so that importing a part costs that part alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdlm.api import decode, evaluate, generate, likelihood, load, open_session
    from cdlm.autoregressive.sampler import LeftToRight
    from cdlm.continuous.guidance import Guidance
    from cdlm.continuous.sampler import Diffusion
    from cdlm.core.types import Constants
    from cdlm.masked.sampler import Unmasking
    from cdlm.runs.config import RunConfig
    from cdlm.runs.distill import DistillSettings, distill
    from cdlm.runs.train import train
    from cdlm.sampling.samples import Sample, Samples
    from cdlm.sampling.session import Model, Session

    __version__: str

_HOMES = {
    "Constants": "cdlm.core.types",
    "Diffusion": "cdlm.continuous.sampler",
    "DistillSettings": "cdlm.runs.distill",
    "Guidance": "cdlm.continuous.guidance",
    "LeftToRight": "cdlm.autoregressive.sampler",
    "Model": "cdlm.sampling.session",
    "RunConfig": "cdlm.runs.config",
    "Sample": "cdlm.sampling.samples",
    "Samples": "cdlm.sampling.samples",
    "Session": "cdlm.sampling.session",
    "Unmasking": "cdlm.masked.sampler",
    "decode": "cdlm.api",
    "distill": "cdlm.runs.distill",
    "evaluate": "cdlm.api",
    "generate": "cdlm.api",
    "likelihood": "cdlm.api",
    "load": "cdlm.api",
    "open_session": "cdlm.api",
    "train": "cdlm.runs.train",
}

__all__ = [
    "Constants", "Diffusion", "DistillSettings", "Guidance", "LeftToRight", "Model", "RunConfig", "Sample", "Samples",
    "Session", "Unmasking", "decode", "distill", "evaluate", "generate", "likelihood", "load", "open_session", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("cdlm")
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'cdlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
