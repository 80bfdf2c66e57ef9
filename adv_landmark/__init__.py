"""Robust landmark detection: a U-Net with a heatmap and two offset maps for each landmark, on Lightning.

The command is ``adv-landmark``; from Python see :class:`adv_landmark.module.RobustLandmarks` and
:class:`adv_landmark.objective.LandmarkObjective`.
"""
