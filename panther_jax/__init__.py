"""Train, ensemble and run nnU-Net-style 3-D segmentation networks in JAX."""

__version__ = "0.1.0"
