"""How abilities develop: curves, vestiges, basins and what-ifs over the whole trajectory of several runs.

- `planted`: a layer that is vestigial by construction
"""
