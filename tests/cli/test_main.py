import fcntl
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import warnings
from pathlib import Path

import pytest

from weightnet import __version__, cli
from weightnet.errors import WeightsWarning

EXPECT = Path(__file__).parents[1] / "expect" / "cli"
HELP = ("", "predict", "models", "convert", "evaluate", "export", "serve", "classify-many", "train")


# A variable that some machines set, and that hides what is left in buffers.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def process(*arguments: object, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "weightnet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("command", HELP)
def test_help_is_the_recorded_text(weightnet, command):
    outcome = weightnet(*command.split(), "--help")
    expected = (EXPECT / f"help{'_' if command else ''}{command}.txt").read_text(encoding="utf-8")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == expected, "the help changed: run scripts/update_expected_cli.py and review the difference"


def test_version_is_the_packages(weightnet):
    assert weightnet("--version") == (0, f"weightnet {__version__}\n", "")


@pytest.mark.parametrize("arguments", ["--help", "--version", "models", "models --json", "predict --help"])
def test_quick_commands_import_nothing_slow(arguments):
    code = (
        "import sys; from weightnet.cli import main; main(sys.argv[1:]); "
        "print(*({'torch', 'cv2', 'PIL', 'pooch', 'requests'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, timeout=60, check=True)
    assert done.stderr.split() == []


def test_help_takes_less_than_half_a_second_of_cpu():
    def used_s() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    before = used_s()
    assert process("--help").returncode == 0
    assert used_s() - before < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian", 'Did you mean "train"?'),
        ("predict a.jpg --jsno", "Did you mean --json?"),
        ("predict a.jpg -k five", 'unable to convert "five" into int'),
        ("predict a.jpg --batch-size", "--batch-size"),
        ("convert a.pkl", "OUT"),
        ("convert a.pkl b.safetensors --pixels rwa", 'Did you mean "raw"?'),
        ("models a b", "Unused Tokens"),
        ("evaluate default data --reprot a.html", "Did you mean --report?"),
        ("train --epohcs 3", "Did you mean --epochs?"),
    ],
)
def test_main_says_what_is_wrong_with_the_arguments(weightnet, arguments, message):
    outcome = weightnet(*arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("weightnet: usage: ")
    assert message in outcome.err
    command = arguments.split()[0] if arguments.split()[0] != "trian" else ""
    assert outcome.err.endswith(f"\nSee `weightnet {command}{' ' if command else ''}--help`.\n")


def test_main_names_the_kind_of_error_and_escapes_its_text(weightnet, photos, tmp_path):
    (tmp_path / "bad\x1b[31m.safetensors").write_bytes(b"garbage")
    for model, code, kind in [
        ("no\x1b[31msuch", 2, "unknown model"),
        ("bad\x1b[31m.safetensors", 2, "weights"),
        ("shufflenet_v2_x0_5.plain", 2, "usage"),
    ]:
        outcome = weightnet("predict", "a.png", "--model", model, "--json")
        assert (outcome.code, outcome.out) == (code, "")
        assert outcome.err.startswith(f"weightnet: {kind}: ")
        assert "\x1b" not in outcome.err


def test_main_reports_a_failed_download(weightnet, photos, monkeypatch):
    monkeypatch.setattr("weightnet.zoo.hub.BACKOFF_S", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(photos))
    outcome = weightnet("predict", "a.png", "--model", "http://127.0.0.1:9/weights.safetensors")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("weightnet: download: ")


def fail_with(error: BaseException):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_main_asks_to_report_a_bug(capsys, monkeypatch):
    monkeypatch.setattr("weightnet.zoo.cards.embedded_models", fail_with(ZeroDivisionError("oh")))
    assert cli.main(["models"]) == 70
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oh" in err
    assert err.endswith("weightnet: this is a bug of weightnet. Please report it with the lines above.\n")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "weightnet: interrupted.\n"),
        (BrokenPipeError(), 141, ""),
        (OSError(28, "No space left on device", "x"), 1, "weightnet: the system says: [Errno 28] No space left on "),
    ],
)
def test_main_ends_quietly_on_what_is_no_bug(weightnet, monkeypatch, error, code, message):
    monkeypatch.setattr("weightnet.zoo.cards.embedded_models", fail_with(error))
    outcome = weightnet("models")
    assert outcome.code == code
    assert outcome.err.startswith(message)
    assert bool(outcome.err) == bool(message)


def test_main_shows_warnings_about_weights_as_notes(weightnet, monkeypatch):
    def warn():
        warnings.warn("they want raw pixels", WeightsWarning, stacklevel=2)
        return {}

    monkeypatch.setattr("weightnet.zoo.cards.embedded_models", warn)
    assert weightnet("models", "*plain").err == "weightnet: note: they want raw pixels\n"


def test_main_survives_without_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["models", "nothing"]) == 2
    monkeypatch.setattr(sys, "stderr", fail := io.StringIO())
    fail.close()
    assert cli.main(["models", "nothing"]) == 2
    assert capsys.readouterr().out == ""


def test_main_needs_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["models"]) == 2
    assert "Standard output must be open" in capsys.readouterr().err


def test_process_ends_quietly_when_its_reader_goes_away():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "weightnet", "models"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, check=False, env=BUFFERED)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
@pytest.mark.parametrize("arguments", [["models"], ["--help"]])
def test_process_says_that_the_disk_is_full(arguments):
    command = [sys.executable, "-m", "weightnet", *arguments]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=60, check=False, env=BUFFERED)
    assert done.returncode == 1
    assert done.stderr.startswith(b"weightnet: the system says: [Errno 28] No space left on device")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.full
def test_process_can_be_interrupted_while_it_waits_for_a_photo(run_folder):
    command = [sys.executable, "-m", "weightnet", "predict", "-", "--model", str(run_folder)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as child:
        try:
            wait_until_it_reads(child)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, out, err) == (130, b"", b"weightnet: interrupted.\n")


def wait_until_it_reads(child: subprocess.Popen) -> None:
    """Write a byte to a process's standard input and wait until it is taken."""
    child.stdin.write(b"x")
    child.stdin.flush()
    for _ in range(1000):
        (waiting,) = struct.unpack("i", fcntl.ioctl(child.stdin, termios.FIONREAD, struct.pack("i", 0)))
        if not waiting:
            return
        time.sleep(0.1)
    child.kill()
    pytest.fail(f"the process never read its standard input: {child.communicate()}")
