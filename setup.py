"""The description on the package index: README.md, whose relative links lead nowhere there.

While pyproject.toml names no repository, a link becomes its text and the name of the page, and pictures are left out.
"""

import re
from pathlib import Path

from setuptools import setup

LINK = re.compile(r"(!?)\[([^][]*)\]\((?!https?://)([^()]*)\)")
PAGES = "\nThe pages and files named here are in the source distribution.\n"


def describe(readme: str, repository: str | None) -> str:
    """README.md with absolute links to a repository, or without links to its files."""

    def absolute(link: re.Match) -> str:
        picture, text, target = link.groups()
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    def plain(link: re.Match) -> str:
        picture, text, target = link.groups()
        page = target.split("#")[0]
        return "" if picture else text if text == page else f"{text} ({page})"

    return LINK.sub(absolute, readme) if repository else LINK.sub(plain, readme) + PAGES


if __name__ == "__main__":
    folder = Path(__file__).parent
    address = re.search('^Repository = "(.+?)/?"$', (folder / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    setup(
        long_description=describe((folder / "README.md").read_text("utf-8"), address and address[1]),
        long_description_content_type="text/markdown",
    )
