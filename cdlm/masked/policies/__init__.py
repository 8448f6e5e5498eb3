"""Unmasking policies."""
