"""Which members, which weights, and how unlike members are combined."""
