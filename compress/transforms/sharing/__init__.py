"""Sharing attention across layers and diffusion steps."""
