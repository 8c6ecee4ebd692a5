"""Print the lowest version of every dependency that pyproject.toml allows, as pip takes it."""
import re
from pathlib import Path

text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
dependencies = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
print(*(f"{name}=={version}" for name, version in re.findall(r'"([\w-]+)>=([\d.]+)"', dependencies)))
