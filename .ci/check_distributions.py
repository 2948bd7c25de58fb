"""Check what the wheel and the sdist hold: `python .ci/check_distributions.py DIST`, from the repository root."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MAX_WHEEL_BYTES = 15_000_000


def tracked(*folders: str) -> set[str]:
    """Return the files under version control, below these folders or everywhere."""
    return set(subprocess.check_output(["git", "ls-files", *folders], text=True).splitlines())


def check_wheel(path: Path) -> list[str]:
    """Return what is wrong with the wheel: it must hold all of src/weightnet, its metadata, and nothing else."""
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name.removeprefix("src/") for name in tracked("src")}
    problems = [f"{path.name} lacks {name}" for name in sorted(expected - names)]
    problems += [f"{path.name} must not hold {name}" for name in sorted(names - expected)]
    if path.stat().st_size >= MAX_WHEEL_BYTES:
        problems.append(f"{path.name} must have less than {MAX_WHEEL_BYTES} bytes. Got {path.stat().st_size}.")
    return problems


def check_sdist(path: Path) -> list[str]:
    """Return what is wrong with the sdist: it must hold every file under version control, so that its tests run."""
    with tarfile.open(path) as sdist:
        names = {member.name.partition("/")[2] for member in sdist.getmembers()}
    return [f"{path.name} lacks {name}" for name in sorted(tracked() - names)]


def main() -> int:
    """Check the one wheel and the one sdist in a folder."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    problems = check_wheel(wheel) + check_sdist(sdist)
    print(
        "\n".join(problems) or f"wheel {wheel.stat().st_size:,} bytes, sdist {sdist.stat().st_size:,} bytes: complete"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
