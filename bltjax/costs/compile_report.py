"""Compiles a program for a topology of chips, none needed, and reports its costs on them."""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import tempfile
import time
from pathlib import Path

from bltjax.costs import compiler_cycles, compiler_errors
from bltjax.costs.chips import GIB, Chip
from bltjax.costs.hlo_cost import read_cost
from bltjax.costs.launches import count_launches, launches_of_decoding

REMATERIALISED = "Involuntary full rematerialization"  # XLA gathers a whole array to reshard it
LOG_TAIL = 4000  # characters of the compiler's log that are shown where it fails
# Results of a program that compiled; None where it did not.
WORK = ("compiled_flops", "kernel_flops", "hbm_traffic_bytes", "collective_bytes", "received_bytes")
WORK += ("largest_collective", "unknown_loops", "unknown_kernels", "roofline", "compiler")
# Settings to change, by the part that takes most of the memory.
REMEDIES = dict(
    parameter_bytes="a larger mesh.fsdp, more chips",
    optimizer_bytes="a larger mesh.fsdp, hash_moments='bfloat16', more chips",
    batch_bytes="a smaller batch_size",
    temp_bytes="more accumulation_steps, remat='full', shorter rows, a larger mesh.fsdp",
)


def compile_program(
    config,
    topology_name: str,
    slices: int,
    stage: str,
    program: str,
    text_file: str | None,
    rows: int = 1,
    blocks: int = 0,
) -> dict:
    """Compiles a program of a RunConfig for a topology; returns its costs per device.

    topology_name, slices: see `topology.topology_devices`. program: "train", or of generation
    "prefill" or "decode" of so many `rows` a device, `blocks` bytes of each filled in together (0:
    none). text_file: where the optimized program is written (HLO text), or None.
    Raises ValueError for what cannot be compiled, JaxRuntimeError where the compiler fails.
    """
    import jax

    from bltjax import sharding
    from bltjax.costs import jaxpr_flops, programs, topology
    from bltjax.model.transformer import attention_report

    chip, devices = topology.topology_devices(topology_name, slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    if program == "train":
        trained = dataclasses.replace(config, stages=(stage,))
        sharding.check_batch_sizes(trained, mesh)
        sharding.check_hash_updates(trained, mesh)
    sharding.check_model(getattr(config, stage), stage, mesh)
    shape = dict(mesh.shape)
    print(f"{program} of {stage}, mesh {shape} on {len(devices)} devices of {topology_name}")
    with jax.set_mesh(mesh):
        if program == "train":
            print(attention_report(getattr(config, stage)))
        made = programs.trace(config, stage, program, rows, blocks)
        written = jaxpr_flops.Work(made.traced.jaxpr)
        compiled, refused, seconds = _compile(made.traced.lower())
    each = dict(
        traced_flops=written.flops,
        model_flops=made.model_flops,
        recompute_flops=made.recompute_flops,
    )
    found = dict(program=program, stage=stage, topology=topology_name, slices=slices, mesh=shape)
    found |= dict(compile_seconds=seconds, hash_table_bytes=hash_table_bytes(config, stage))
    found |= memory(made, chip, compiled, refused)
    found |= {name: flops / len(devices) for name, flops in each.items()} | dict.fromkeys(WORK)
    if compiled is not None:
        text = compiled.as_text()
        if text_file:
            Path(text_file).write_text(text)
        found |= work(text, written.kernels)
        if devices[0].platform == "gpu":
            found["launches"] = dataclasses.asdict(count_launches(text))
            if program == "decode":
                found["launches"] |= launches_of_decoding(text)
        unit = "tokens" if stage == "token_model" else "bytes"
        found["roofline"] = roofline(found, chip, made.num_bytes / len(devices), unit)
        found["compiler"] = compiler_cycles.report(text, found["model_flops"], chip)
    return found


def hash_table_bytes(config, stage: str) -> int:
    """Returns the bytes of one whole hash table in float32; 0 for a model without any."""
    model = getattr(config, stage)
    return 4 * model.hash.rows * model.hash_width if model.hash.sizes else 0


def _compile(lowered):
    """Returns (compiled program or None, reason that it does not fit or None, seconds)."""
    import jax

    started = time.perf_counter()
    try:
        return lowered.compile(), None, time.perf_counter() - started
    except jax.errors.JaxRuntimeError as error:
        if compiler_errors.exhausted(str(error)) != "hbm":
            raise
        return None, " ".join(str(error).split()), time.perf_counter() - started


def memory(made, chip: Chip, compiled, refused: str | None) -> dict:
    """Returns bytes per device: of the inputs by type, and the peak that the compiler reports."""
    inputs = {n: getattr(made, n) for n in ("parameter_bytes", "optimizer_bytes", "batch_bytes")}
    temp = None
    if compiled is not None:
        sizes = compiled.memory_analysis()
        peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        peak += sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
        temp = sizes.temp_size_in_bytes
    elif (peak := compiler_errors.asked_hbm_bytes(refused)) is not None:
        temp = max(peak - sum(inputs.values()), 0)
    found = dict(
        fits=compiled is not None and peak <= chip.hbm_bytes,
        hbm_bytes_per_chip=chip.hbm_bytes,
        peak_bytes_per_chip=peak,
        **inputs,
        temp_bytes=temp,
    )
    return found if compiled is not None else found | dict(refused=refused)


def work(text: str, kernels: dict) -> dict:
    """Returns FLOPs and bytes of a compiled program per device, see `hlo_cost.Cost`."""
    cost = read_cost(text, kernels)
    largest = cost.largest_collective()
    return dict(
        compiled_flops=cost.flops + cost.kernel_flops,
        kernel_flops=cost.kernel_flops,
        hbm_traffic_bytes=cost.hbm_bytes,
        collective_bytes=cost.collective_bytes(),
        received_bytes=cost.received_bytes(),
        largest_collective=largest and largest._asdict(),
        unknown_loops=sorted(cost.unknown_loops),
        unknown_kernels=sorted(cost.unknown_kernels),
    )


def roofline(found: dict, chip: Chip, number: float, unit: str) -> dict:
    """Returns the least time of one run of a program, if compute, HBM and links all overlapped.

    number: bytes or tokens (`unit`) that a run goes through on one device.
    """
    seconds = dict(
        compute=found["compiled_flops"] / chip.flops,
        hbm=found["hbm_traffic_bytes"] / chip.hbm_bandwidth,
        links=found["received_bytes"] / chip.link_bandwidth,
    )
    bound = max(seconds, key=seconds.get)
    step = max(seconds[bound], 1e-12)
    return dict(
        {f"{name}_seconds": value for name, value in seconds.items()},
        binds=bound,
        step_seconds=step,
        unit=unit,
        **{f"{unit}_per_second": number / step},
        mfu=found["model_flops"] / chip.flops / step,
    )


def print_report(found: dict):
    """Prints the result of `compile_program` for people."""
    for name in ("parameter", "optimizer", "batch", "temp"):
        _print_bytes(name, found[f"{name}_bytes"])
    limit = f"of {found['hbm_bytes_per_chip'] / GIB:.0f} GiB a device"
    verdict = "fits"
    if not found["fits"]:
        largest_part = max(REMEDIES, key=lambda name: found[name] or 0)
        verdict = f"does not fit: try {REMEDIES[largest_part]}"
    _print_bytes("peak", found["peak_bytes_per_chip"], f"{limit}: {verdict}")
    print(f"  {'compiled in':18} {found['compile_seconds']:10.1f} s")
    if found["roofline"] is None:
        return print(f"  the compiler refused: {found['refused']}")
    needed = found["model_flops"] + found["recompute_flops"]
    for name, note in (
        ("model", ""),
        ("recompute", "that remat adds"),
        ("traced", "of the program as it is written"),
        ("compiled", f"{found['compiled_flops'] / max(needed, 1):.3f} of model and recompute"),
        ("kernel", "of the compiled ones, in Pallas"),
    ):
        print(f"  {name + ' FLOPs':18} {found[name + '_flops'] / 1e9:10.3f} G    {note}")
    for kind, size in found["collective_bytes"].items():
        _print_bytes(kind, size)
    largest = found["largest_collective"]
    if largest:
        where = f"{largest['op_name']} {largest['source']}"
        of = f"{largest['kind']} of {largest['shape'][:80]} by {largest['group']}: {where}"
        if found["hash_table_bytes"]:
            of = f"{largest['num_bytes'] / found['hash_table_bytes']:.2%} of a hash table; {of}"
        _print_bytes("largest of them", largest["num_bytes"], of)
    for name in found["unknown_kernels"]:
        print(f"  kernel {name}: its FLOPs are not known and not counted")
    if launches := found.get("launches"):
        number = f"{launches['kernels'] + launches['copies']:10,}"
        print(f"  {'GPU launches':18} {number}      {launches['host_syncs']:,} waits of the host")
        for name in ("byte", "patch") if "byte" in launches else ():
            print(f"  {'of a ' + name:18} {launches[name]:10,}")
        for target, times in launches["library_calls"].items():
            print(f"  {'':18} {times:10,}      of {target}")
    if found["unknown_loops"]:
        print(f"  loops that the program ends, counted once: {', '.join(found['unknown_loops'])}")
    times = found["roofline"]
    parts = ", ".join(f"{k} {times[f'{k}_seconds']:.4g} s" for k in ("compute", "hbm", "links"))
    print(f"  at least {times['step_seconds']:.4g} s a run ({times['binds']} binds): {parts}")
    print(
        f"  at most {times[times['unit'] + '_per_second']:,.0f} {times['unit']}/s a device, "
        f"model FLOP utilisation {times['mfu']:.1%}"
    )
    if found["compiler"]:
        compiler_cycles.print_report(found["compiler"], times["mfu"])


def _print_bytes(name: str, size: float | None, note: str = ""):
    told = "   unknown    " if size is None else f"{size / GIB:10.3f} GiB"
    print(f"  {name:18} {told}  {note}".rstrip())


@contextlib.contextmanager
def captured_log():
    """Redirects what C++ code (the compiler) writes to stderr into a file, which is yielded.

    Python's own messages still reach the terminal.
    """
    sys.stderr.flush()
    shown, python = os.dup(2), sys.stderr
    with tempfile.TemporaryFile("w+", errors="replace") as log, os.fdopen(shown, "w") as stderr:
        os.dup2(log.fileno(), 2)
        sys.stderr = stderr
        faulthandler.enable(stderr)
        try:
            yield log
        finally:
            faulthandler.disable()
            os.dup2(shown, 2)
            sys.stderr = python


def show_tail(log):
    """Prints the last LOG_TAIL characters of a `captured_log` on stderr."""
    log.seek(0)
    tail = log.read()[-LOG_TAIL:].strip()
    if tail:
        print(tail, file=sys.stderr)
