"""recipes: flags of published training runs, by name."""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """Return the file that --config names: a YAML file, or a recipe of this package.

    Raises:
        FileNotFoundError: neither exists.
    """
    path, recipe = Path(name), FOLDER / f"{name}.yaml"
    if path.is_file():
        return path
    if recipe.parent == FOLDER and recipe.is_file():
        return recipe
    names = [path.stem for path in FOLDER.glob("*.yaml")]
    close = difflib.get_close_matches(path.stem, names, 1)
    hint = f"; did you mean the recipe {close[0]}?" if close else "; timm-selfdistill recipes lists the names"
    raise FileNotFoundError(f"{name} does not exist; --config takes a YAML file or the name of a recipe{hint}")


def print_recipes() -> None:
    """Print a table of the recipes and what they train."""
    rows = [("recipe", "what it trains")]
    for path in sorted(FOLDER.glob("*.yaml")):
        rows.append((path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")))
    width = max(len(name) for name, _ in rows)
    for name, what in rows:  # not a rich table, which truncates names in narrow terminals
        print(f"{name:{width}}  {what}")
