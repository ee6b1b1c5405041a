"""NVIDIA's own kernels by way of torch's operations."""
