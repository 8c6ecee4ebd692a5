"""Print the lowest version that pyproject.toml allows of the dependencies and of the extra "onnx"."""

import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
dependencies = "".join(re.findall(r"^(?:dependencies|onnx) = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL))
print(*(f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies)))
