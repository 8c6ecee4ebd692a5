"""Flags of timm's train.py that have no effect here or are not supported."""

import argparse
import warnings
from typing import Any

PASSED_OVER = {
    "pin_mem": "memory is always pinned if there is a GPU",
    "no_prefetcher": "there is no prefetcher: DataLoader workers normalize the images",
    "worker_seeding": "augmentation depends only on seed, epoch and position",
    "use_multi_epochs_loader": "DataLoader workers always persist from epoch to epoch",
    "local_rank": "launchers set it in the environment",
    "synchronize_step": "it does not affect results",
    "val_num_samples": "a validation stream is always read completely",
    "kd_loss_type": "timm only has kl",
    "fuser": "it is for TorchScript, which is not used",
}
"""Flags without effect, and why."""
REFUSED = {
    "dataset_download": "datasets are not downloaded from torchvision or TFDS; give --dataset with a dataset on the"
    " Hub, or --data-dir",
    "dataset_trust_remote_code": "code of datasets is never run; use a dataset of image or parquet files",
    "input_img_mode": "the mode follows from the channels: --in-chans 1 reads grayscale, 3 reads RGB",
    "torchscript": "torch.jit cannot script several exits; --torchcompile compiles them",
    "fast_norm": "it computes layer norm in half precision; --amp keeps it in float32",
    "device_modules": "Accelerate finds the devices",
    "no_ddp_bb": "--dist-bn handles the buffers of DistributedDataParallel",
    "drop_connect": "it is deprecated in timm, too; use --drop-path",
    "model_ema_force_cpu": "the moving average stays on the device, where it is evaluated",
    "save_images": "batches of images are not saved; summary and plots are in the run directory",
    "tta": "validation runs each image once",
    "wandb_resume_id": "a resumed run continues in W&B automatically",
    "train_img_sizes": "the image size is fixed during a run; for several sizes, run repeatedly with --img-size and"
    " --initial-checkpoint",
    "train_batch_sizes": "the batch size is fixed during a run; use --batch-size",
    "train_size_probs": "it belongs to --train-img-sizes, which is not supported",
    "train_size_schedule": "it belongs to --train-img-sizes, which is not supported",
    "train_size_schedule_spread": "it belongs to --train-img-sizes, which is not supported",
    "train_size_random_mix": "it belongs to --train-img-sizes, which is not supported",
    "train_batches_per_epoch": "an epoch is one pass over all images; for a stream use --steps-per-epoch",
    "variable_batch_loss_scale": "it belongs to --train-img-sizes, which is not supported",
    "naflex_loader": "NaFlex models take images of any shape as patches; use the same network with a fixed size",
    "naflex_train_seq_lens": "it belongs to --naflex-loader, which is not supported",
    "naflex_max_seq_len": "it belongs to --naflex-loader, which is not supported",
    "naflex_patch_sizes": "it belongs to --naflex-loader, which is not supported",
    "naflex_patch_size_probs": "it belongs to --naflex-loader, which is not supported",
    "naflex_loss_scale": "it belongs to --naflex-loader, which is not supported",
    "naflex_patchify_channels_first": "it belongs to --naflex-loader, which is not supported",
    "model_dtype": "weights stay in full precision, in which they are evaluated and saved; use --amp --amp-dtype"
    " bfloat16",
}
"""Unsupported flags, why, and what to use instead."""
SWITCHES = {"pin_mem", "no_prefetcher", "use_multi_epochs_loader", "synchronize_step"}
"""Flags without effect that take no value."""
MORE_NAMES = {"train_batches_per_epoch": ["--train-steps-per-epoch"], "local_rank": ["--local_rank"]}


class _PassOver(argparse.Action):
    """Warns that a flag has no effect."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        warnings.warn(f"{option_string} has no effect here: {PASSED_OVER[self.dest]}", stacklevel=2)


class _Refuse(argparse.Action):
    """Raises ValueError for an unsupported flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise ValueError(f"{option_string}, a flag of timm's train.py, is not supported: {REFUSED[self.dest]}")


def add_timm_flags(parser: argparse.ArgumentParser) -> None:
    """Add timm's flags without effect and unsupported ones, hidden from the help."""
    for table, action in ((PASSED_OVER, _PassOver), (REFUSED, _Refuse)):
        for name in table:
            options = {f"--{name.replace('_', '-')}": None, **dict.fromkeys(MORE_NAMES.get(name, ()))}
            values = "*" if table is REFUSED else 0 if name in SWITCHES else None
            parser.add_argument(
                *options,
                dest=name,
                nargs=values,
                action=action,
                default=argparse.SUPPRESS,
                choices=["kl"] if name == "kd_loss_type" else None,
                help=argparse.SUPPRESS,
            )
