"""Loss, perplexity and bits per byte of a model on held-out documents."""

import math
from collections.abc import Iterable

import torch

from common.runtime import autocast
from dataset import Documents, evaluated, evaluation_batches


def score_documents(model, documents: Documents, max_seq_len: int, batch_tokens: int, max_tokens: int, device,
                    dtype: str, ranks=None) -> dict:
    """The `score` of documents, each alone from `<s>` in windows of max_seq_len tokens: of the first that hold
    `max_tokens` tokens (0: all), in buffers of `batch_tokens`.

    With several sources each gets an equal part of `max_tokens`, and "sources" holds the score of each by name.
    """
    parts = documents.by_source() if len(documents.names) > 1 else [documents]
    scores = {}
    for part, name in zip(parts, documents.names, strict=True):
        if not len(part):  # all of it is also in another source
            continue
        own_tokens = -(-max_tokens // len(parts))
        n_bytes = part.bytes[:evaluated(part, own_tokens)].sum()
        scores[name] = score(model, evaluation_batches(part, max_seq_len, batch_tokens, own_tokens), n_bytes, device,
                             dtype, ranks)
    return total_of(list(scores.values())) | {"sources": scores} if len(parts) > 1 else scores[documents.names[0]]


@torch.no_grad()
def score(model, batches: Iterable, n_bytes: int, device, dtype: str, ranks=None) -> dict[str, float]:
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
        with autocast(device, dtype):
            nats = model(**batch.to(device))
        totals += torch.tensor([float(nats), float(batch.weights.sum(dtype="f8"))], dtype=torch.float64)
    model.train(was_training)
    if ranks is not None:
        totals = ranks.sum(totals)
    return _scores(*totals.tolist(), n_bytes)


def total_of(scores: list[dict]) -> dict[str, float]:
    """Scores of several files or sources as one: every target counts once, wherever it is."""
    return _scores(sum(s["loss"] * s["targets"] for s in scores), sum(s["targets"] for s in scores),
                   sum(s["bytes"] for s in scores))


def _scores(nats: float, targets: float, n_bytes: int) -> dict[str, float]:
    loss = nats / max(targets, 1.0)
    return {"loss": loss, "ppl": math.exp(loss) if loss < 700 else math.inf,
            "bpb": nats / math.log(2) / max(n_bytes, 1), "targets": int(targets), "bytes": n_bytes}
