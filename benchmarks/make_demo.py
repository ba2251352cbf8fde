"""Makes the model in the package: `python -m benchmarks.make_demo --workdir=W --corpus=PATH`.

Trains configs/demo.py in W (kill it and run it again: it resumes), writes the weights in bfloat16,
measures them on the held-out documents of each source, puts them into bltjax/demo/ with what was
measured on their card, and draws docs/pictures/patches.png. Further arguments, such as
--config.blt_training.steps=600, go to the training. `--format=bltjax` is for a model that Hugging
Face's format cannot express.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

import bltjax
from bltjax.checkpoints.demo import DIRECTORY
from bltjax.checkpoints.pytorch.convert import FORMATS, convert
from bltjax.checkpoints.run_directory import RunDirectory
from bltjax.config import TrainingConfig
from bltjax.data.records.store import Documents, open_store
from bltjax.evaluation.patch_use import DISTURBED

ROOT = Path(__file__).parents[1]
CARD, PICTURE = "README.md", ROOT / "docs" / "pictures" / "patches.png"
MEASURED = ("<!-- written by benchmarks/make_demo.py -->\n", "<!-- end of it -->\n")
PICTURED = "for name, value in self.items():  # short where text is hard"
PROMPTS = ("import os\n\n\ndef ", ".. function:: ", "And the king said unto ")
DRAWN = dict(max_new_bytes=200, temperature=0.7, top_p=0.9, seed=1)
TEXT = """\
{date}: {parameters:,} parameters in bfloat16, {size:,} bytes of files. The entropy model read
{entropy_model}, the BLT {blt}; the last start of the
run took {minutes:.0f} minutes on {cores} CPU cores ({versions}).

Held-out documents, as these weights score them, each on its own:

| source | bytes | bits per byte | `xz -9` | bytes per patch |
|---|---|---|---|---|
{table}

Use of patches (docs/evaluation.md#patch-use): bits per byte more with latents {use}.

N-gram models of the training text, and `xz -9` of everything at once, need {baselines}.

Drawn with temperature {temperature}, `top_p={top_p}` and seed {seed}:

{samples}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of the training run")
    parser.add_argument("--corpus", type=Path, required=True, help="documentation and Bible")
    parser.add_argument("--format", choices=FORMATS, default="hf", help="of the weights")
    chosen, settings = parser.parse_known_args()
    train(chosen.workdir, chosen.corpus, settings)
    with tempfile.TemporaryDirectory() as scratch:
        export, texts = Path(scratch, "demo"), Path(scratch, "held_out")
        convert(chosen.workdir, export, chosen.format, dtype="bfloat16")
        write_held_out(chosen.workdir / "records", texts)
        options = f"--checkpoint={export}", f"--data={texts}", "--kind=bytes"
        measured = bltjax_command("evaluate", *options)
        install(export, measured_text(RunDirectory(chosen.workdir), export, measured))
        draw_picture(Path(scratch, "sentence.txt"))


def train(workdir: Path, corpus: Path, settings: list[str]):
    """Trains the run, or finishes it; does nothing where it is done."""
    if RunDirectory(workdir).result.exists():
        return
    config = f"--config={ROOT / 'configs' / 'demo.py'}:{corpus}"
    command = [sys.executable, "-m", "bltjax.train", config, f"--workdir={workdir}", *settings]
    subprocess.run(command, cwd=ROOT, check=True)


def bltjax_command(name: str, *arguments: str) -> dict:
    """Runs a command and returns its last line."""
    command = [sys.executable, "-m", f"bltjax.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_held_out(records: Path, folder: Path):
    """Writes the held-out documents as files, in a directory for each source."""
    store = open_store(records)
    for source in store.sources:
        (folder / source).mkdir(parents=True)
        documents = Documents(store.shards(source, "validation"), entropies=False)
        for i, document in enumerate(documents):
            (folder / source / f"{i:05d}").write_bytes(document.data)


def measured_text(run: RunDirectory, export: Path, measured: dict) -> str:
    """Returns the part of the card that changes with the weights."""
    result, config = json.loads(run.result.read_text()), run.config()
    baselines = [f"{bits:.3f} ({name})" for name, bits in result["baselines"].items()]
    rows = [*measured["sources"].items(), ("all", measured)]
    return TEXT.format(
        date=datetime.date.today(),
        parameters=sum(counted["total"] for counted in result["parameters"].values()),
        size=sum(p.stat().st_size for p in export.rglob("*") if p.is_file() and p.name != CARD),
        entropy_model=read(config.entropy_training),
        blt=read(config.blt_training),
        minutes=result["seconds"] / 60,
        cores=os.cpu_count(),
        versions=f"Python {platform.python_version()}, JAX {jax.__version__}",
        table="\n".join(table_row(name, of) for name, of in rows),
        use=", ".join(f"{measured['patch_use'][n]:.3f} {words}" for n, words in DISTURBED.items()),
        baselines=", ".join(baselines).replace("_", " "),
        samples="\n\n".join(f"```text\n{text}\n```" for text in samples(export)),
        **DRAWN,
    )


def read(training: TrainingConfig) -> str:
    rows = f"{training.batch_size} rows of {training.row_bytes:,} bytes"
    return f"{training.steps:,} batches of {rows}"


def table_row(name: str, of: dict) -> str:
    bits = f"{of['bits_per_byte']:.3f} | {of['xz_bits_per_byte']:.3f}"
    return f"| {name} | {of['num_bytes']:,} | {bits} | {of['mean_patch_bytes']:.2f} |"


def samples(export: Path) -> list[str]:
    """Returns each prompt with what the model writes after it."""
    model = bltjax.load(export)
    written = model.generate(PROMPTS, **DRAWN, valid_utf8=True)
    texts = [prompt + text.decode() for prompt, text in zip(PROMPTS, written, strict=True)]
    return ["\n".join(line.rstrip() for line in text.splitlines()) for text in texts]


def install(export: Path, measured: str):
    """Puts weights into the package, in the place of those that are there, with their card."""
    card = (DIRECTORY / CARD).read_text()
    before, rest = card.split(MEASURED[0])
    _, after = rest.split(MEASURED[1])
    for path in DIRECTORY.iterdir():
        if path.name != CARD:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(export, DIRECTORY, dirs_exist_ok=True)
    (DIRECTORY / CARD).write_text(before + MEASURED[0] + measured + MEASURED[1] + after)


def draw_picture(sentence: Path):
    sentence.write_text(PICTURED + "\n")
    bltjax_command("patches", "--checkpoint=demo", f"--input={sentence}", f"--png={PICTURE}")


if __name__ == "__main__":
    main()
