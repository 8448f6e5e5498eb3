"""Watching samples form: a page in one HTML file, and the text in a terminal while it is drawn."""
