"""Results as people read them.

- `text`: tables for the terminal
- `figures`: matplotlib, from the labelled data (extra `plot`)
- `page`, `payload`: the report, one HTML file (extra `report`)
- `compare`, `export`: two results beside each other; tables for other programs
- `thin`, `shown`: what is drawn of data too large to draw; examples as what they are
"""

from . import figures, text
from .compare import Comparison, compare
from .export import export
from .page import write

__all__ = ["Comparison", "compare", "export", "figures", "text", "write"]
