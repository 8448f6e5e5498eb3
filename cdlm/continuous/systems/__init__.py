"""Systems in embedding space, one file each."""

from collections.abc import Mapping
from types import MappingProxyType

from cdlm.continuous.system import ContinuousConfig
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.continuous.systems.elf import ELF
from cdlm.continuous.systems.langflow import LangFlow
from cdlm.continuous.systems.plaid import Plaid
from cdlm.continuous.systems.ssd import SSD

SYSTEMS: Mapping[str, type[ContinuousConfig]] = MappingProxyType(
    {"cdcd": CDCD, "plaid": Plaid, "ssd": SSD, "langflow": LangFlow, "elf": ELF}
)
"""Continuous systems by their name in config.json."""
