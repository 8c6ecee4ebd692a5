"""Saved models go to the Hub while the training goes on."""

import shutil
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import NamedTuple

from accelerate import Accelerator
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from ...hub import create_repository, explain_failure, push_staged, stage_model
from ...model import SelfDistillModel
from ..config import TrainConfig, check_repo_id
from ..runtime.interrupt import raising_on_sigterm
from ..runtime.progress import ProgressReporter

STAGED = ".upload-"
"""Begins the names of folders in the run directory that hold the files of an upload."""


@dataclass
class UploadResult:
    """What came of a run's uploads."""

    repo_id: str
    folder: Path
    """The saved model that was pushed last."""
    url: str | None = None
    """Address of the last commit."""
    failure: str | None = None
    """Why the last upload failed."""


class _Upload(NamedTuple):
    folder: Path
    """The saved model."""
    staged: Path
    """Its files as they were when the upload was asked for."""
    message: str


def check_pushable(config: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError for a run that is to push a model that the Hub's readers could not load."""
    if config.push_to_hub and not isinstance(model, SelfDistillModel) and not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"push_to_hub takes timm models, got {type(model).__name__}")


def create_uploader(config: TrainConfig, output: Path, accelerator: Accelerator, epochs: int) -> "HubUploader | None":
    """The uploader of a run that pushes, on its main process; else None.

    Args:
        epochs: of the run.

    Raises:
        ValueError: the name of the run directory cannot be a repository's.
    """
    if not config.push_to_hub:
        return None
    repo_id = config.hub_model_id or output.resolve().name
    check_repo_id(repo_id, "the name of the run directory (there is no hub_model_id)")
    if not accelerator.is_main_process:
        return None
    return HubUploader(repo_id, output, private=config.hub_private or None, strategy=config.hub_strategy, epochs=epochs)


class HubUploader:
    """Pushes saved models to one repository, one after the other, in a thread of its own.

    A model that still waits when the next comes is left out. No failure reaches the training; the last one is told. The
    repository is made at the beginning, so that a missing token is told then.

    Args:
        repo_id: "user/name", or "name" for the user whose token it is.
        private: of the repository, if it is made; None is the organisation's default.
        output: the run directory, with best/ and last/.
        strategy: when, see `TrainConfig`.
        epochs: of the run.
    """

    def __init__(self, repo_id: str, output: Path, *, private: bool | None, strategy: str, epochs: int):
        self.repo_id, self.private, self.output = repo_id, private, output
        self.strategy, self.epochs = strategy, epochs
        self.result: UploadResult | None = None
        self.news: list[str] = []
        """What is to be said about the uploads."""
        self.queue: Queue[_Upload | None] = Queue()
        """At most one upload that waits, and None at the end of the run."""
        self.pending: _Upload | None = None
        """The last one that was asked for, until its outcome is told."""
        self.stopped = False
        self.telling = threading.Lock()
        # of huggingface_hub's futures the interpreter waits for the last one at its end, after Ctrl-C, too
        self.thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def start(self) -> None:
        """Begin to work; once."""
        disable_progress_bars()  # they would be drawn across the run's own
        self._clean()  # after a run here that was killed
        self.thread.start()

    def push(self, name: str, message: str) -> None:
        """Ask for the upload of best/ or last/ as it is now; returns at once."""
        folder = self.output / name
        try:
            upload = _Upload(folder, Path(tempfile.mkdtemp(prefix=STAGED, dir=self.output)), message)
            stage_model(folder, upload.staged)
        except OSError as error:  # a full disk, say
            self._tell(UploadResult(self.repo_id, folder, failure=str(error)))
            return
        with suppress(Empty):
            if replaced := self.queue.get_nowait():
                shutil.rmtree(replaced.staged, ignore_errors=True)
        with self.telling:
            self.pending = upload
        self.queue.put(upload)

    def pushes(self, epoch: int, is_best: bool) -> bool:
        """Whether the strategy has an upload after this epoch."""
        return epoch < self.epochs and (self.strategy == "epoch" or (self.strategy == "best" and is_best))

    def finish_epoch(self, epoch: int, is_best: bool, progress: ProgressReporter) -> None:
        """Ask for an upload where the strategy has one after an epoch; the last epoch's comes at the end of the run."""
        self.report(progress)
        if self.pushes(epoch, is_best):
            self.push("last" if self.strategy == "epoch" else "best", f"Epoch {epoch}")

    def report(self, progress: ProgressReporter) -> None:
        """Say what came of the uploads since the last time."""
        while self.news:
            progress.say(self.news.pop(0))

    def finish(self, progress: ProgressReporter) -> UploadResult | None:
        """Wait for what is not uploaded yet; Ctrl-C and SIGTERM end the waiting."""
        self.queue.put(None)
        if upload := self.pending:
            size = sum(path.stat().st_size for path in upload.folder.glob("*") if path.is_file()) / 1e6
            try:
                with raising_on_sigterm():
                    progress.wait(f"uploading {upload.folder} to {self.repo_id}, {size:,.1f} MB", self._is_done)
            except KeyboardInterrupt:
                with self.telling:
                    if self.pending:  # else it has just ended
                        self.stopped = True
                        self._tell(UploadResult(self.repo_id, upload.folder, failure="stopped while it was uploaded"))
        self._clean()
        self.report(progress)
        return self.result

    def _is_done(self, seconds: float) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        try:
            create_repository(self.repo_id, private=self.private)
        except BaseException as error:  # the training goes on, whatever it is
            self.news.append(f"models may not reach {self.repo_id}: {explain_failure(error, self.repo_id)}")
        while upload := self.queue.get():
            result = UploadResult(self.repo_id, upload.folder)
            try:
                result.url = push_staged(
                    upload.staged, self.repo_id, commit_message=upload.message, private=self.private
                )
            except BaseException as error:  # likewise
                result.failure = explain_failure(error, self.repo_id)
            with self.telling:
                if self.stopped:  # its files are gone
                    return
                self._tell(result)
                if self.pending is upload:
                    self.pending = None
            shutil.rmtree(upload.staged, ignore_errors=True)

    def _tell(self, result: UploadResult) -> None:
        self.result = result
        outcome = f"failed: {result.failure}" if result.failure else f"done: {result.url}"
        self.news.append(f"upload to {self.repo_id} {outcome}")

    def _clean(self) -> None:
        for left in self.output.glob(f"{STAGED}*"):
            with suppress(OSError):  # its upload has just ended, or the system does not rename open files
                ended = left.rename(f"{left}-ended")  # an upload that was stopped finds all of its files or none
                shutil.rmtree(ended, ignore_errors=True)
