"""Upload of saved models to the Hub during training."""

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
"""Prefix of the folders in the run directory that hold the files of an upload."""


@dataclass
class UploadResult:
    """Result of a run's uploads."""

    repo_id: str
    folder: Path
    """The saved model that was pushed last."""
    url: str | None = None
    """URL of the last commit."""
    failure: str | None = None
    """Why the last upload failed; None if it succeeded."""


class _Upload(NamedTuple):
    folder: Path
    """The saved model."""
    staged: Path
    """Copy of its files, taken when the upload was requested."""
    message: str


def check_pushable(config: TrainConfig, model: nn.Module) -> None:
    """Raise ValueError if the run pushes to the Hub and its model could not be loaded from there."""
    if config.push_to_hub and not isinstance(model, SelfDistillModel) and not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"push_to_hub needs a timm model, got {type(model).__name__}")


def create_uploader(config: TrainConfig, output: Path, accelerator: Accelerator, epochs: int) -> "HubUploader | None":
    """Create the uploader on the main process of a run that pushes to the Hub; None otherwise.

    Args:
        epochs: number of epochs of the run.

    Raises:
        ValueError: the name of the run directory is not a valid repository name.
    """
    if not config.push_to_hub:
        return None
    repo_id = config.hub_model_id or output.resolve().name
    check_repo_id(repo_id, "the name of the run directory (hub_model_id is not set)")
    if not accelerator.is_main_process:
        return None
    return HubUploader(repo_id, output, private=config.hub_private or None, strategy=config.hub_strategy, epochs=epochs)


class HubUploader:
    """Pushes saved models to one repository, one after the other, in a background thread.

    A newer model replaces one that is still queued. Failures never stop training; the last one is reported. The
    repository is created at the start, so that a missing token is reported early.

    Args:
        repo_id: "user/name", or "name" for the account of the token.
        private: whether to create a private repository; None is the organization's default.
        output: the run directory, with best/ and last/.
        strategy: `hub_strategy`, see `TrainConfig`.
        epochs: number of epochs of the run.
    """

    def __init__(self, repo_id: str, output: Path, *, private: bool | None, strategy: str, epochs: int):
        self.repo_id, self.private, self.output = repo_id, private, output
        self.strategy, self.epochs = strategy, epochs
        self.result: UploadResult | None = None
        self.news: list[str] = []
        """Lines about the uploads that have not been printed yet."""
        self.queue: Queue[_Upload | None] = Queue()
        """At most one queued upload, then None at the end of the run."""
        self.pending: _Upload | None = None
        """The last upload that was requested, until its outcome is known."""
        self.stopped = False
        self.lock = threading.Lock()
        # not huggingface_hub's futures: the interpreter would wait for the last of them at exit, even after Ctrl-C
        self.thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once."""
        disable_progress_bars()  # they would interfere with the run's own
        self._clean()  # files left by a killed run
        self.thread.start()

    def push(self, name: str, message: str) -> None:
        """Request the upload of best/ or last/ as it is now; returns at once."""
        folder = self.output / name
        try:
            upload = _Upload(folder, Path(tempfile.mkdtemp(prefix=STAGED, dir=self.output)), message)
            stage_model(folder, upload.staged)
        except OSError as error:  # e.g. a full disk
            self._report_result(UploadResult(self.repo_id, folder, failure=str(error)))
            return
        with suppress(Empty):
            if replaced := self.queue.get_nowait():
                shutil.rmtree(replaced.staged, ignore_errors=True)
        with self.lock:
            self.pending = upload
        self.queue.put(upload)

    def pushes(self, epoch: int, is_best: bool) -> bool:
        """Whether the strategy uploads a model after this epoch."""
        return epoch < self.epochs and (self.strategy == "epoch" or (self.strategy == "best" and is_best))

    def finish_epoch(self, epoch: int, is_best: bool, progress: ProgressReporter) -> None:
        """Request an upload if the strategy has one after this epoch; the last epoch's follows when the run ends."""
        self.report(progress)
        if self.pushes(epoch, is_best):
            self.push("last" if self.strategy == "epoch" else "best", f"Epoch {epoch}")

    def report(self, progress: ProgressReporter) -> None:
        """Print the outcome of uploads since the last call."""
        while self.news:
            progress.say(self.news.pop(0))

    def finish(self, progress: ProgressReporter) -> UploadResult | None:
        """Wait until everything is uploaded, or until Ctrl-C or SIGTERM."""
        self.queue.put(None)
        if upload := self.pending:
            size = sum(path.stat().st_size for path in upload.folder.glob("*") if path.is_file()) / 1e6
            try:
                with raising_on_sigterm():
                    progress.wait(f"uploading {upload.folder} to {self.repo_id}, {size:,.1f} MB", self._is_done)
            except KeyboardInterrupt:
                with self.lock:
                    if self.pending:  # else it has just finished
                        self.stopped = True
                        self._report_result(UploadResult(self.repo_id, upload.folder, failure="interrupted"))
        self._clean()
        self.report(progress)
        return self.result

    def _is_done(self, seconds: float) -> bool:
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def _work(self) -> None:
        try:
            create_repository(self.repo_id, private=self.private)
        except BaseException as error:  # training continues, whatever it is
            self.news.append(f"uploads to {self.repo_id} may fail: {explain_failure(error, self.repo_id)}")
        while upload := self.queue.get():
            result = UploadResult(self.repo_id, upload.folder)
            try:
                result.url = push_staged(
                    upload.staged, self.repo_id, commit_message=upload.message, private=self.private
                )
            except BaseException as error:  # likewise
                result.failure = explain_failure(error, self.repo_id)
            with self.lock:
                if self.stopped:  # its files are gone
                    return
                self._report_result(result)
                if self.pending is upload:
                    self.pending = None
            shutil.rmtree(upload.staged, ignore_errors=True)

    def _report_result(self, result: UploadResult) -> None:
        self.result = result
        outcome = f"failed: {result.failure}" if result.failure else f"done: {result.url}"
        self.news.append(f"upload to {self.repo_id} {outcome}")

    def _clean(self) -> None:
        for left in self.output.glob(f"{STAGED}*"):
            with suppress(OSError):  # its upload has just finished, or the system cannot rename open files
                ended = left.rename(f"{left}-ended")  # so that an interrupted upload sees all of its files or none
                shutil.rmtree(ended, ignore_errors=True)
