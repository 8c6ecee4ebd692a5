"""The lines that a run prints about its upload at the end."""

import shlex

from ..training.outputs.upload import UploadResult


def upload_lines(upload: UploadResult, private: bool) -> str:
    """Return the URL of the model, or why it is not on the Hub and the command to upload it later."""
    if upload.failure is None:
        return f"on the Hub: {upload.url}"
    command = ["timm-selfdistill", "push", str(upload.folder), upload.repo_id, *(["--private"] if private else [])]
    return (
        f"the model is not on the Hub: {upload.failure}\n"
        f"it is in {upload.folder}; upload it with:\n  {shlex.join(command)}"
    )
