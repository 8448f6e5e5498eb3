"""Systems in embedding space, one file each."""
