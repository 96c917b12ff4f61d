"""Removing, replacing and factorizing attention heads."""
