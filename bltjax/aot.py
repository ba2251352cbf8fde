"""A program compiled for chips that are not there: `python -m bltjax.aot --config=FILE
--topology=v5e:16x16`.

The real train step (--program=train), or of generation the loop that reads prompts (prefill) or the
one that writes bytes (decode), on the config's mesh over the topology's devices, by libtpu or the
CUDA plugin and without a TPU or GPU. Told of each device: bytes of HBM, FLOPs that the model
needs and that the program does, bytes that collectives move, and the least time that published
peaks leave: a roofline, no measurement. Loops whose rounds the program itself decides, such as the
bytes that are generated, count once and are listed; the exchange of hash rows counts three times,
as text needs. The exit status is 1 where the program does not fit.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import sys
import tempfile
import time

from absl import app, flags
from ml_collections import config_flags

from bltjax import command, refusal
from bltjax.chips import GIB, Chip

PROGRAMS = ("train", "prefill", "decode")
DOES_NOT_FIT = 1  # exit code
REMATERIALISED = "Involuntary full rematerialization"  # XLA: an array is made whole to reshard it
# libtpu looks for TPUs and waits for them unless told otherwise; several may compile at once.
ENVIRONMENT = dict(
    JAX_PLATFORMS="cpu",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_WORKER_ID="0",
    TPU_SKIP_MDS_QUERY="1",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_MIN_LOG_LEVEL="0",  # what is logged is read, and not shown
    TF_CPP_MIN_LOG_LEVEL="0",
)
LOG_TAIL = 4000  # characters that are shown of it where the compiler fails
WORK = ("compiled_flops", "kernel_flops", "hbm_traffic_bytes", "collective_bytes", "received_bytes")
WORK += ("largest_collective", "unknown_loops", "unknown_kernels", "roofline")  # of what compiled
# What to change, by what takes most.
REMEDIES = dict(
    parameter_bytes="a larger mesh.fsdp, more chips",
    optimizer_bytes="a larger mesh.fsdp, hash_moments='bfloat16', more chips",
    batch_bytes="a smaller batch_size",
    temp_bytes="more accumulation_steps, remat='full', shorter rows, a larger mesh.fsdp",
)


def compile_program(config, flag_values) -> dict:
    """What is known of a program, per device.

    Raises ValueError for what cannot be compiled, JaxRuntimeError where the compiler fails.
    """
    import jax

    from bltjax import programs, sharding, topology, traced
    from bltjax.prepare import check_batch_sizes, check_hash_updates

    name, stage, program = flag_values.topology, flag_values.stage, flag_values.program
    chip, devices = topology.topology_devices(name, flag_values.slices)
    mesh = sharding.make_mesh(config.mesh, devices)
    if program == "train":
        trained = dataclasses.replace(config, stages=(stage,))
        check_batch_sizes(trained, mesh)
        check_hash_updates(trained, mesh)
    sharding.check_model(getattr(config, stage), stage, mesh)
    print(f"{program} of {stage}, mesh {dict(mesh.shape)} on {len(devices)} devices of {name}")
    with jax.set_mesh(mesh):
        made = programs.trace(config, stage, program)
        written = traced.Work(made.traced.jaxpr)
        compiled, refused, seconds = _compile(made.traced.lower())
    each = {
        "traced_flops": written.flops,
        "model_flops": made.model_flops,
        "recompute_flops": made.recompute_flops,
    }
    found = dict(program=program, stage=stage, topology=name, slices=flag_values.slices)
    found |= dict(mesh=dict(mesh.shape), compile_seconds=seconds)
    found |= dict(hash_table_bytes=hash_table_bytes(config, stage))
    found |= memory(made, chip, compiled, refused)
    found |= {name: flops / len(devices) for name, flops in each.items()} | dict.fromkeys(WORK)
    if compiled is not None:
        text = compiled.as_text()
        if flag_values.text:
            with open(flag_values.text, "w") as file:
                file.write(text)
        found |= work(text, written.kernels)
        unit = "tokens" if stage == "token_model" else "bytes"
        found["roofline"] = roofline(found, chip, made.num_bytes / len(devices), unit)
    return found


def hash_table_bytes(config, stage: str) -> int:
    """Of one whole table in float32; 0 without any."""
    if stage != "blt" or not config.blt.hash.sizes:
        return 0
    return 4 * config.blt.hash.rows * config.blt.local_encoder.dim


def _compile(lowered):
    """(compiled program or None, why it does not fit or None, seconds)."""
    import jax

    started = time.perf_counter()
    try:
        return lowered.compile(), None, time.perf_counter() - started
    except jax.errors.JaxRuntimeError as error:
        if refusal.exhausted(str(error)) != "hbm":
            raise
        return None, " ".join(str(error).split()), time.perf_counter() - started


def memory(made, chip: Chip, compiled, refused: str | None) -> dict:
    """Bytes of a device: of types, and of what the compiler says or why it refused."""
    found = dict(
        fits=False,
        hbm_bytes_per_chip=chip.hbm_bytes,
        peak_bytes_per_chip=None,
        parameter_bytes=made.parameter_bytes,
        optimizer_bytes=made.optimizer_bytes,
        batch_bytes=made.batch_bytes,
        temp_bytes=None,
    )
    if compiled is not None:
        sizes = compiled.memory_analysis()
        peak = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        peak += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
        peak += sizes.generated_code_size_in_bytes
        return found | dict(
            fits=peak <= chip.hbm_bytes,
            peak_bytes_per_chip=peak,
            temp_bytes=sizes.temp_size_in_bytes,
        )
    peak = refusal.asked_hbm_bytes(refused)
    if peak is not None:
        given = made.parameter_bytes + made.optimizer_bytes + made.batch_bytes
        found |= dict(peak_bytes_per_chip=peak, temp_bytes=max(peak - given, 0))
    return found | dict(refused=refused)


def work(text: str, kernels: dict) -> dict:
    """FLOPs and bytes that a compiled program takes of a device, see `compiled.Cost`."""
    from bltjax.compiled import read_cost

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
    """What a run over so many bytes, or tokens, takes at least, as if everything overlapped."""
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
    for name in ("parameter", "optimizer", "batch", "temp"):
        _print_bytes(name, found[f"{name}_bytes"])
    limit = f"of {found['hbm_bytes_per_chip'] / GIB:.0f} GiB a device"
    verdict = "fits" if found["fits"] else f"does not fit: try {_remedy(found)}"
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
    if found["unknown_loops"]:
        print(f"  loops that the program ends, counted once: {', '.join(found['unknown_loops'])}")
    times = found["roofline"]
    parts = ", ".join(f"{k} {times[f'{k}_seconds']:.4g} s" for k in ("compute", "hbm", "links"))
    print(f"  at least {times['step_seconds']:.4g} s a run ({times['binds']} binds): {parts}")
    print(
        f"  at most {times[times['unit'] + '_per_second']:,.0f} {times['unit']}/s a device, "
        f"model FLOP utilisation {times['mfu']:.1%}"
    )


def _remedy(found: dict) -> str:
    return REMEDIES[max(REMEDIES, key=lambda name: found[name] or 0)]


def _print_bytes(name: str, size: float | None, note: str = ""):
    told = "   unknown    " if size is None else f"{size / GIB:10.3f} GiB"
    print(f"  {name:18} {told}  {note}".rstrip())


@contextlib.contextmanager
def captured_log():
    """What C++ writes to stderr meanwhile, in a file; Python's own errors are shown as ever."""
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


