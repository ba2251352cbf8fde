"""Names commands to go on with where a run is finished."""

import shlex

from bltjax.checkpoints.run_directory import RunDirectory


def next_steps(directory: RunDirectory, prompt: str) -> str:
    """Returns commands that use the models of a working directory, a line each.

    prompt: what text begins with in the command that generates it.
    """
    checkpoint = f"--checkpoint={shlex.quote(str(directory.path))}"
    lines = dict(
        generate=f"{checkpoint} --prompt={shlex.quote(prompt)} --temperature=0.8 "
        "--max_new_bytes=200",
        evaluate=f"{checkpoint} --data=FILE_OR_FOLDER",
        patches=f"{checkpoint} --input=FILE",
    )
    if directory.evaluated() == "entropy_model":  # the text models are not trained yet
        lines = dict(train=f"--config=NAME --workdir={shlex.quote(str(directory.path))}")
    elif directory.evaluated() == "token_model":
        del lines["patches"]
    return "\n".join(["next:", *(f"  bltjax {name} {rest}" for name, rest in lines.items())])
