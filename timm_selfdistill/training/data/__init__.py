"""From what is on the disk to batches."""
