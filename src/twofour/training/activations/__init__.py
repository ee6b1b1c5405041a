"""Activations made sparse on the fly, and what a pattern would take from them."""
