"""Where numbers come from: versions, commit and machine, without names of hosts and folders."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("cdlm", "torch", "numpy", "transformers", "mauve-text")
TABLES = "results/tables/*.json"
"""What a rebuild writes itself does not make the tree dirty."""


def origin(root: Path) -> dict[str, Any]:
    """Everything about here and now that a number may depend on.

    Args:
        root: of the checkout.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git(root, "rev-parse", "HEAD"),
        "clean": _git(root, "status", "--porcelain", "--", ".", f":!{TABLES}") == "",
        "versions": _versions(),
        "machine": _machine(),
    }


@cache
def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@cache
def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": _memory(),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerators": _accelerators(),
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    with suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return None


def _accelerators() -> list[str]:
    """Names of NVIDIA devices, which commands take by default."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    words = [program, "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.splitlines() if done.returncode == 0 else []


def _git(root: Path, *words: str) -> str | None:
    """What git says; None where there is no git or no repository."""
    with suppress(OSError):
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return None
