"""Fingerprint and plans, as nnU-Net makes them."""
