"""Findings as tables, and what they say together."""

import math

from accelerator.notes import DONE, FAILED, IMPOSSIBLE, LATE, Notes
from measuring import print_table

CLOSE = 3e-2  # losses in bfloat16 of two backends, in nats

COLUMNS = {  # of each kind of finding
    "ceiling": {"what": "", "of": "", "ms": ",.4f", "tflops": ",.0f", "gbs": ",.0f"}
    | {"of_data_sheet": ".0%"},
    "attention error": {"case": "", "documents": "", "dtype": "", "backend": ""}
    | dict.fromkeys(("out", "dq", "dk", "dv"), ".1e"),
    "attention": {"case": "", "documents": "", "backend": ""}
    | dict.fromkeys(("forward_ms", "both_ms"), ",.3f")
    | dict.fromkeys(("forward_tflops", "both_tflops"), ",.1f"),
    "train": {"model": "", "backend": "", "remat": "", "tables": "", "rows": ""}
    | {"row_bytes": "", "step_s": ".3f", "bytes_per_s": ",.0f", "mfu": ".1%"}
    | dict.fromkeys(("peak_gib", "needed_gib", "compile_s"), ".1f"),
    "agreement": {"model": "", "tables": "", "backends": "", "difference": ".1e", "close": ""},
    "profile": {"model": "", "backend": "", "launches": ",", "wall_ms": ",.1f", "idle": ".1%"},
    "generate": {"rows": "", "bytes_per_s": ",.0f", "ms_a_step": ".3f", "bound_ms": ".3f"}
    | {"of_bound": ".1%", "bytes_a_patch": ".2f", "global_calls_a_step": ".2f"}
    | {"prefill_s": ".3f", "first_s": ".1f", "peak_gib": ".1f"},
    "golden": {"model": "", "difference": ".1e", "close": ""},
    "peer train": {"size": "", "shape": "", "who": "", "bytes/s": ",.0f", "MFU": ".1%"}
    | {"peak MB": ",.0f", "speed": ".2f", "memory": ".2f", "error": ""},
    "peer generate": {"prompt": "", "new": "", "rows": "", "who": "", "bytes/s": ",.1f"}
    | {"ms a byte": ".2f", "speed": ".1f", "same": ".0%"},
}
SHOWN = 12  # operations of a profile


def check_agreement(notes: Notes, findings: list[dict]):
    """Notes whether the losses of the backends of a model are the same, step by step."""
    runs = {}
    for found in findings:
        if found["kind"] == "train":
            key = tuple(found[name] for name in ("model", "tables", "rows", "row_bytes"))
            runs.setdefault(key, []).append(found)
    for key, group in runs.items():
        losses = [found["losses"] for found in group]
        different = max(
            abs(a - b) for of_step in zip(*losses, strict=True) for a in of_step for b in of_step
        )
        finite = all(math.isfinite(loss) for run in losses for loss in run)
        if len(group) > 1 or not finite:
            backends = ", ".join(f"{found['backend']}/{found['remat']}" for found in group)
            about = dict(model=key[0], tables=key[1], backends=backends)
            notes.write(
                "agreement", **about, difference=different, close=finite and different <= CLOSE
            )


def print_tables(findings: list[dict]):
    """Prints a table for each kind of finding, then what failed and what was left out."""
    for found in findings:
        if found["kind"] == "about":
            versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
            print(f"\n{found['device']}: {versions}")
    for kind, columns in COLUMNS.items():
        rows = [found for found in findings if found["kind"] == kind]
        if rows:
            print(f"\n{kind}")
            print_table(columns, rows)
    for found in findings:
        if found["kind"] == "profile":
            print(f"\nlongest operations of a step of {found['model']} by {found['backend']}")
            print_table({"ms": ",.2f", "calls": ",", "name": ""}, found["top"][:SHOWN])
    problems = [found for found in findings if found["kind"] in (FAILED, IMPOSSIBLE, LATE)]
    if problems:
        print("\nfailed or left out")
    for found in problems:
        more = {k: v for k, v in found.items() if k not in ("stage", "kind", "at", "reason")}
        print(f"  {found['stage']} {more or ''}: {found['reason']}")
    times = {f["stage"]: f["seconds"] for f in findings if f["kind"] == DONE}
    print("\nseconds: " + ", ".join(f"{stage} {taken:.0f}" for stage, taken in times.items()))
