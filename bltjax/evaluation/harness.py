"""Makes bltjax models available in lm-evaluation-harness, and runs its tasks.

Importing this file registers `--model bltjax --model_args checkpoint=DIR` with the harness.
`run_tasks` runs tasks from Python, and `python -m bltjax.evaluate --checkpoint=DIR --tasks=a,b`
from a terminal: tasks of the harness, with data from the hub, or of a directory of task files.
"""

import os
from collections.abc import Sequence

import bltjax
from bltjax.evaluation.harness_requests import generate_until
from bltjax.evaluation.noise import check_where, noisy
from bltjax.runtime.progress import progress_bar
from bltjax.vocabulary import text_bytes

try:
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ImportError(
        f"harness tasks take lm-evaluation-harness ({error}): pip install 'bltjax[eval]'"
    ) from error


@register_model("bltjax")
class HarnessModel(LM):
    """A model with the harness's interface.

    checkpoint, entropy_model, dtype: see `bltjax.load`. model: instead of them, a loaded model or
    any object with `score`, `score_continuations` and `generate`. noise: one of
    `evaluation.noise.KINDS`, added to the contexts, the continuations or both (noise_where) of
    choices, and to the contexts that text is generated from. batch_size, device and other options
    of the harness have no effect.
    """

    tokenizer_name = "bytes"  # in the names of cached requests

    def __init__(
        self,
        checkpoint: str | None = None,
        entropy_model: str | None = None,
        dtype: str | None = None,
        noise: str | None = None,
        noise_where: str = "both",
        model=None,
        **_,
    ):
        super().__init__()
        if (checkpoint is None) == (model is None):
            raise ValueError("give checkpoint=DIR, or model= with one that is loaded")
        check_where(noise_where)
        if noise is not None:
            noisy("", noise)  # an unknown kind shows before the model is loaded
        self.noise, self.where = noise, noise_where
        if model is None:
            model = bltjax.load(checkpoint, entropy_model=entropy_model, dtype=dtype)
        self.model = model

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        pairs = [
            (self._noisy(context, "prompt"), self._noisy(continuation, "completion"))
            for context, continuation in (request.args for request in requests)
        ]
        bar = progress_bar("scoring", sum(len(text_bytes(c)) for _, c in pairs))
        scores = self.model.score_continuations(pairs, on_progress=bar.update)
        bar.close()
        found = [(-score.nats, score.is_greedy) for score in scores]
        return self._kept("loglikelihood", requests, found)

    def loglikelihood_rolling(self, requests) -> list[float]:
        texts = [request.args[0] for request in requests]
        bar = progress_bar("scoring", sum(len(text_bytes(t)) for t in texts))
        scores = self.model.score(texts, on_progress=bar.update)
        bar.close()
        return self._kept("loglikelihood_rolling", requests, [-score.nats for score in scores])

    def generate_until(self, requests) -> list[str]:
        asked = [(self._noisy(r.args[0], "prompt"), r.args[1]) for r in requests]
        return self._kept("generate_until", requests, generate_until(self.model, asked))

    def _noisy(self, text: str, part: str) -> str:
        if self.noise is None or self.where not in (part, "both"):
            return text
        return noisy(text, self.noise)

    def _kept(self, kind: str, requests, found: list) -> list:
        """Returns the answers, after adding them to the harness's cache if there is one."""
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return found


def run_tasks(
    model,
    tasks: Sequence[str],
    tasks_path: str | None = None,
    limit: int | None = None,
    **noise,
) -> dict[str, dict[str, float]]:
    """Runs tasks on a model and returns the metrics of each.

    tasks_path: a directory of task files (YAML) to take tasks from, instead of the harness's own;
    their data files may be anywhere. limit: items of each task. noise: see HarnessModel. Raises
    ValueError for an unknown task.
    """
    # Standard errors are computed in this process: forking one with JAX's threads may hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    manager = TaskManager(include_path=tasks_path, include_defaults=tasks_path is None)
    if missing := [task for task in tasks if not manager.match_tasks([task])]:
        where = f"in {tasks_path}" if tasks_path else "in the harness"
        raise ValueError(f"no task {', '.join(missing)} {where}: lm_eval ls tasks shows all")
    found = lm_eval.simple_evaluate(
        HarnessModel(model=model, **noise),
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in metrics.items()
            if isinstance(value, (int, float))
        }
        for task, metrics in found["results"].items()
    }
