"""The flags of timm's train.py that are known here, but change nothing, or cannot be done."""

import argparse
import warnings
from typing import Any

PASSED_OVER = {
    "pin_mem": "memory is pinned where there is a GPU",
    "no_prefetcher": "there is no prefetcher: images are normalised in the DataLoader workers",
    "worker_seeding": "augmentation depends on seed, epoch and position alone",
    "use_multi_epochs_loader": "DataLoader workers live on from epoch to epoch",
    "local_rank": "launchers tell it in the environment",
    "synchronize_step": "it changes no result",
    "val_num_samples": "a stream for validation is read to its end",
    "kd_loss_type": "timm has one, kl",
    "fuser": "it is of TorchScript, which is not used",
}
"""By their names, and why they change nothing here."""
REFUSED = {
    "dataset_download": "data sets are not downloaded from torchvision or TFDS; give --dataset with the id of one on"
    " the Hub, or --data-dir",
    "dataset_trust_remote_code": "code of a data set is never run; give one with files of images or parquet",
    "input_img_mode": "images are read as the network takes them: --in-chans 1 reads grey, 3 RGB",
    "torchscript": "torch.jit cannot script several exits; --torchcompile compiles them",
    "fast_norm": "it computes layer norm in half precision; --amp leaves it in float32",
    "device_modules": "Accelerate finds the devices",
    "no_ddp_bb": "DistributedDataParallel's buffers are handled by --dist-bn",
    "drop_connect": "it is deprecated in timm, too; give --drop-path",
    "model_ema_force_cpu": "the average stays on the device, where it is evaluated",
    "save_images": "batches of images are not saved; summary and pictures are in the run directory",
    "tta": "validation looks at each image once",
    "wandb_resume_id": "a resumed run goes on in W&B by itself",
    "train_img_sizes": "the size stays the same for the whole run; train in several with --img-size and"
    " --initial-checkpoint",
    "train_batch_sizes": "the size of a batch stays the same for the whole run; give --batch-size",
    "train_size_probs": "it belongs to --train-img-sizes, which is not supported",
    "train_size_schedule": "it belongs to --train-img-sizes, which is not supported",
    "train_size_schedule_spread": "it belongs to --train-img-sizes, which is not supported",
    "train_size_random_mix": "it belongs to --train-img-sizes, which is not supported",
    "train_batches_per_epoch": "an epoch is all images once; of a stream give --steps-per-epoch",
    "variable_batch_loss_scale": "it belongs to --train-img-sizes, which is not supported",
    "naflex_loader": "NaFlex models take patches of images of any shape; take the same network for one size",
    "naflex_train_seq_lens": "it belongs to --naflex-loader, which is not supported",
    "naflex_max_seq_len": "it belongs to --naflex-loader, which is not supported",
    "naflex_patch_sizes": "it belongs to --naflex-loader, which is not supported",
    "naflex_patch_size_probs": "it belongs to --naflex-loader, which is not supported",
    "naflex_loss_scale": "it belongs to --naflex-loader, which is not supported",
    "naflex_patchify_channels_first": "it belongs to --naflex-loader, which is not supported",
    "model_dtype": "weights stay in full precision, in which they are measured and saved; give --amp --amp-dtype"
    " bfloat16",
}
"""By their names, why they cannot be done and what to do."""
SWITCHES = {"pin_mem", "no_prefetcher", "use_multi_epochs_loader", "synchronize_step"}
"""Those of the flags that change nothing that have no value."""
MORE_NAMES = {"train_batches_per_epoch": ["--train-steps-per-epoch"], "local_rank": ["--local_rank"]}


class _PassOver(argparse.Action):
    """Says that a flag changes nothing."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        warnings.warn(f"{option_string} changes nothing here: {PASSED_OVER[self.dest]}", stacklevel=2)


class _Refuse(argparse.Action):
    """Ends the command."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise ValueError(f"{option_string}, a flag of timm's train.py, is not supported: {REFUSED[self.dest]}")


def add_timm_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that are not in the help."""
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
