"""Model-FLOP utilisation of a training step: `python benchmarks/mfu.py`.

The FLOPs that the model needs (`bltjax/costs/flops.py`: forward three times, nothing that is
computed again) over those of plain matrix products in the same time. The products are timed in
turns with the steps, XLA's in the same process and PyTorch's, where it is installed and runs on the
same kind of device, in another; the fastest of all sizes and of both counts. --profile also tells
where the time of a step goes: by part of the model and function of bltjax, forward and backward,
and how much of it is matrix products. Prints tables and, last, a JSON line.

    python benchmarks/mfu.py --profile
"""

import collections
import contextlib
import dataclasses
import re
import tempfile
from pathlib import Path

import measuring
import numpy as np
from absl import app, flags

from bltjax import cli
from bltjax.costs import flops

PACKAGE = measuring.ROOT / "bltjax"
PARTS = {  # by the files that a frame of an operation's trace is in
    "local_encoder.py": "encoder",
    "global_transformer.py": "global",
    "local_decoder.py": "decoder",
    "embeddings.py": "embedding",
    "optimizer.py": "optimizer",
    "loss.py": "loss",
}


def main(_):
    chosen = flags.FLAGS
    model = dataclasses.replace(
        measuring.SIZES[chosen.size], remat=chosen.remat, compute_dtype=chosen.dtype
    )
    matrices = [int(n) for n in chosen.matrices]
    rows = []
    try:
        for text in chosen.shapes:
            batch = measuring.draw_batch(*measuring.parse_shape(text))
            with tempfile.TemporaryDirectory() as scratch:
                row, versions, places = measure(model, batch, matrices, Path(scratch))
            rows.append({"size": chosen.size, "shape": text} | row)
            if chosen.profile:
                print_places(places)
    except measuring.WorkerError as error:
        cli.fail(error)
    columns = {"size": "", "shape": "", "step s": ".3f", "bytes/s": ",.0f", "model GFLOP": ",.0f"}
    columns |= {"GFLOP/s": ",.1f", "XLA GFLOP/s": ",.1f", "torch GFLOP/s": ",.1f"}
    columns |= {"peak of": "", "MFU": ".1%"}
    measuring.print_table(columns, rows)
    options = {n: chosen[n].value for n in ("dtype", "remat", "hash_updates")}
    measuring.print_result("mfu", versions=versions, options=options, rows=rows)


def measure(model, batch, matrices, scratch: Path):
    """(a row of the table, versions, where the time goes)."""
    chosen = flags.FLAGS
    np.savez(scratch / "batch.npz", **batch)
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(measuring.Worker(measuring.OURS, chosen.threads))
        ours.ask(
            "build",
            task="train",
            model=measuring.settings(model),
            batch=str(scratch / "batch.npz"),
            optimizer=measuring.settings(measuring.with_hash_updates(measuring.OPTIMIZER)),
        )
        products = {"XLA": ours}
        if measuring.installed("torch"):
            torch = stack.enter_context(measuring.Worker("torch", chosen.threads))
            if torch.ask("about")["platform"] == ours.ask("about")["platform"]:
                products["torch"] = torch
        for _ in range(2):
            ours.ask("step")
        actions = {"step": lambda: ours.ask("step")["seconds"]}
        for who, worker in products.items():
            for n in matrices:
                actions[who, n] = lambda w=worker, n=n: w.ask("matmul", size=n, dtype=chosen.dtype)
        times = measuring.alternate(actions, chosen.repeats)
        versions = {k: v for w in products.values() for k, v in w.ask("about").items()}
        places = []
        if chosen.profile:
            steps = ours.ask("profile", directory=str(scratch), steps=2)
            places = where_time_goes(scratch, steps["seconds"], steps["cpu"], chosen.threads)
    found = numbers(model, batch, times)
    return found | dict(places=places), versions, places


def numbers(model, batch: dict, times: dict) -> dict:
    """times: seconds of "step", and of products by (who, size)."""
    rows, length = batch["tokens"].shape
    patch_bytes = (length + 1) / batch["patch_lengths"].shape[1]
    per_byte = flops.flops_per_byte(model, length, patch_bytes)["total"]
    model_flops = flops.TRAINING_FACTOR * per_byte * rows * length
    step, rates = measuring.median(times["step"]), collections.defaultdict(dict)
    for key, seconds in times.items():
        if key != "step":
            rates[key[0]][key[1]] = 2 * key[1] ** 3 / measuring.median(seconds) / 1e9
    best = {who: max(found.values()) for who, found in rates.items()}
    fastest = max(best, key=best.get)
    return {
        "step s": step,
        "bytes/s": rows * length / step,
        "model GFLOP": model_flops / 1e9,
        "GFLOP/s": model_flops / 1e9 / step,
        "XLA GFLOP/s": best["XLA"],
        "torch GFLOP/s": best.get("torch"),
        "peak of": fastest,
        "MFU": model_flops / 1e9 / step / best[fastest],
        "products": {who: {str(n): r for n, r in found.items()} for who, found in rates.items()},
        "seconds": times["step"],
    }


