"""Ten steps from Hugging Face's weights are those of transformers and PyTorch's AdamW, live."""

import numpy as np
import pytest

from bltjax.vocabulary import encode
from tests.processes import metrics
from tests.recipe.test_start import TEXT, config, one_device, sources, train

__all__ = ["config", "one_device", "sources"]  # fixtures
torch = pytest.importorskip("torch", reason="the oracle needs torch==2.13.0 (CPU)")
transformers = pytest.importorskip("transformers", reason="the oracle is transformers>=5.23")

STEPS, RATE = 10, 1e-3


def losses_of_torch(source) -> list[float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(source).train()
    learned = [p for name, p in model.named_parameters() if ".patcher." not in name]
    betas = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = torch.optim.AdamW(learned, lr=RATE, **betas)
    ids = torch.tensor(encode(TEXT)[None], dtype=torch.long)
    losses = []
    for _ in range(STEPS):
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.long
def test_ten_steps(sources, config, tmp_path):
    changes = {"blt_training.steps": STEPS, "blt_training.optimizer.learning_rate": RATE}
    directory = train(config(sources["hf"], **changes), tmp_path / "run")
    ours = [line["loss"] for line in metrics(directory.path, "blt")]
    theirs = losses_of_torch(sources["hf"])
    assert len(ours) == STEPS and ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
