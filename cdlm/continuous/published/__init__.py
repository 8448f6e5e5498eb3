"""Networks and file formats that others have published. `cdlm convert` knows the formats that `LAYOUTS` lists."""

from cdlm.continuous.published.elf import ELFLayout
from cdlm.continuous.published.langflow import LangFlowLayout
from cdlm.continuous.published.layout import Layout
from cdlm.continuous.published.plaid import PlaidLayout
from cdlm.continuous.published.ssd import SSDLayout
from cdlm.core.parsing import Registry

LAYOUTS: Registry[Layout] = Registry(
    "published format", Layout, plaid=PlaidLayout, ssd=SSDLayout, langflow=LangFlowLayout, elf=ELFLayout
)
