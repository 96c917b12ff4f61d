"""Windowed and linear attention in place of full softmax attention."""