def where_time_goes(directory: Path, seconds: float, cpu: float, threads: int) -> list[dict]:
    """Shares of traced steps, by part, function and direction, the largest first.

    seconds, cpu: of the steps, on the clock and of all cores. A share is of the time of all
    `threads` together. Untraced is what cores did that no operation of the trace claims: pieces of
    an operation that a second core helps with, and the runtime. Idle is when they did nothing.
    """
    origins = operations((directory / "program.txt").read_text())
    (trace,) = directory.glob("plugins/profile/*/*.xplane.pb")
    by_operation, on_device = times_of_operations(trace)
    whole = seconds * (1 if on_device else threads)
    shares = collections.defaultdict(lambda: dict(products=0.0, rest=0.0))
    for name, spent in by_operation.items():
        place, is_product = origins.get(name, (("other", "", ""), False))
        shares[place]["products" if is_product else "rest"] += spent / whole
    places = [
        dict(part=part, function=function, direction=direction, **share)
        for (part, function, direction), share in shares.items()
    ]
    traced = sum(p["products"] + p["rest"] for p in places)
    busy = traced if on_device else max(min(cpu / whole, 1), traced)
    for part, share in (("untraced", busy - traced), ("idle", 1 - busy)):
        places.append(dict(part=part, function="", direction="", products=0.0, rest=share))
    return sorted(places, key=lambda p: -p["products"] - p["rest"])


def print_places(places: list[dict]):
    """Totals by part, then the largest places."""
    totals = collections.defaultdict(lambda: dict(products=0.0, rest=0.0))
    for place in places:
        for kind in ("products", "rest"):
            totals[place["part"]][kind] += place[kind]
    columns = dict.fromkeys(("part", "function", "direction"), "")
    columns |= dict(share=".1%", products=".1%", rest=".1%")
    rows = [dict(part=part, function="", direction="") | total for part, total in totals.items()]
    for found in (sorted(rows, key=lambda p: -p["products"] - p["rest"]), places[:25]):
        found = [p | dict(share=p["products"] + p["rest"]) for p in found]
        measuring.print_table(columns, found)
        print()


def times_of_operations(trace: Path) -> tuple[dict[str, float], bool]:
    """Seconds of each operation of a trace, without those that it calls; whether on a device."""
    from jax.profiler import ProfileData

    planes = list(ProfileData.from_file(str(trace)).planes)
    devices = [p for p in planes if p.name.startswith("/device:")]
    lines = [line for plane in devices or planes for line in plane.lines if line.name != "python"]
    total = collections.Counter()
    for line in lines:
        events = []
        for event in line.events:
            if event.duration_ns and not event.name.startswith("end: "):
                stats = dict(event.stats)
                events.append((event.start_ns, -event.duration_ns, stats.get("hlo_op")))
        running = []  # (end, operation), each within the one before
        for start, negative, name in sorted(events, key=lambda e: e[:2]):
            while running and running[-1][0] <= start:
                running.pop()
            if running:
                total[running[-1][1]] += negative / 1e9
            total[name] -= negative / 1e9
            running.append((start - negative, name))
    total.pop(None, None)  # the runtime's own: starting operations, and waiting for them
    return dict(total), bool(devices)


def operations(program: str) -> dict[str, tuple[tuple[str, str, str], bool]]:
    """operation -> ((part, function, direction), whether it is a matrix product), of HLO text."""
    tables = {n: _table(program, n) for n in ("FileNames", "FunctionNames")}
    locations = _numbers(program, "FileLocations", "file_name_id", "function_name_id")
    frames = _numbers(program, "StackFrames", "file_location_id", "parent_frame_id")

    def stack(frame: int):
        """(file, function) from the innermost frame outwards."""
        while frame in frames:
            location, parent = frames[frame]
            file, function = locations[location]
            yield tables["FileNames"][file], tables["FunctionNames"][function]
            frame = parent - 1  # as XLA prints it, the first frame is its own parent

    with_product, computation = set(), ""
    found = {}
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            computation = head[1]
        if not (match := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (.*)", line)):
            continue
        name, text = match.groups()
        called = re.search(r"calls=%([\w.-]+)", text)
        if " dot(" in text or "onednn$matmul" in text or "gemm" in text:
            with_product.add(computation)
            is_product = True
        else:
            is_product = bool(called) and called[1] in with_product
        frame = re.search(r"stack_frame_id=(\d+)", text)
        label = re.search(r'op_name="([^"]*)"', text)
        place = _place(list(stack(int(frame[1]))) if frame else [], label[1] if label else "")
        found[name] = place, is_product
    return found


def _place(stack: list[tuple[str, str]], label: str) -> tuple[str, str, str]:
    paths = ((Path(file), function) for file, function in stack)
    own = [(p.name, function) for p, function in paths if p.is_relative_to(PACKAGE)]
    part = next((PARTS[file] for file, _ in own if file in PARTS), "step")
    # A linear layer says less than the layer that it belongs to.
    inner = next((f for f in own if f[0] != "parameters.py"), None)
    function = " ".join(inner).replace(".<locals>", "") if inner else ""
    if part in ("optimizer", "step") or not label:
        return part, function, ""
    return part, function, "backward" if "transpose(" in label else "forward"


def _table(program: str, name: str) -> dict[int, str]:
    section = re.search(rf"^{name}\n((?:\d+ .*\n)*)", program, re.MULTILINE)
    lines = section[1].splitlines() if section else []
    return {int(x.split(" ", 1)[0]): x.split(" ", 1)[1].strip('"') for x in lines}


def _numbers(program: str, name: str, *fields: str) -> dict[int, list[int]]:
    rows = _table(program, name)
    return {
        key: [int(re.search(rf"{field}=(\d+)", text)[1]) for field in fields]
        for key, text in rows.items()
    }


def _define_flags():
    measuring.define_step_flags("large", ["4x1024"])
    flags.DEFINE_list("matrices", ["1024", "2048", "3072", "4096"], "Sizes of the products.")
    flags.DEFINE_bool("profile", False, "Tell where the time of a step goes.")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=measuring.parse)
