"""Merging and pruning tokens."""
