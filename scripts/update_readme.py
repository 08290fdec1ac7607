"""Put the files that commands wrote into README.md, between `<!-- figures: FILE -->` and `<!-- end -->`.

python scripts/update_readme.py [--check]     --check changes nothing and fails where README.md is out of date.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every block holding its file's content."""
    return BLOCK.sub(lambda m: f"{m[1]}{(root / m[2]).read_text().strip()}\n{m[3]}", text)


def main() -> None:
    """Update README.md, or check it."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(text)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is out of date: run python scripts/update_readme.py" if new != text else 0)
    readme.write_text(new)


if __name__ == "__main__":
    main()
