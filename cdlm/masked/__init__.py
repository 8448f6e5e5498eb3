"""Masked diffusion: quotas, confidences, unmasking policies, the objective, and the model families."""
