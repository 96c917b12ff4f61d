"""Modules that live on in an emitted model; they import torch and compress_kernels only."""
