"""Images and raw data sets: formats, reading, writing, checking, making, merging."""
