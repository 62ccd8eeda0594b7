"""Merge `pip freeze` outputs of several Pythons into constraints.txt.

    for each Python X.Y:  pip install -e '.[demo,dev]' in a fresh environment, pip freeze > freeze-X.Y.txt
    python scripts/build_constraints.py freeze-3.10.txt freeze-3.11.txt freeze-3.13.txt

A version that differs between Pythons gets a marker; one file's Python rules until the next one's.
"""

import re
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "constraints.txt"
# Whichever build of torch is installed brings its own.
SKIPPED = re.compile(r"^(nvidia|cuda|triton|spryfl|pip|setuptools)\b|^(nvidia|cuda)-")


def read(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if "==" in line]
    pairs = [line.split("==") for line in lines]
    return {name.lower(): version.partition("+")[0] for name, version in pairs if not SKIPPED.match(name.lower())}


def main(paths: list[Path]) -> None:
    found = [(tuple(map(int, re.findall(r"\d+", p.stem)[:2])), read(p)) for p in paths]
    found.sort()
    lines = ["# Exact versions for `make`, from scripts/build_constraints.py. Ranges are in pyproject.toml."]
    for name in sorted({name for _, versions in found for name in versions}):
        spans: list[tuple[str, list[tuple[int, ...]]]] = []
        for python, versions in found:
            version = versions.get(name)
            if version is None:
                continue
            if spans and spans[-1][0] == version:
                spans[-1][1].append(python)
            else:
                spans.append((version, [python]))
        for index, (version, _) in enumerate(spans):
            low = None if index == 0 else spans[index][1][0]
            high = None if index == len(spans) - 1 else spans[index + 1][1][0]
            limits = [f"python_version >= '{low[0]}.{low[1]}'"] if low else []
            limits += [f"python_version < '{high[0]}.{high[1]}'"] if high else []
            lines.append(f"{name}=={version}" + (f"; {' and '.join(limits)}" if limits else ""))
    TARGET.write_text("\n".join(lines) + "\n")
    print(f"{TARGET}: {len(lines) - 1} pins")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
