"""Print the lowest version of every dependency that pyproject.toml allows, as pip takes it."""
import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
print(*(re.sub(r">=([\d.]+)$", r"==\1", dependency) for dependency in project["dependencies"]))
