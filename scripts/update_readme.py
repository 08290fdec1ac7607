"""Put the files that commands wrote into the documents, between `<!-- figures: FILE -->` and `<!-- end -->`.

python scripts/update_readme.py [--check]     --check changes nothing and fails where a document is out of date.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/captures.md", "docs/prior.md")
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, root: Path = ROOT) -> str:
    """The text with every block holding its file's content."""
    return BLOCK.sub(lambda m: f"{m[1]}{(root / m[2]).read_text().strip()}\n{m[3]}", text)


def main() -> None:
    """Update the documents, or check them."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        new = filled(text)
        if "--check" not in sys.argv[1:]:
            (ROOT / name).write_text(new)
        elif new != text:
            sys.exit(f"{name} is out of date: run python scripts/update_readme.py")


if __name__ == "__main__":
    main()
