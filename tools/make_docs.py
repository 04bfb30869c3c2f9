"""Write docs/cli.md from the commands' own help, and check that every relative link in Markdown leads somewhere.

python tools/make_docs.py [--check]     --check writes nothing and fails if docs/cli.md is out of date
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
COMMANDS = (
    *("compare", "train", "plan", "recommend", "report"),
    *("generate", "serve", "eval", "merge", "export", "validate", "env", "doctor"),
)


def cli_page() -> str:
    """The page, from `--help` of every command at a fixed width."""
    os.environ.update({"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    from typer.testing import CliRunner

    from spectune.cli.app import build_app

    parts = ["# The command line", "Made by `make docs` from the commands' own help."]
    for command in ("", *COMMANDS):
        arguments = [command, "--help"] if command else ["--help"]
        result = CliRunner().invoke(build_app(), arguments, prog_name="spectune")
        if result.exit_code != 0:
            raise SystemExit(f"spectune {' '.join(arguments)}: {result.output}")
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts += [f"## spectune {command}".rstrip(), f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def broken_links() -> list[str]:
    """`file:line: link` for each relative link that leads nowhere."""
    found = []
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")]
    for page in sorted(pages):
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            for link in re.findall(r"\]\(([^)\s]+)\)", line):
                target = link.partition("#")[0]
                elsewhere = not target or "://" in link or link.startswith("mailto:")
                if not elsewhere and not (page.parent / target).exists():
                    found.append(f"{page.relative_to(ROOT)}:{number}: {link}")
    return found


def main() -> int:
    page = cli_page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            print(f"{PAGE.relative_to(ROOT)} is out of date: run `make docs`", file=sys.stderr)
            return 1
    else:
        PAGE.parent.mkdir(parents=True, exist_ok=True)
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    broken = broken_links()
    for link in broken:
        print(f"broken link: {link}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
