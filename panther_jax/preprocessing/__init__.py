"""From a raw case to the arrays that train: crop, normalise, resample, sample class locations."""
