"""Benchmarks: ours and the peer, interleaved, in the same run. ``python -m benchmarks.run``."""
