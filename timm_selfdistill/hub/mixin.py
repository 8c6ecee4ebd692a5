"""Saving, loading and pushing, as methods of a model."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import ModelCard, ModelHubMixin
from torch import nn

from ..heads import HeadFactory
from ..timm_methods import TimmMethods
from ..timm_model import TimmModel
from .building import NoRandomInit, choose_head, sketching
from .download import fetch_model, pin
from .files import ExitSettings, check_model_files, check_sizes, load_weights, read_config
from .push import push_folder
from .records import ExitRow
from .saving import create_model_card, save_timm_model

T = TypeVar("T", bound="HubMixin")


class HubMixin(TimmMethods, nn.Module, ModelHubMixin):
    """A network that is saved in the two-reader layout of `files.py`, under the names of huggingface_hub's mixin."""

    if TYPE_CHECKING:  # attributes of one class, properties of another

        @property
        def heads(self) -> nn.ModuleList: ...

        @property
        def num_classes(self) -> int: ...

        @property
        def model_args(self) -> dict[str, Any]: ...

        @property
        def input_size(self) -> tuple[int, int, int]: ...

    rebuild: Callable[[Path], tuple[nn.Module, nn.Module]] | None = None
    """See `save_timm_model`."""

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        *,
        metrics: Mapping[str, Any] | None = None,
        check: bool = True,
        picture: bool = True,
        data_config: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Save to a folder that both `SelfDistillModel.from_pretrained` and plain timm read.

        The folder gets `config.json` and `model.safetensors` (the backbone, in timm's own layout),
        `self_distill.safetensors` (the heads) and `README.md`, the model card. Files are written beside and take the
        old ones' places together, after timm was seen to rebuild the same model from them.

        Args:
            save_directory: made if missing; other files in it stay, also a card that somebody edited.
            metrics: recorded in config.json, anything JSON can hold. The card shows those of a `Trainer`: "exits" (a
                dict with exit, top1, top5 in per cent for each), "dataset" (name, type, split, images), "epoch",
                "settings", "versions", "hardware".
            check: False saves without rebuilding, where this model was seen to be rebuilt before.
            picture: False does not draw exits.png, which takes longer than saving a small model.
            data_config: the preprocessing that the model was measured with, as of `timm.data.resolve_data_config`; the
                default is the model's own, for images of the size of the last training batch.
            push_to_hub: upload it, too, to `repo_id`, by default the folder's name.
            model_card_kwargs: metadata of the card, e.g. `{"license": "mit"}`.
            push_to_hub_kwargs: further arguments of `push_to_hub`.

        Returns:
            The address of the commit, if there is one.

        Raises:
            ValueError: timm cannot rebuild the backbone from what is known of it; pass `model_args` when wrapping. Or
                the model is beyond the limits within which models are loaded (`hub/trust.py`).

        Examples:
            >>> import timm
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
            >>> model.save_pretrained("my-model")
            >>> plain = timm.create_model("local-dir:my-model", pretrained=True)
        """
        if "input_size" not in (data_config or {}):
            self.warn_of_unknown_size()
        save_timm_model(
            self.backbone,
            save_directory,
            full_backbone=self.full_backbone,
            model_args=self.model_args,
            heads=self.heads,
            settings=self.settings(),
            metrics=metrics,
            rows=self.card_rows(metrics),
            check=check,
            picture=picture,
            rebuild=self.rebuild,
            card_data=model_card_kwargs,
            data_config={"input_size": self.input_size, **(data_config or {})},
        )
        if not push_to_hub:
            return None
        return push_folder(save_directory, repo_id or Path(save_directory).resolve().name, **push_to_hub_kwargs)

    def warn_of_unknown_size(self) -> None:
        """Warn where the image size of the model is a guess; a class without guesses has nothing to say."""

    def card_rows(self, metrics: Mapping[str, Any] | None) -> list[ExitRow]:
        """What is known of each exit: its cost, and what is measured of it."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(  # type: ignore[override]  # huggingface_hub's takes arguments of any constructor, too
        cls: type[T],
        pretrained_model_name_or_path: str | PathLike,
        *,
        num_classes: int | None = None,
        head: HeadFactory | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> T:
        """Load a saved model, in eval mode on the CPU.

        All files are those of one commit, whatever is pushed meanwhile.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or the id of a repository on the Hub.
            num_classes: another number than the saved model's begins all classifiers anew, the deepest and the shallow
                ones, as timm's create_model does; class names and thresholds for early exit are dropped.
            head: the callable that the model was wrapped with, if it was one: code is never loaded from a folder.
            revision: branch, tag or commit.
            token: None is the one of `hf auth login`; False sends none.
            cache_dir, local_files_only, force_download: as everywhere in huggingface_hub.

        Raises:
            FileNotFoundError: the folder, the repository, the revision or a file in it is missing.
            PermissionError: the repository is not open to this token.
            OSError: the Hub answers with an error, or not at all.
            ValueError: a file is damaged, foreign, of another format version, or beyond the limits of `hub/trust.py`;
                or the model is of the other class, truncated or not.
            TypeError: `head` cannot be one.

        Examples:
            >>> import timm
            >>> from timm_selfdistill import SelfDistillModel, wrap_self_distill
            >>> wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).save_pretrained("saved")
            >>> SelfDistillModel.from_pretrained("saved").num_classes
            10
            >>> SelfDistillModel.from_pretrained("saved", num_classes=7).num_classes
            7
        """
        fetch = partial(
            fetch_model,
            pretrained_model_name_or_path,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        folder = fetch(revision=revision, only_config=True)
        config = read_config(folder)
        cls.check_kind(config["self_distill"], pretrained_model_name_or_path)
        choose_head(config["self_distill"], head, pretrained_model_name_or_path)
        sketch = cls.sketch(config, folder, head)  # files of another model are refused before they are fetched
        fetch(
            revision=pin(pretrained_model_name_or_path, folder, revision),
            check_sizes=partial(check_sizes, backbone=sketch.backbone, heads=sketch.heads),
        )
        check_model_files(folder, sketch.backbone, sketch.heads)
        with NoRandomInit() if head is None else nullcontext():  # what a head of one's own draws is not always saved
            model = cls.from_config(config, folder, head)
        load_weights(model.backbone, model.heads, folder)
        if num_classes not in (None, model.num_classes):
            model.reset_classifier(num_classes)
        return model.eval()

    @classmethod
    def check_kind(cls, settings: ExitSettings, name: str | PathLike) -> None:
        """Refuse what another class loads.

        Args:
            settings: "self_distill" of a config.

        Raises:
            ValueError: it is another class's.
        """

    @classmethod
    def sketch(
        cls: type[T],
        config: dict[str, Any],
        folder: str | PathLike,
        head: HeadFactory | None = None,
    ) -> T:
        """The model of `from_config` on the meta device, where it takes no memory.

        Raises:
            ValueError: building it takes too long, or a tensor of it is too large.
        """
        with sketching():
            return cls.from_config(config, folder, head)

    @classmethod
    def from_config(
        cls: type[T],
        config: dict[str, Any],
        folder: str | PathLike,
        head: HeadFactory | None = None,
    ) -> T:
        """The model that the config.json of a folder describes, as `read_config` read it, with fresh weights."""
        raise NotImplementedError

    def push_to_hub(  # type: ignore[override]  # huggingface_hub's takes a config, which here is the model's own
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload self-distilled model",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        allow_patterns: list[str] | str | None = None,
        ignore_patterns: list[str] | str | None = None,
        delete_patterns: list[str] | str | None = None,
        model_card_kwargs: dict[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> str:
        """Save the model and upload it to the Hub, where both readers load it by `repo_id`.

        Args:
            repo_id: "user/name", or "name" for the user whose token it is; made if missing.
            private: of a repository that is made; None is the organisation's default.
            token: None is the one of `hf auth login`.
            revision: branch to commit to; None is "main". `branch` is the same, under huggingface_hub's name.
            create_pr: open a pull request instead of committing to the branch.
            allow_patterns, ignore_patterns, delete_patterns: of `huggingface_hub.HfApi.upload_folder`.
            model_card_kwargs, metrics: see `save_pretrained`.

        Returns:
            The address of the commit.

        Raises:
            ValueError: the model cannot be saved, or the repository does not fit, see `push_staged`.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, metrics=metrics, model_card_kwargs=model_card_kwargs)
            return push_folder(
                folder,
                repo_id,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision or branch,
                create_pr=create_pr,
                allow_patterns=allow_patterns,
                ignore_patterns=ignore_patterns,
                delete_patterns=delete_patterns,
            )

    def generate_model_card(self, *, metrics: Mapping[str, Any] | None = None, **card_data: Any) -> ModelCard:
        """The card that `save_pretrained` would write; see there.

        Examples:
            >>> import timm
            >>> from timm_selfdistill import wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
            >>> card = model.generate_model_card(license="mit")
            >>> card.data.license
            'mit'
        """
        return create_model_card(
            self.full_backbone,
            self.model_args,
            self.settings(),
            metrics,
            self.card_rows(metrics),
            card_data,
            self.input_size,
        )

    @property
    def full_backbone(self) -> TimmModel:
        """The network that config.json describes; may be on the meta device."""
        return self.backbone

    def settings(self) -> ExitSettings:
        """What makes the exits again, as config.json holds it."""
        raise NotImplementedError
