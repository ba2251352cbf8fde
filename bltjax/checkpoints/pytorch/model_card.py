"""The model card of an export: what is known of the model, and what its owner has to fill in."""

from importlib.metadata import version

from bltjax.checkpoints.weights import Weights

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [blt, byte-level, bltjax]
license:  # fill in: that of your training text, and of the weights that you started from
---

# A byte latent transformer

"""
TAIL = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY")
```

```python
import bltjax

model = bltjax.load("DIRECTORY")
```

Ids are bytes + 4; what a text is for the tokenizer is UTF-8.
"""


def card(weights: Weights, num_parameters: int) -> str:
    """Returns the card of an export to Hugging Face's format, Markdown."""
    lines = [f"{num_parameters:,} parameters, written by bltjax {version('bltjax')}.", ""]
    lines += _training(weights.run or {}) + _measured((weights.run or {}).get("result") or {})
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _training(run: dict) -> list[str]:
    config = run.get("config")
    if not config:
        return ["Training data, licence: not known to the program that wrote this; fill in.", ""]
    training, data = config["blt_training"], config["data"]
    named = [s["path"] or s["name"] for s in data["sources"]]
    text = ", ".join(named) or data["root"] or data["records"] or "the standard library of Python"
    read = training["steps"] * training["batch_size"] * training["row_bytes"]
    begun = config.get("start_from")
    return [
        "## Training",
        "",
        *([f"- started from: {begun}"] if begun else []),
        f"- text: {text}",
        f"- {training['steps']:,} steps of {training['batch_size']} rows of "
        f"{training['row_bytes']:,} bytes, {read:,} bytes in all",
        "",
    ]


def _measured(result: dict) -> list[str]:
    sources = result.get("sources")
    if not sources:
        return []
    rows = [
        f"| {name} | {of['bytes']:,} | {of['bits_per_byte']:.3f} |" for name, of in sources.items()
    ]
    use = result.get("patch_use", {}).get("zeroed")
    told = [] if use is None else ["", f"Without its patches it takes {use:.3f} bits more a byte."]
    return [
        "## Measured",
        "",
        "Held-out documents:",
        "",
        "| source | bytes | bits per byte |",
        "|---|---|---|",
        *rows,
        *told,
    ]
