"""Names of classes, for messages."""


def some_names(names: list[str], count: int = 3) -> str:
    return ", ".join(map(repr, names[:count])) + (", ..." if len(names) > count else "")


def listed(names: list[str], other: list[str] | None = None) -> str:
    """A list of class names for a message: all, or of a long list some.

    Args:
        other: a list that it differs from; of a long list, the names from the first difference on are given.
    """
    if len(names) <= 20:
        return f"{len(names)} classes ({some_names(names, 20)})"
    if other is None:
        return f"{len(names)} classes ({some_names(names)})"
    first = next((index for index, pair in enumerate(zip(names, other)) if len(set(pair)) > 1), len(other))
    return f"{len(names)} classes (from index {first}: {some_names(names[first:])})"
