"""lm-evaluation-harness asks the server with its own client, and measures what it does here."""

import pytest

import bltjax
from tests.evaluation.test_harness import ITEMS, write_tasks
from tests.serving import servers

TASKS = ["local_choice", "local_text"]


@pytest.mark.long
def test_local_completions_give_the_numbers_of_our_adapter(tmp_path, monkeypatch):
    harness = pytest.importorskip(
        "bltjax.evaluation.harness", reason="needs lm-eval", exc_type=ImportError
    )
    # Else the harness takes the models that are registered, ours alone, for all there are.
    pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval[api]")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    checkpoint = servers.write_model(tmp_path / "tiny")
    # Its client counts spaces that end a context to the continuation.
    items = [item | dict(question=item["question"].rstrip()) for item in ITEMS]
    tasks = write_tasks(tmp_path / "tasks", items)
    own = measured(harness, harness.HarnessModel(model=bltjax.load(checkpoint)), tasks)
    with servers.running(checkpoint) as server:
        for batch in ("", ",batch_size=4"):
            told = f"model=tiny,base_url={server.url}/v1/completions{batch}"
            found = measured(harness, "local-completions", tasks, model_args=told)
            for task in TASKS:
                assert found["results"][task] == pytest.approx(own["results"][task], rel=1e-6)
            assert answers(found) == answers(own)


def measured(harness, model, tasks, **options):
    manager = harness.TaskManager(include_path=str(tasks), include_defaults=False)
    found = harness.lm_eval.simple_evaluate(
        model, tasks=TASKS, task_manager=manager, bootstrap_iters=0, **options
    )
    for numbers in found["results"].values():
        for name in [n for n, value in numbers.items() if not isinstance(value, float)]:
            del numbers[name]
    return found


def answers(found):
    """Of each choice: log p to three digits, and whether it is greedy."""
    return [
        [(round(float(nats), 3), str(greedy) == "True") for ((nats, greedy),) in sample["resps"]]
        for sample in sorted(found["samples"]["local_choice"], key=lambda s: s["doc_id"])
    ]
