"""Adversarial training for nnU-Net v2, by swapping the trainer: ``nnUNetv2_train DATASET 2d 0 -tr nnUNetTrainerAMAT``.

This module imports nothing: it is found by every start of Python in the environment (see ``advmed_nnunet.pth``).
"""
