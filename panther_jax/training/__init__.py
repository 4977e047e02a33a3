"""One training step and what feeds, records, stops and validates it."""
