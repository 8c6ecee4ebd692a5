"""Whether images are the same as before, and in the same order."""
import hashlib
import os

import datasets

from .files import ImageFiles
from .found import Rows


def fingerprint(rows: Rows, label_column: str | None) -> str | None:
    """A hash of the images from which a part is drawn: of files their names, below the folder that holds them all, and
    classes; of a table its labels. None for a stream.

    What is drawn depends on the order of the images, so that a renamed file changes it.
    """
    digest = hashlib.sha256()
    if isinstance(rows, ImageFiles):
        root = os.path.commonpath(rows.paths)
        digest.update("\0".join(os.path.relpath(path, root) for path in rows.paths).encode(errors="surrogateescape"))
    elif isinstance(rows, datasets.Dataset):
        labels = rows.select_columns(label_column)[:][label_column] if label_column in rows.column_names else []
        digest.update(repr((len(rows), labels)).encode())
    else:
        return None
    return digest.hexdigest()[:16]
