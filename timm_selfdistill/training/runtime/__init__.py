"""What a run runs on: devices, processes, signals, progress."""
