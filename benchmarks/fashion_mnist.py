"""The original files of Fashion-MNIST, read by the script that made the images in examples/data.

apt-get install dataset-fashion-mnist
"""

import runpy
from pathlib import Path

_script = runpy.run_path(str(Path(__file__).parents[1] / "examples/data/make_fashion_mnist.py"))
CLASSES: list[str] = _script["CLASSES"]
read_idx = _script["read_idx"]
"""Of the file's name and the bytes of its header: its bytes as an array."""
