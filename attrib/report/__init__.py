"""Results as people read them.

- `text`: tables for the terminal
- `figures`: matplotlib, from the labelled data (extra `plot`)
"""
