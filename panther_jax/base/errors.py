"""The errors that a user can cause; each says what is wrong and what to do."""


class PlansError(ValueError):
    """Plans, dataset.json or an architecture that cannot be used; the message names the field."""


class CheckpointError(RuntimeError):
    """A checkpoint or bundle that cannot be written, read or used."""


class StoreError(ValueError):
    """A store, a stored case or a split file that cannot be used; the message names the file."""


class DatasetError(ValueError):
    """An image, a label map or a raw dataset that cannot be used; the message names the file."""
