"""How every command ends when it is interrupted, or its streams are closed: a line and a code.

The list of commands is that of the package: a new one must be given arguments here.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bltjax.cli import COMMANDS
from tests import directories, llamas, processes

NAMES = sorted(path.stem for path in COMMANDS.glob("[!_]*.py"))
ENDING = [name for name in NAMES if name != "serve"]  # by themselves; serving/test_faults.py has it
STARTED = 1 << (signal.SIGTERM - 1)  # in SigCgt: the command handles SIGTERM from now on
MOST_LINES = 3
INTERRUPTED, TERMINATED, PIPE, SAVED = 130, 143, 141, 75


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, a corpus and a text, made once."""
    root = tmp_path_factory.mktemp("endings")
    directories.meta_with_entropy_model(root / "model")
    llamas.write(root / "llama")
    processes.write_corpus(root / "corpus")
    (root / "text").write_bytes(b"some text, \xff\n" * 40)
    return root


ENTROPY_MODEL = ("dim=48", "num_layers=2", "window=8", "ffn_multiple_of=16")  # the golden one


def arguments(name: str, files: Path, made: Path) -> list[str]:
    """Arguments with which a command does its work and ends with 0; `made` is not there yet."""
    model, tiny = f"--checkpoint={files / 'model'}", "--config=tests/configs/tiny.py"
    corpus = f"--config.data.root={files / 'corpus'}"
    return {
        "aot": [tiny, "--topology=v5e:2x2", "--config.mesh.data=4"],
        "byteify": [f"--source={files / 'llama'}", f"--target={made}"],
        "chat": [model],
        "convert": [f"--source={files / 'model'}", f"--target={made}", "--format=hf"],
        "evaluate": [model, f"--data={files / 'corpus'}"],
        "generate": [model, "--prompt=ab", "--max_new_bytes=200"],
        "patches": [model, f"--input={files / 'text'}", f"--html={made}"],
        "plan": [tiny, "--chips=2"],
        "preprocess": [
            *(tiny, corpus, f"--workdir={made}"),
            f"--entropy_model={files / 'model' / 'entropy_model'}",
            *(f"--config.entropy_model.transformer.{setting}" for setting in ENTROPY_MODEL),
        ],
        "score": [model, f"--input={files / 'text'}", "--show_patches"],
        "serve": [model, "--port=0"],
        "settings": [],
        "train": [tiny, corpus, f"--workdir={made}", "--config.stages=entropy_model,entropies"],
    }[name]


# Other exit codes of commands: a compiler that is not there, a run that was stopped.
CODE = {"aot": {2}, "train": {SAVED}}


def start(name, files, made, shell="", console=False, **options):
    """The command as a process; shell: redirections, as in "2>&-"."""
    command = [sys.executable, "-m", f"bltjax.{name}"]
    if console:
        command = [sys.executable, "-c", CONSOLE, name]
    words = [*command, *arguments(name, files, made)]
    if shell:
        words = ["bash", "-c", f'exec "$@" {shell}', "bash", *words]
    piped = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    env = dict(processes.environment(), PYTHONUNBUFFERED="")
    return subprocess.Popen(words, cwd=processes.ROOT, env=env, **piped | options)


# The console script, whose path would be that of the installed package.
CONSOLE = "import sys; from bltjax.cli import main; sys.argv[0] = 'bltjax'; main()"


def told(err: bytes) -> list[str]:
    """The lines on stderr, but for progress."""
    lines = err.decode("utf-8", "replace").replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "%|" not in line]


def check(name, process, codes):
    out, err = process.communicate(timeout=300)
    lines, code = told(err), process.returncode
    if code < 0:  # Python gives signals back to the system when a command has ended
        process.returncode = 128 - code  # as shells have it
    assert process.returncode in codes, (name, process.returncode, lines[-5:])
    assert not any("Traceback" in line or "[Errno" in line for line in lines), (name, lines)
    assert len(lines) <= MOST_LINES or process.returncode == 0, (name, lines)
    return out, lines


