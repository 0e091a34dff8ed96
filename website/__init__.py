"""The documentation site: what its pages take from the code, and what mkdocs calls.

Pages that a person wrote lie in docs/; mkdocs.yml puts them in order.
"""

import pathlib

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
