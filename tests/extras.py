"""`python -m tests.extras` prints how much every extra of the distribution adds on disk, as the README says it."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


PROJECT = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]


def needed(lines: list[str], found: set[str]) -> set[str]:
    """The names of the installed packages that some requirements need, with those that they need in turn."""
    for line in lines:
        requirement = Requirement(line)
        wanted = [requirement.marker] if requirement.marker else []
        if not all(marker.evaluate({"extra": ""}) for marker in wanted) or requirement.name in found:
            continue
        try:
            package = distribution(requirement.name)
        except PackageNotFoundError:
            continue
        found.add(requirement.name)
        inner = [each for each in package.requires or [] if "extra ==" not in each]
        inner += [
            each.partition(";")[0]
            for each in package.requires or []
            if any(f'extra == "{extra}"' in each.replace("'", '"') for extra in requirement.extras)
        ]
        needed(inner, found)
    return found


def megabytes(names: set[str]) -> float:
    """The size of all files of some packages, in megabytes."""
    files = [file.locate() for name in names for file in distribution(name).files or []]
    return sum(Path(str(file)).stat().st_size for file in files if Path(str(file)).is_file()) / 1e6


if __name__ == "__main__":
    base = needed(PROJECT["dependencies"], set())
    print(f"without extras: {megabytes(base):.0f} MB, of which torch {megabytes({'torch'}):.0f} MB")
    for extra, lines in PROJECT["optional-dependencies"].items():
        print(f"{extra}: {megabytes(needed(lines, set()) - base):.0f} MB")
