"""The module that every MagCache script shares (arXiv 2506.09045).

`ratios`, `schedule` and `steps` need numpy only; everything that touches a model needs torch as well.
"""
