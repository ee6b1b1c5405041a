"""Weights under masks while a model trains: what was pruned stays zero, or masks that follow the weights."""
