"""Evaluation: memedit's way against the reference's, fact by fact, in turns in one process.

    python -m benchmarks.evaluation                       # 100 facts
    python -m benchmarks.evaluation --count 10 --no-record

The reference's way is that of `compute_rewrite_quality_counterfact`: one fact at a time, all its
prompts with both targets padded to one batch, logits at every position, and then its free text,
which is generated here as memedit does it, with a cache. Both sides ask the same questions of the
same model and must give the same answers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.material import add_material_arguments, first_rows, spec_of
from benchmarks.record import append_row, save_json
from memedit.evaluate import GENERATION_EXTRA_TOKENS, says, score_facts
from memedit.generate import greedy_continuations
from memedit.model import LoadedModel, load_model
from memedit.outcome import FactResult
from memedit.prompts import encode_completion
from memedit.requests import EditRequest
from workflows.facts import read_facts


@torch.inference_mode()
def plain_scores(
    loaded: LoadedModel, pairs: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], tuple[float, bool]]:
    """Mean log P per target token and whether each is the argmax, as `test_batch_prediction`.

    One batch, padded on the right, with an attention mask; log_softmax token by token.
    """
    encoded = [encode_completion(loaded.tokenizer, *pair) for pair in pairs]
    width = max(len(prompt) + len(target) for prompt, target in encoded)
    rows = [prompt + target for prompt, target in encoded]
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    logits_BTV = loaded.model(input_ids=ids_BT, attention_mask=mask_BT).logits
    found = {}
    for b, (pair, (prompt, target)) in enumerate(zip(pairs, encoded, strict=True)):
        total, exact = 0.0, True
        for j, token in enumerate(target):
            logits_V = logits_BTV[b, len(prompt) + j - 1]
            total += torch.log_softmax(logits_V, dim=0)[token].item()
            exact = exact and int(logits_V.argmax()) == token
        found[pair] = total / len(target), exact
    return found


def plain_fact(loaded: LoadedModel, request: EditRequest) -> dict[str, Any]:
    """What `FactResult` says of a fact, the reference's way."""
    new, true = request.target_new, request.target_true
    assert true is not None, "the facts of the benchmark have one"
    prompts = (request.text, *request.paraphrases, *(n.prompt for n in request.neighbourhood))
    scores = plain_scores(loaded, [(p, target) for p in prompts for target in (new, true)])
    tokens = _target_tokens(loaded.tokenizer, request) + GENERATION_EXTRA_TOKENS
    (continuation,) = greedy_continuations(loaded.model, loaded.tokenizer, [request.text], tokens)

    def better(prompt: str) -> bool:
        return scores[prompt, new][0] > scores[prompt, true][0]

    return {
        "efficacy": better(request.text),
        "efficacy_exact": scores[request.text, new][1],
        "paraphrase": tuple(better(p) for p in request.paraphrases),
        "paraphrase_exact": tuple(scores[p, new][1] for p in request.paraphrases),
        "neighbourhood": tuple(not better(n.prompt) for n in request.neighbourhood),
        "neighbourhood_exact": tuple(scores[n.prompt, true][1] for n in request.neighbourhood),
        "generation": says(continuation, new),
        "logprob_new": scores[request.text, new][0],
    }


def _target_tokens(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> int:
    return len(encode_completion(tokenizer, request.text, request.target_new)[1])


def usable(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Facts that both ways can judge: every neighbour's answer is the fact's true object."""
    return [
        r
        for r in requests
        if r.target_true and all(n.target == r.target_true for n in r.neighbourhood)
    ]


def differences(facts: Sequence[FactResult], plain: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """How many judgements differ, and the largest difference of a log-probability."""
    judged, nats = 0, 0.0
    for fact, other in zip(facts, plain, strict=True):
        nats = max(nats, abs(fact.logprob_new - other["logprob_new"]))
        judged += sum(getattr(fact, k) != v for k, v in other.items() if k != "logprob_new")
    return judged, nats


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the wall clock, and what came out."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    """Run both sides in turns; print and store a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_material_arguments(parser)
    parser.add_argument("--count", type=int, default=100, help="of facts")
    parser.add_argument("--rounds", type=int, default=3, help="of both sides; the median is taken")
    parser.add_argument("--no-record", action="store_true", help="store nothing")
    args = parser.parse_args()
    loaded = load_model(spec_of(args))
    with first_rows(args.facts, 2 * args.count) as path:
        requests = usable(read_facts(path, on_bad_row="skip").requests)[: args.count]
    plain_fact(loaded, requests[0])  # whatever is made at the first use
    score_facts(loaded.model, loaded.tokenizer, loaded.arch, requests[:1])

    ours_s, plain_s = [], []
    for _ in range(args.rounds):
        seconds, facts = timed(
            lambda: score_facts(loaded.model, loaded.tokenizer, loaded.arch, requests)
        )
        ours_s.append(seconds)
        seconds, plain = timed(lambda: [plain_fact(loaded, request) for request in requests])
        plain_s.append(seconds)
    ratio = median(plain_s) / median(ours_s)
    judged, nats = differences(facts, plain)
    cells = {
        "facts": str(len(requests)),
        "memedit, s": f"{median(ours_s):.2f}",
        "one fact at a time, s": f"{median(plain_s):.2f}",
        "ratio": f"{ratio:.2f}",
        "judgements that differ": str(judged),
        "largest difference, nats": f"{nats:.1e}",
    }
    print("  ".join(f"{name} {value}" for name, value in cells.items()))
    if args.no_record:
        return
    save_json(
        "evaluation",
        {
            "facts": len(requests),
            "threads": torch.get_num_threads(),
            "memedit_s": ours_s,
            "plain_s": plain_s,
            "ratio": ratio,
            "judgements_that_differ": judged,
            "largest_difference_nats": nats,
        },
    )
    append_row("evaluation", cells)


if __name__ == "__main__":
    main()
