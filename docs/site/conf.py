"""How the documents become a site: `make docs`. The checkout is the source, so links between its pages hold."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # parts.py, and the cdlm of this checkout

project = "cdlm"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "parts"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "results/README.md", "docs/**"]
exclude_patterns = [".*", "build", "dist", "runs", "cdlm", "tests", "docs/site", "**/__pycache__"]

myst_heading_anchors = 4
highlight_language = "none"
default_role = "literal"
nitpicky = False  # types of other packages have no page here
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True  # an attribute is described once
python_maximum_signature_line_length = 88
python_display_short_literal_types = True

html_theme = "furo"
html_title = "cdlm"
html_static_path = ["style"]
html_css_files = ["site.css"]
html_extra_path = ["front"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
