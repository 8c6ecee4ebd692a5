"""What a run says about its uploads at its end."""

import shlex

from ..training.outputs.upload import UploadResult


def upload_lines(upload: UploadResult, private: bool) -> str:
    """Where the model is, or why it is not on the Hub, and the command that uploads it later."""
    if upload.failure is None:
        return f"on the Hub: {upload.url}"
    command = ["timm-selfdistill", "push", str(upload.folder), upload.repo_id, *(["--private"] if private else [])]
    return (
        f"the model is not on the Hub: {upload.failure}\n"
        f"it is in {upload.folder}; upload it with:\n  {shlex.join(command)}"
    )
