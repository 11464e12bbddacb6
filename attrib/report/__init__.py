"""Results as people read them.

- `text`: tables for the terminal
- `figures`: matplotlib, from the labelled data (extra `plot`)
- `page`, `payload`: the report, one HTML file (extra `report`)
- `words`, `beside`: what it says of itself; a difference that was run beside another result
- `compare`, `export`, `files`: two results beside each other; tables and files for other programs
- `thin`, `shown`: what is drawn of data too large to draw; examples as what they are
"""

from . import figures, text
from .compare import Comparison, compare
from .export import export
from .files import to_json
from .page import write

__all__ = ["Comparison", "compare", "export", "figures", "text", "to_json", "write"]
