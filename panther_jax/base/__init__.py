"""What every room shares: console, files whole or not there, checksums, workers, errors."""
