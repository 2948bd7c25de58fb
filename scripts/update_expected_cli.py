"""Write the texts that the tests of the command line compare with: run this after changing a command, and review.

python scripts/update_expected_cli.py
"""

import contextlib
import io
import os
from pathlib import Path

from weightnet.cli import main

FOLDER = Path(__file__).parents[1] / "tests" / "expect" / "cli"
TEXTS = {
    "help.txt": ["--help"],
    **{
        f"help_{name}.txt": [name, "--help"]
        for name in ("predict", "models", "convert", "evaluate", "export", "serve", "classify-many", "train")
    },
    "models.txt": ["models", "shufflenet*"],
}


def text_of(arguments: list[str]) -> str:
    """Return what the command line writes for these arguments, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(io.StringIO()) as written:
        code = main(arguments)
    assert code == 0, f"weightnet {' '.join(arguments)} gave exit code {code}"
    return written.getvalue()


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, arguments in TEXTS.items():
        (FOLDER / name).write_text(text_of(arguments), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
