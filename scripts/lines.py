"""Print the lines of Python of each room of the package, and of the reading path of CONTRIBUTING.

python -m scripts.lines
"""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    package, rooms = ROOT / "medsyn_jax", Counter()
    for path in sorted(package.rglob("*.py")):
        rooms[str(path.parent.relative_to(ROOT))] += count(path)
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.partition("## The reading path")[2].partition("\n## ")[0]
    files = re.findall(r"`([\w/]+\.py)`", section)
    for room, lines in rooms.items():
        print(f"{room:32} {lines:6}")
    print(f"{'all':32} {rooms.total():6}")
    print(f"{'the reading path':32} {sum(count(package / name) for name in files):6}")


def count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    main()
