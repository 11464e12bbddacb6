"""Results as people read them.

- `text`: tables for the terminal
- `figures`: matplotlib, from the labelled data (extra `plot`)
- `page`, `payload`: the report, one HTML file (extra `report`)
- `thin`, `shown`: what is drawn of data too large to draw; examples as what they are
"""

from . import figures, text
from .page import write

__all__ = ["figures", "text", "write"]
