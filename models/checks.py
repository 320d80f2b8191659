"""Early refusals of sizes that no network can have."""

__all__ = ["check_positive"]


def check_positive(**sizes: int) -> None:
    """Raise ValueError, by name, for the first of `sizes` that is not a whole number above 0."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
