"""2:4 on NVIDIA GPUs: kernels in CUDA C++ (csrc/cuda), compiled on the user's machine by NVRTC and kept on disk."""
