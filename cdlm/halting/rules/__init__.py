"""Halting rules, by what they read."""
