"""Run every benchmark that needs nothing but this package, one after the other, and write the tables of the docs anew.

    python benchmarks/run_all.py

About an hour on two idle cores; beside other work its figures mean nothing. What needs photos, trained weights or
the original framework is run by hand: `classify_many.py`, `serve_load.py`, `input_pipeline.py`, `int8.py` and
`original.py`.
"""

import subprocess
import sys
from pathlib import Path

SCRIPTS = ("inference", "operators", "forms", "cold_start", "train_step")


def main() -> None:
    """Run the scripts; one that fails ends it."""
    here = Path(__file__).parent
    for script in SCRIPTS:
        out = here / "results" / f"{script}.json"
        subprocess.run([sys.executable, str(here / f"{script}.py"), "--out", str(out)], check=True)
    subprocess.run([sys.executable, str(here.parent / "scripts" / "update_pages.py")], check=True)


if __name__ == "__main__":
    main()
