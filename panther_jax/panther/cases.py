"""What the names of the challenge's cases say, and how its data sets are merged by them."""

from panther_jax.images.merging import AlwaysTrained, Merging

TUMOR = "tumor"
TASK1_CASE = r".*_0001"
TASK2_CASE = r"(?!.*_0001$).*"
"""Names of task 1 end with ``_0001`` (spec 03 §7.1); all others of a combined set are task 2's."""
TASK1_IN_ALL = AlwaysTrained(TASK1_CASE, "of task 1 (its name ends with _0001)", "--task1-in-all")


def merging(
    *, tumor_only: bool = False, task1_in_all: bool = False, with_label: str | None = None
) -> Merging:
    """How the challenge's merged data sets are made (spec 02 §3.13, 03 §7.1)."""
    return Merging(
        only_label=TUMOR if tumor_only else None,
        with_label=with_label,
        always=TASK1_IN_ALL if task1_in_all else None,
    )
