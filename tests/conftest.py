"""One torch thread, and property tests that neither watch the clock nor, in CI, depend on luck.

cdlm must not be imported here: the shape-checking import hook is installed after this file is read.
"""

import os

import torch
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("continuous-integration", deadline=None, derandomize=True)
settings.load_profile("continuous-integration" if os.environ.get("CI") else "local")

torch.set_num_threads(1)
