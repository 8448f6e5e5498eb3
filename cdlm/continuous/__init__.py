"""Diffusion in embedding space: schedules, grids, embeddings, denoisers, solvers and systems."""
