"""Loss, perplexity and bits per byte of a model on held-out data."""

import math
from collections.abc import Iterable

import torch


@torch.no_grad()
def score(model, batches: Iterable, n_bytes: int, device, autocast, ranks=None) -> dict[str, float]:
    """Unweighted scores over micro-batches: {"loss", "ppl", "bpb", "targets", "bytes"}.

    loss is nats per target and ppl its exponential. Bits per byte, nats of all targets / ln 2 / `n_bytes` of the
    text they encode, compares across tokenizers. With `ranks`, each rank scores its share of the batches.
    """
    n_bytes = int(n_bytes)
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64)  # nats, targets
    for number, batch in enumerate(batches):
        if ranks is not None and number % ranks.world_size != ranks.rank:
            continue
        with autocast():
            nats = model(**batch.to(device))
        totals += torch.tensor([float(nats), float(batch.weights.sum(dtype="f8"))], dtype=torch.float64)
    model.train(was_training)
    if ranks is not None:
        totals = ranks.sum(totals)
    nats, targets = totals.tolist()
    loss = nats / max(targets, 1.0)
    return {"loss": loss, "ppl": math.exp(loss) if loss < 700 else math.inf,
            "bpb": nats / math.log(2) / max(n_bytes, 1), "targets": int(targets), "bytes": n_bytes}