def wait_for(process, seconds: float, condition=lambda: False):
    """Until the process handles signals, and then for so many seconds, or until the condition."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and not caught(status) & STARTED:
        time.sleep(0.002)
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.002)


def caught(status: Path) -> int:
    with contextlib.suppress(OSError):
        for line in status.read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.split()[1], 16)
    return 0


def leftover(made: Path):
    """Removes what a command has made, and returns its names."""
    found = [path for path in made.parent.iterdir() if made.name in path.name]
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(path.name for path in found)


def test_every_command_has_arguments_here(files, tmp_path):
    for name in NAMES:
        assert arguments(name, files, tmp_path / "made") is not None


FAULTS = {  # redirections, exit codes, whether stdout is what was to be read
    "stdout closed": (">&-", {0}),
    "stderr closed": ("2>&-", {0}),
    "stdin closed": ("<&-", {0}),
    "all closed": ("<&- >&- 2>&-", {0}),
    "stdout full": (">/dev/full", {2}),
    "stderr full": ("2>/dev/full", {0}),
    "broken pipe": ("", {PIPE}),
}


def run_with_fault(name, files, made, fault):
    shell, codes = FAULTS[fault]
    if fault == "broken pipe":
        read, write = os.pipe()
        os.close(read)
        process = start(name, files, made, stdout=write)
        os.close(write)
    else:
        process = start(name, files, made, shell)
    codes = codes | CODE.get(name, set())
    _, lines = check(name, process, codes)
    lines = [line for line in lines if not line.startswith("note: ")]  # what `convert` assumed
    if process.returncode == PIPE:
        assert lines == []
    if process.returncode == 2 and fault == "stdout full" and name != "aot":
        assert lines == [
            "error: standard output cannot be written, no space is left there: free some disk space"
        ]
    leftover(made)


@pytest.mark.parametrize("fault", ["all closed", "stdout full", "stderr full", "broken pipe"])
def test_streams_of_a_command_that_needs_no_jax(fault, files, tmp_path):
    run_with_fault("settings", files, tmp_path / "made", fault)


@pytest.mark.parametrize("number, code", [("SIGINT", INTERRUPTED), ("SIGTERM", TERMINATED)])
def test_signals_while_imports_run(number, code, files, tmp_path):
    for console in (False, True):
        process = start("score", files, tmp_path / "made", console=console)
        wait_for(process, 0.0)
        process.send_signal(signal.Signals[number])
        _, lines = check("score", process, {code})
        assert lines == [f"stopped by {number}"]


def test_a_signal_that_is_ignored_stays_ignored():
    """As for a command that a script starts with nohup, or with & in a shell without jobs."""
    ignoring = ["bash", "-c", 'trap "" INT; exec "$@"', "bash"]
    command = [sys.executable, "-m", "bltjax.settings"]
    env = processes.environment()
    process = subprocess.Popen(
        [*ignoring, *command], cwd=processes.ROOT, env=env, stdout=subprocess.PIPE
    )
    wait_for(process, 0.0)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"learning_rate" in out


# ---- everything, on demand


@pytest.mark.slow
def test_a_reader_that_goes_while_text_is_written(files, tmp_path):
    """`generate ... | head -c 5`"""
    process = start("generate", files, tmp_path / "made")
    assert len(os.read(process.stdout.fileno(), 3)) > 0
    process.stdout.close()
    assert process.wait(timeout=300) == PIPE
    assert told(process.stderr.read()) == []
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ENDING)
def test_every_stream_of_every_command(name, fault, files, tmp_path):
    run_with_fault(name, files, tmp_path / "made", fault)


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [("SIGINT", INTERRUPTED), ("SIGTERM", TERMINATED)])
@pytest.mark.parametrize("name", ENDING)
def test_signals_at_any_moment_of_every_command(name, number, code, files, tmp_path):
    """At six moments from the first to the last: while it imports, reads, compiles and works."""
    started = time.monotonic()
    process = start(name, files, tmp_path / "made")
    check(name, process, {0} | CODE.get(name, set()))
    seconds = time.monotonic() - started
    leftover(tmp_path / "made")
    draw, stopped = random.Random(name), 0
    for moment in range(6):
        process = start(name, files, tmp_path / "made", console=moment % 2 == 1)
        wait_for(process, seconds * (moment + draw.random()) / 6 if moment else 0.0)
        process.send_signal(signal.Signals[number])
        _, lines = check(
            name,
            process,
            {code, 0} | CODE.get(name, set()) | ({SAVED} if name == "train" else set()),
        )
        stopped += lines == [f"stopped by {number}"]
        left = leftover(tmp_path / "made")
        if name == "convert":  # the target, whole, or nothing
            assert left in ([], ["made"]), left
    assert stopped >= 1
