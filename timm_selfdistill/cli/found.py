"""What a run says of its images before it begins."""
import argparse

from ..training import ImageSplits


def found_lines(
        images: ImageSplits, input_size: tuple[int, int, int], fitted: bool, args: argparse.Namespace,
) -> list[str]:
    """A line for each split, and one that says how images are read.

    Args:
        input_size: (channels, height, width) of the network.
        fitted: whether its size is that of the images, which are smaller than its own.
        args: flags of training.
    """
    channels, *size = input_size
    height, width = images.size
    if args.img_size:
        reason = "--img-size"
    elif fitted:
        reason = f"the median image has {width} x {height}"
    else:
        reason = "the model's size"
    lines = [*images.lines(), f"read at {size[1]} x {size[0]} pixels ({reason}), {channels} channels"]
    if images.sample.grey and channels == 3:
        lines.append("all images that were looked at are grey: --in-chans 1 would do")
    return lines
