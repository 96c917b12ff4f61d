"""Operators that stock PyTorch lacks or runs slowly: per operator a reference, a CPU path and a benchmark."""