def _show_tail(log):
    log.seek(0)
    tail = log.read()[-LOG_TAIL:].strip()
    if tail:
        print(tail, file=sys.stderr)


def main(argv):
    if len(argv) > 1:
        command.fail(f"unexpected argument {argv[1]!r}: give --config and --topology")
    config, _ = command.read_config(needs_workdir=False)
    values = flags.FLAGS
    if values.topology is None:
        command.fail("give --topology, for example --topology=v5e:16x16")
    if values.program != "train" and values.stage != "blt":
        command.fail(f"--program={values.program} is of the byte latent transformer: --stage=blt")
    os.environ.update(ENVIRONMENT)  # before JAX is imported
    with captured_log() as log:
        try:
            found = compile_program(config, values)
        except ValueError as error:
            command.fail(error)
        except Exception as error:
            _show_tail(log)
            from jax.errors import JaxRuntimeError

            if isinstance(error, JaxRuntimeError):
                command.fail(refusal.failure(str(error)))
            raise
        log.seek(0)
        found["rematerialization_warnings"] = log.read().count(REMATERIALISED)
    print_report(found)
    if found["rematerialization_warnings"]:
        print(f"  XLA warned of {found['rematerialization_warnings']} x {REMATERIALISED}")
    print(json.dumps(dict(config=config_flags.get_config_filename(values["config"])) | found))
    sys.exit(0 if found["fits"] else DOES_NOT_FIT)


def _define_flags():
    command.define_run_flags()
    flags.adopt_module_key_flags(command)  # shown by --help
    flags.DEFINE_string("topology", None, "Chips and their arrangement, such as v5e:16x16.")
    flags.DEFINE_integer("slices", 1, "How many such slices, joined by a slower network.", 1)
    flags.DEFINE_enum("stage", "blt", ["blt", "entropy_model", "token_model"], "Which model.")
    flags.DEFINE_enum("program", "train", PROGRAMS, "What is compiled.")
    flags.DEFINE_string("text", None, "A file for the optimized program (HLO text).")


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=command.parse_run)
