"""Run the commands of a Markdown document and replace its output blocks.

    python docs/refresh.py docs/TUTORIAL_zh.md            rewrite the outputs
    python docs/refresh.py docs/TUTORIAL_zh.md --check    only run the commands

A ```bash block that is directly followed by a ```text block runs in the repository's root, and its output replaces the
content of the ```text block. Other ```bash blocks are not run. If a command fails, the exit code is 1 and the document
is unchanged.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.exits import TrainingStopped, run
from Config import OneLineParser, UserError

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.compile(r"^```bash\n(?P<command>(?:(?!```).*\n)*)```\n\n?"
                    r"```text\n(?P<output>(?:(?!```).*\n)*)```$", re.MULTILINE)


def output_of(command: str) -> str:
    """The stdout of a bash command. Raises TrainingStopped, with exit code 1, when it fails."""
    folder = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # the same python
    result = subprocess.run(["bash", "-e", "-c", command], cwd=ROOT, env=os.environ | {"PATH": folder},
                            capture_output=True, encoding="utf-8", errors="replace")
    if result.returncode:
        raise TrainingStopped(f"exit code {result.returncode}: {command}{result.stderr}", 1)
    return "".join(line.rstrip() + "\n" for line in result.stdout.splitlines())


def refreshed(document: str) -> str:
    """The document with the current output of each command."""
    def run_block(match: re.Match) -> str:
        print(f"$ {match['command']}", end="", flush=True)
        before, after = match.start("output") - match.start(), match.end("output") - match.start()
        return match.group()[:before] + output_of(match["command"]) + match.group()[after:]

    return BLOCKS.sub(run_block, document)


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(prog="docs/refresh.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("document", help="a Markdown file")
    parser.add_argument("--check", action="store_true", help="run every command, but do not change the document")
    args = parser.parse_args(argv)
    path = Path(args.document)
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    after = refreshed(before)
    if args.check:
        print("all commands succeeded")
    elif after == before:
        print(f"{path}: up to date")
    else:
        path.write_text(after, encoding="utf-8", newline="\n")
        print(f"{path}: outputs replaced")


if __name__ == "__main__":
    sys.exit(run(main))
