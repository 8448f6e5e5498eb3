"""Runs kept step by step."""
