"""nnU-Net weights in and out; the only part of the project that needs PyTorch."""
