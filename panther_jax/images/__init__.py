"""Images: reading and writing, formats, checks."""
