"""A process that holds one implementation, and answers questions: a JSON line in, a JSON line out.

`python worker.py KIND THREADS`, started by `measuring.Worker`. Whatever a library prints goes to
stderr. KIND is bltjax, transformers, or torch for matrix products alone.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np

LOCAL = "local_encoder", "encoder_hash_tok_embedding", "local_decoder"
PAGES = dict(peak="VmHWM:", now="VmRSS:")


def resident(which: str) -> int:
    """Bytes of memory that this process has, or has had at most."""
    if not Path("/proc/self/status").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(PAGES[which]):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {PAGES[which]}")


def sample(logits) -> list:
    """Logits of 8 positions of each row, the first and the last among them."""
    logits = np.asarray(logits, np.float32)
    positions = np.linspace(0, logits.shape[1] - 1, 8).round().astype(int)
    return logits[:, positions].tolist()


class Process:
    """What workers of every kind tell."""

    def __init__(self):
        self.baseline, self.host_peak = resident("now"), 0

    def memory(self) -> dict:
        """Bytes: after imports; now; at most in all; at most since `forget_peak`."""
        recent = resident("peak")
        peak = max(self.host_peak, recent)
        now = resident("now")
        found = dict(baseline=self.baseline, now=now, peak=peak, recent_peak=recent)
        return found | self.device_memory()

    def forget_peak(self):
        self.host_peak = max(self.host_peak, resident("peak"))
        with contextlib.suppress(OSError):  # only Linux can
            Path("/proc/self/clear_refs").write_text("5")


class Ours(Process):
    def __init__(self, threads: int):
        import jax

        from bltjax import sharding

        self.jax, self.compiled = jax, None
        jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1]))
        super().__init__()

    def about(self) -> dict:
        from bltjax.costs.peak import peak_flops

        device = self.jax.devices()[0]
        found = dict(platform=device.platform, jax=self.jax.__version__, device=device.device_kind)
        if device.platform != "cpu" and (peak := peak_flops("bfloat16")):
            found["data_sheet_flops"] = peak / self.jax.device_count()
        return found

    def device_memory(self) -> dict:
        stats = self.jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" not in stats:
            return {}
        return dict(device_peak=stats["peak_bytes_in_use"], device_now=stats["bytes_in_use"])

    def build(
        self,
        task: str,
        model: dict,
        batch: str,
        optimizer: dict,
        weights: str | None = None,
        precise: bool = False,
    ) -> dict:
        """Gets a program ready for the arrays of a file; task: forward, train or local.

        weights: a directory that `export` wrote; None: random ones. precise: float32 is multiplied
        as float32 on accelerators too.
        """
        from bltjax import sharding
        from bltjax.config import BLTConfig, from_config_dict

        if precise:
            self.jax.config.update("jax_default_matmul_precision", "highest")
        self.model, self.weights = from_config_dict(BLTConfig, model), weights
        self.batch = sharding.put_batch(dict(np.load(batch)))
        self.call = getattr(self, f"_{task}")(optimizer)
        return {}

    def _parameters(self):
        from bltjax.checkpoints import formats, placing
        from bltjax.model import functional

        if self.weights is None:
            return functional.init(self.model, self.jax.random.key(0))
        stored = formats.read(Path(self.weights)).params["blt"]
        return placing.put_lazy(stored, functional.abstract_params(self.model))

    def _forward(self, _):
        from bltjax.model import functional
        from bltjax.patching.buffers import buffers_from_lengths

        self.params = self._parameters()

        def logits(params, batch):
            patches = buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1])
            inputs = batch["tokens"], patches, batch["document_ids"]
            return functional.apply(self.model, params, *inputs)

        program = self.jax.jit(logits)

        def call():
            self.logits = program(self.params, self.batch)
            self.jax.block_until_ready(self.logits)
            return {}

        return call

    def _train(self, optimizer):
        from bltjax.training.state import start_state

        program, optimizer = self._train_program(optimizer)
        self.state = start_state(self._parameters(), optimizer)

        def call():
            self.compiled = self.compiled or program.lower(self.state, self.batch).compile()
            self.state, metrics = self.compiled(self.state, self.batch)
            self.jax.block_until_ready((self.state, metrics))
            return dict(loss=float(metrics["loss"]))

        return call

    def _train_program(self, optimizer: dict):
        from bltjax.config import OptimizerConfig, TrainingConfig, from_config_dict
        from bltjax.training.optimizer import make_optimizer
        from bltjax.training.step import make_train_step

        rows, length = self.batch["tokens"].shape
        config = TrainingConfig(
            batch_size=rows,
            row_bytes=length,
            optimizer=from_config_dict(OptimizerConfig, optimizer),
        )
        optimizer = make_optimizer(config.optimizer, config.steps)
        return make_train_step(self.model, config, optimizer), optimizer

    def _local(self, _):
        """Loss and gradients of the local stacks; patches go straight from one to the other."""
        from flax import nnx

        from bltjax.model.blt import BLT
        from bltjax.model.embeddings import embed_ids
        from bltjax.patching.buffers import buffers_from_lengths
        from bltjax.training.loss import loss_sums

        model = nnx.eval_shape(lambda: BLT(self.model, self.jax.random.key(0)))
        graphs = {name: nnx.graphdef(getattr(model, name)) for name in LOCAL}
        params = self._parameters()
        params = {name: params[name] for name in LOCAL}

        def loss(params, batch):
            encoder, tables, decoder = (nnx.merge(graphs[name], params[name]) for name in LOCAL)
            patches = buffers_from_lengths(batch["patch_lengths"], batch["tokens"].shape[1])
            documents = batch["document_ids"]
            embedded = embed_ids(batch["tokens"], encoder.tok_embeddings, tables, self.model)
            byte_states, patch_states = encoder(embedded, patches, documents)
            logits, _ = decoder(byte_states, patch_states, patches, documents)
            sums = loss_sums(logits, batch["targets"], batch["loss_mask"])
            return sums["nats"] / sums["targets"]

        program = self.jax.jit(self.jax.value_and_grad(loss))

        def call():
            self.compiled = self.compiled or program.lower(params, self.batch).compile()
            value, gradients = self.compiled(params, self.batch)
            self.jax.block_until_ready(gradients)
            return dict(loss=float(value))

        return call

    def temporary_bytes(self) -> int:
        """What the compiler sets aside for arrays in between; after the first step."""
        return self.compiled.memory_analysis().temp_size_in_bytes

    def step(self) -> dict:
        started = time.perf_counter()
        found = self.call()
        return dict(seconds=time.perf_counter() - started) | found

    def logits_sample(self) -> list:
        return sample(self.logits)

    def export(self, directory: str) -> dict:
        """Writes the parameters as `transformers` reads them."""
        from bltjax.checkpoints import formats
        from bltjax.checkpoints.weights import Weights
        from bltjax.config import PatchingConfig

        params = self.jax.tree.map(np.asarray, self.params)
        weights = Weights(self.model, None, PatchingConfig(), dict(blt=params))
        formats.plan(weights, formats.HF).write(Path(directory))
        return {}

    def compile(self, model: dict, batch: str, optimizer: dict) -> dict:
        """Seconds of lowering and of compiling the training step, without any weights."""
        from bltjax import sharding
        from bltjax.config import BLTConfig, from_config_dict
        from bltjax.training.state import abstract_state

        self.model = from_config_dict(BLTConfig, model)
        self.batch = sharding.put_batch(dict(np.load(batch)))
        program, optimizer = self._train_program(optimizer)
        state = sharding.concrete(abstract_state(self.model, optimizer))
        started = time.perf_counter()
        lowered = program.lower(state, self.batch)
        middle = time.perf_counter()
        lowered.compile()
        ended = time.perf_counter()
        return dict(lower=middle - started, compile=ended - middle, seconds=ended - started)

    def matmul(self, size: int, dtype: str = "float32") -> float:
        """Seconds of one product of square matrices."""
        import jax.numpy as jnp

        if getattr(self, "matrix", None) is None or self.matrix.shape[0] != size:
            self.matrix = jnp.ones((size, size), dtype)
            self.product = self.jax.jit(jnp.matmul).lower(self.matrix, self.matrix).compile()
            self.product(self.matrix, self.matrix).block_until_ready()
        started = time.perf_counter()
        self.product(self.matrix, self.matrix).block_until_ready()
        return time.perf_counter() - started

    def profile(self, directory: str, steps: int) -> dict:
        """Traces some steps, and writes the program that they ran as `program.txt`."""
        with self.jax.profiler.trace(directory):
            cpu = time.process_time()
            seconds = sum(self.step()["seconds"] for _ in range(steps))
            cpu = time.process_time() - cpu
        Path(directory, "program.txt").write_text(self.compiled.as_text())
        return dict(seconds=seconds, cpu=cpu)


class Torch(Process):
    def __init__(self, threads: int):
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__()

    def about(self) -> dict:
        platform = "gpu" if self.device.type == "cuda" else "cpu"  # as JAX calls it
        return dict(platform=platform, torch=self.torch.__version__)

    def device_memory(self) -> dict:
        if self.device.type != "cuda":
            return {}
        return dict(device_peak=self.torch.cuda.max_memory_allocated())

    def matmul(self, size: int, dtype: str = "float32") -> float:
        """Seconds of one product of square matrices."""
        if getattr(self, "matrix", None) is None or len(self.matrix) != size:
            dtype = getattr(self.torch, dtype)
            self.matrix = self.torch.ones(size, size, dtype=dtype, device=self.device)
            self.product = self.matrix @ self.matrix
        self.synchronise()
        started = time.perf_counter()
        self.torch.mm(self.matrix, self.matrix, out=self.product)
        self.synchronise()
        return time.perf_counter() - started

    def synchronise(self):
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


class Transformers(Torch):
    def __init__(self, threads: int):
        import transformers

        transformers.logging.disable_progress_bar()
        self.transformers = transformers
        super().__init__(threads)

    def about(self) -> dict:
        return super().about() | dict(transformers=self.transformers.__version__)

    def build(
        self,
        task: str,
        directory: str,
        batch: str,
        dtype: str,
        attention: str,
        checkpointing: bool,
        optimizer: dict,
        precise: bool = False,
    ) -> dict:
        """Opens exported weights; task: forward or train.

        checkpointing: the backward pass computes again what is within a layer.
        """
        torch = self.torch
        self.model = self.transformers.BltForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=attention
        ).to(self.device)
        if self.device.type == "cuda" and not precise:  # as JAX does unless told otherwise
            torch.set_float32_matmul_precision("high")
        arrays = np.load(batch)
        names = "tokens", "targets", "patch_lengths"
        self.batch = {
            n: torch.as_tensor(arrays[n], dtype=torch.long, device=self.device) for n in names
        }
        self.cast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=True
        )
        if task == "forward":
            self.model.eval()
            self.call = self._forward
        else:
            self.model.train()
            if checkpointing:
                self.model.activation_checkpointing_enable(dict(use_reentrant=False))
            self.clip_norm = optimizer["clip_norm"]
            self.optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=optimizer["learning_rate"],
                betas=(optimizer["beta1"], optimizer["beta2"]),
                eps=optimizer["epsilon"],
                weight_decay=optimizer["weight_decay"],
                fused=True,
            )
            self.call = self._train
        return {}

    def _logits(self):
        patch_lengths = self.batch["patch_lengths"]
        return self.model(self.batch["tokens"], patch_lengths=patch_lengths, use_cache=False).logits

    def _forward(self) -> dict:
        with self.torch.inference_mode(), self.cast:
            self.logits = self._logits()
        return {}

    def _train(self) -> dict:
        torch = self.torch
        with self.cast:
            logits = self._logits()
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), self.batch["targets"].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return dict(loss=loss.item())

    def step(self) -> dict:
        started = time.perf_counter()
        found = self.call()
        self.synchronise()
        return dict(seconds=time.perf_counter() - started) | found

    def logits_sample(self) -> list:
        return sample(self.logits.float().cpu())


class Writer(Process):
    """bltjax writes text with weights from a directory."""

    def __init__(self, threads: int):
        import jax

        from bltjax import sharding

        self.jax = jax
        jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1]))
        super().__init__()

    def about(self) -> dict:
        return dict(platform=self.jax.devices()[0].platform, jax=self.jax.__version__)

    def device_memory(self) -> dict:
        return {}

    def draw(self, directory: str, model: dict, entropy_model: dict, threshold: float) -> dict:
        """Writes random weights as `transformers` reads them; special ids are never the best."""
        from bltjax.checkpoints import formats
        from bltjax.checkpoints.weights import Weights
        from bltjax.config import BLTConfig, EntropyModelConfig, PatchingConfig, from_config_dict
        from bltjax.model import functional

        blt = from_config_dict(BLTConfig, model)
        entropy = from_config_dict(EntropyModelConfig, entropy_model)
        keys = self.jax.random.split(self.jax.random.key(0))
        params = dict(
            blt=functional.init(blt, keys[0]), entropy_model=functional.init(entropy, keys[1])
        )
        params = self.jax.tree.map(np.array, params)
        params["blt"]["local_decoder"]["output"]["weight"][:4] = 0
        weights = Weights(blt, entropy, PatchingConfig(threshold=threshold), params)
        formats.plan(weights, formats.HF).write(Path(directory))
        return {}

    def open(self, directory: str) -> dict:
        """What must be read for a byte, and for a patch, with one row."""
        import bltjax

        self.model = bltjax.load(directory)
        return self.bytes_to_read()

    def bytes_to_read(self) -> dict:
        params = self.model.params
        encoder, decoder = params["blt"]["local_encoder"], params["blt"]["local_decoder"]
        cross = decoder["cross_attn_layers"]
        of_patches = params["blt"]["global_transformer"], cross["wk"], cross["wv"]
        of_patches += (decoder["patch_embedding_projection"], encoder["patch_embedding_projection"])
        of_patches += tuple(encoder["cross_attn_layers"][name] for name in ("wq", "wo"))
        tables = encoder["tok_embeddings"], params["entropy_model"]["tok_embeddings"]

        def size(*trees):
            return sum(x.nbytes for x in self.jax.tree.leaves(trees))

        local = size(encoder, decoder, params["entropy_model"]) - size(tables)
        shared = size(*of_patches) - size(of_patches[0])
        return dict(byte=local - shared, patch=size(*of_patches))

    def write(self, prompts: list[str], new_bytes: int, **options) -> dict:
        """Seconds, texts and counts; texts and prompts as Latin-1, a character a byte."""
        prompts = [prompt.encode("latin-1") for prompt in prompts]
        started = time.perf_counter()
        texts, counts = self.model.generate_and_count(
            prompts, new_bytes, batch_size=len(prompts), **options
        )
        seconds = time.perf_counter() - started
        return dict(
            seconds=seconds, texts=[t.decode("latin-1") for t in texts], counts=counts._asdict()
        )

    def bandwidth(self) -> float:
        """Bytes a second that a sum over 256 MB reads."""
        if not hasattr(self, "array"):
            self.array = self.jax.numpy.ones(2**26)
            self.sum = self.jax.jit(lambda x: x.sum())
            self.sum(self.array).block_until_ready()
        started = time.perf_counter()
        self.sum(self.array).block_until_ready()
        return self.array.nbytes / (time.perf_counter() - started)


class TheirWriter(Transformers):
    """transformers writes text, without its cache, which gives other text."""

    def open(self, directory: str) -> dict:
        self.model = self.transformers.BltForCausalLM.from_pretrained(
            directory, attn_implementation="sdpa"
        ).to(self.device)
        self.model.eval()
        return {}

    def write(self, prompts: list[str], new_bytes: int) -> dict:
        """Prompts must be of one length."""
        rows = [[1, *(b + 4 for b in prompt.encode("latin-1"))] for prompt in prompts]
        ids = self.torch.tensor(rows, device=self.device)
        options = dict(do_sample=False, use_cache=False, suppress_tokens=[0, 1, 2, 3])
        started = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new_bytes,
                min_new_tokens=new_bytes,
                **options,
            )
        self.synchronise()
        seconds = time.perf_counter() - started
        texts = [
            bytes(i - 4 for i in row[ids.shape[1] :]).decode("latin-1") for row in out.tolist()
        ]
        return dict(seconds=seconds, texts=texts)


KINDS = dict(
    writer=Writer, their_writer=TheirWriter, bltjax=Ours, transformers=Transformers, torch=Torch
)


def main(kind: str, threads: int):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # not on macOS; before any library starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    subject = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            subject = subject or KINDS[kind](threads)
            answer = dict(answer=getattr(subject, question["do"])(**question["arguments"]))
        except Exception as error:
            answer = dict(error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
