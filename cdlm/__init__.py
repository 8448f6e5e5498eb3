"""cdlm: diffusion language models in embedding space, with adaptive halting."""
