"""The U-Nets, and the convolutions that each device wants."""
