"""Finds the ratios of each step, layer and kind of branch for a model: `fastvar_fx.calibrate`.

`reference` makes generations comparable, `measure` runs one for each branch and ratio, `divide`
spends the FLOPs where they matter most, and `figure` draws the plan.
"""
