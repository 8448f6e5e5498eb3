"""Diffusion in embedding space: noise levels, embedding table, warping, denoisers, solvers and systems."""
