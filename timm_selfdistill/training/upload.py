"""Saved models go to the Hub while the training goes on."""
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from huggingface_hub.utils import disable_progress_bars
from torch import nn

from ..hub import create_repository, explain_failure, push_folder, stage_model
from ..model import SelfDistillModel
from .config import TrainConfig, check_repo_id
from .progress import ProgressReporter


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


def create_uploader(
        config: TrainConfig, output: Path, accelerator: Accelerator, model: nn.Module) -> "HubUploader | None":
    """The uploader of a run that pushes, on its main process; else None.

    Raises:
        ValueError: the model is none that the Hub's readers load, or the repository's id cannot be one.
    """
    if not config.push_to_hub:
        return None
    if not isinstance(model, SelfDistillModel) and not hasattr(model, "pretrained_cfg"):
        raise ValueError(f"push_to_hub takes timm models, got {type(model).__name__}")
    repo_id = config.hub_model_id or output.resolve().name
    check_repo_id(repo_id)
    if not accelerator.is_main_process:
        return None
    return HubUploader(
        repo_id, output, private=config.hub_private or None, strategy=config.hub_strategy, epochs=config.epochs)


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
        disable_progress_bars()  # they would be drawn across the run's own
        self.repo_id, self.private, self.output = repo_id, private, output
        self.strategy, self.epochs = strategy, epochs
        self.result: UploadResult | None = None
        self.news: list[str] = []
        """What is to be said about the uploads."""
        self.waiting: _Upload | None = None
        self.running: _Upload | None = None
        self.changed = threading.Condition()
        threading.Thread(target=self._work, name="upload", daemon=True).start()

    def push(self, name: str, message: str) -> None:
        """Ask for the upload of best/ or last/ as it is now; returns at once."""
        upload = _Upload(self.output / name, Path(tempfile.mkdtemp(prefix=".upload-", dir=self.output)), message)
        stage_model(upload.folder, upload.staged)
        with self.changed:
            if self.waiting:
                shutil.rmtree(self.waiting.staged)
            self.waiting = upload
            self.changed.notify_all()

    def finish_epoch(self, epoch: int, is_best: bool, progress: ProgressReporter) -> None:
        """Ask for an upload where the strategy has one after an epoch; the last epoch's comes at the end of the run."""
        self.report(progress)
        if epoch < self.epochs and (self.strategy == "epoch" or (self.strategy == "best" and is_best)):
            self.push("last" if self.strategy == "epoch" else "best", f"Epoch {epoch}")

    def report(self, progress: ProgressReporter) -> None:
        """Say what came of the uploads since the last time."""
        while self.news:
            progress.say(self.news.pop(0))

    def finish(self, progress: ProgressReporter) -> UploadResult | None:
        """Wait for what is not uploaded yet; Ctrl-C ends the waiting."""
        upload = self.waiting or self.running
        if upload:
            size = sum(path.stat().st_size for path in upload.staged.glob("*")) / 1e6
            try:
                progress.wait(f"uploading {upload.folder} to {self.repo_id}, {size:,.1f} MB", self._is_done)
            except KeyboardInterrupt:
                self.result = UploadResult(self.repo_id, upload.folder, failure="stopped by Ctrl-C")
        self.report(progress)
        return self.result

    def _is_done(self, seconds: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: not (self.waiting or self.running), seconds)

    def _work(self) -> None:
        try:
            create_repository(self.repo_id, private=self.private)
        except Exception as error:
            self.news.append(f"models may not reach {self.repo_id}: {explain_failure(error, self.repo_id)}")
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting)
                self.running, self.waiting = self.waiting, None
            result = UploadResult(self.repo_id, self.running.folder)
            try:
                result.url = push_folder(
                    self.running.staged, self.repo_id, commit_message=self.running.message, private=self.private)
            except Exception as error:  # the training goes on, whatever it is
                result.failure = explain_failure(error, self.repo_id)
            outcome = f"failed: {result.failure}" if result.failure else f"done: {result.url}"
            self.news.append(f"upload to {self.repo_id} {outcome}")
            shutil.rmtree(self.running.staged, ignore_errors=True)
            with self.changed:
                self.result, self.running = result, None
                self.changed.notify_all()
