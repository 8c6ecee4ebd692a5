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
    "fuser": "it is of TorchScript, which is not used",
}
"""By their names, and why they change nothing here."""
REFUSED = {
    "dataset_download": "data sets are not downloaded from torchvision or TFDS; give --dataset with the id of one on"
                        " the Hub, or --data-dir",
    "dataset_trust_remote_code": "code of a data set is never run; give one with files of images or parquet",
    "input_img_mode": "images are read as the network takes them: --in-chans 1 reads grey, 3 RGB",
    "train_num_samples": "the number of images is found; --steps-per-epoch sets the length of an epoch of a stream",
    "val_num_samples": "all validation images are measured; give fewer with another --val-split",
    "torchscript": "torch.jit cannot script several exits; --torchcompile compiles them",
    "fast_norm": "it computes layer norm in half precision; --amp leaves it in float32",
    "device_modules": "Accelerate finds the devices",
    "no_ddp_bb": "DistributedDataParallel's buffers are handled by --dist-bn",
    "drop_connect": "it is deprecated in timm, too; give --drop-path",
    "model_ema_force_cpu": "the average stays on the device, where it is evaluated",
    "no_resume_opt": "--resume goes on exactly; to start anew from the weights give --initial-checkpoint",
    "start_epoch": "--resume goes on where the run stood; to start anew from the weights give --initial-checkpoint",
    "recovery_interval": "give --checkpoint-interval, in updates or as a time",
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
    "kd_distill_type": "--method kd distills logits, --method fitnet and at features",
    "kd_loss_type": "--method kd has one loss, timm's",
    "kd_student_feature_dim": "the methods that compare features find their sizes",
    "kd_teacher_feature_dim": "the methods that compare features find their sizes",
    "class_map": "the classes are the folders, in natural order; link or rename these",
    "device": "Accelerate finds it; set CUDA_VISIBLE_DEVICES, or ACCELERATE_USE_CPU=1 for the CPU",
    "model_dtype": "weights are in full precision; give --amp --amp-dtype bfloat16",
    "epoch_repeats": "an epoch is all images once; give more --epochs",
    "warmup_prefix": "the warm-up is a part of --epochs; add its epochs to them",
    "cooldown_epochs": "the run ends with its schedule; give --min-lr",
    "patience_epochs": "it belongs to the schedule plateau, which is not supported; give another --sched",
    "aug_repeats": "repeated augmentation is not supported yet; leave it out",
    "aug_splits": "augmentation splits are not supported yet; leave them out",
    "jsd_loss": "augmentation splits are not supported yet; leave it out",
    "resplit": "augmentation splits are not supported yet; leave it out",
    "split_bn": "augmentation splits are not supported yet; leave it out",
    "val_interval": "every epoch is measured and saved",
    "eval_metric": "the best model is that of the highest top-1 of the deepest exit",
    "kd_token_distill_type": "distillation tokens are not supported; --method kd distills logits",
}
"""By their names, why they cannot be done and what to do."""
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
            parser.add_argument(*options, dest=name, nargs="*", action=action, default=argparse.SUPPRESS,
                                help=argparse.SUPPRESS)
