"""Recipes of the public API on small, generated or shipped data: the demo, the validation networks, the studies.

- `recipe`: what they share
- `modular`: modular addition, the setting of grokking (Power et al. 2022; Nanda et al. 2023; Eichin et al. 2025)
- `digits`: scikit-learn's handwritten digits and a small convolutional network
- `text`: the source text of Python's standard library and a small GPT
"""
