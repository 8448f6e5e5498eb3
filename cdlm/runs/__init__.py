"""Training runs: their settings, text and folders, and other formats of what they leave."""
