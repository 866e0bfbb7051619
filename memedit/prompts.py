"""Texts to token ids: contexts, completions, and where the last token of the subject is.

Knows the tokenizer's offsets and nothing of the model. Every position is found through the
character offsets of the whole text, never by counting tokens of its parts, so a BOS token or a
token that spans a border cannot shift it. Targets are concatenated as ids, never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from memedit.errors import InputError
from memedit.requests import EditRequest

BARE = "{}"
KL_PROMPT = "{} is a"

# Neutral openings of different kind and length, of our own writing. Sampling them from a small
# instruct model gives junk and makes runs irreproducible, so a fixed list is the default.
FIXED_CONTEXTS: tuple[str, ...] = (
    "The weather was mild that year. {}",
    "Therefore, it is worth noting this. {}",
    "Because of the long history of the region, people often ask about it. {}",
    "I read about it in the newspaper. {}",
    "You may have heard the following. {}",
)


@dataclass(frozen=True, kw_only=True)
class Located:
    """Token ids of one text and the positions of the subject's tokens in it."""

    ids: tuple[int, ...]
    subject_first: int
    subject_last: int


@dataclass(frozen=True, kw_only=True)
class EncodedRequest:
    """One fact as token ids in every context; the bare prompt is the first.

    `contexts[j].ids` end with the prompt; the model is asked for `target_ids` after it.
    `kl` is "{subject} is a", whose next-token distribution at the subject must not move.
    """

    request: EditRequest
    contexts: tuple[Located, ...]
    target_ids: tuple[int, ...]
    kl: Located


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text as the model expects it (with the tokenizer's own BOS, if it has one)."""
    return list(tokenizer(text)["input_ids"])


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of the target that follows it after a space.

    Where the prompt's ids are a prefix of the ids of prompt and target, the rest are the target's;
    where a token would span the border, the target is encoded by itself and concatenated.
    """
    prompt_ids = encode(tokenizer, prompt)
    whole_ids = encode(tokenizer, f"{prompt} {target}")
    if whole_ids[: len(prompt_ids)] == prompt_ids and len(whole_ids) > len(prompt_ids):
        return prompt_ids, whole_ids[len(prompt_ids) :]
    # Behind a full stop, so that no tokenizer adds a space of its own to what begins a text.
    before, whole_ids = encode(tokenizer, "."), encode(tokenizer, f". {target}")
    if whole_ids[: len(before)] == before:
        return prompt_ids, whole_ids[len(before) :]
    return prompt_ids, list(tokenizer(f" {target}", add_special_tokens=False)["input_ids"])


def check_prompts(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, positions: float
) -> None:
    """Refuse a fact of whose prompts one is too long, with its longest target, for the model.

    Args:
        tokenizer: The model's.
        request: The fact; what only the evaluation asks is left to `readable`.
        positions: How many the model reads (`memedit.model.positions_of`).

    Raises:
        InputError: Names the field, the length and the limit.
    """
    targets = [target for target in (request.target_new, request.target_true) if target]
    asked = [("prompt", request.text, target) for target in targets]
    asked += [("paraphrases", text, target) for text in request.paraphrases for target in targets]
    for neighbour in request.neighbourhood:
        for target in (neighbour.target, request.target_new):
            asked.append(("neighbourhood", neighbour.prompt, target))
    for field, prompt, target in asked:
        length = _length(tokenizer, prompt, target, positions)
        if length > positions:
            raise InputError(
                f"{length} tokens with its target, in {prompt[:40]!r}…; the model reads"
                f" {positions}",
                field=field,
            )


def readable(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, positions: float
) -> EditRequest:
    """The fact without those prompts that serve the evaluation alone and are too long for it."""
    targets = [target for target in (request.target_new, request.target_true) if target]

    def fits(prompt: str, target: str) -> bool:
        return _length(tokenizer, prompt, target, positions) <= positions

    return replace(
        request,
        attributes=tuple(p for p in request.attributes if all(fits(p, t) for t in targets)),
        portability=tuple(p for p in request.portability if fits(p.prompt, p.target)),
    )


def _length(tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, positions: float) -> int:
    """How many tokens a completion has; 0 where it surely has no more than `positions`."""
    # A token has a byte at least, and few are added: most texts need no tokenizer to be judged.
    if 2 * len(f"{prompt} {target}".encode()) <= positions:
        return 0
    return sum(map(len, encode_completion(tokenizer, prompt, target)))


def locate_subject(tokenizer: PreTrainedTokenizerBase, template: str, subject: str) -> Located:
    """Fill `subject` into a template with one `{}` and find the subject's tokens.

    Raises:
        InputError: The tokenizer gives no offsets, or no token covers the subject's end.
    """
    start = template.index("{}")
    end = start + len(subject)
    encoded = tokenizer(template.replace("{}", subject, 1), return_offsets_mapping=True)
    if "offset_mapping" not in encoded:
        raise InputError(
            "the tokenizer gives no character offsets, which are needed to find the subject; "
            "use a fast tokenizer (tokenizer.json)",
            field="tokenizer",
        )
    # Overlap, not equality: byte-level offsets may include the space before the subject, and a
    # token may run past its end.
    covering = [
        position
        for position, (first, last) in enumerate(encoded["offset_mapping"])
        if first < end and last > start and last > first
    ]
    if not covering:
        raise InputError(f"the tokenizer cannot locate the subject {subject!r}", field="subject")
    return Located(
        ids=tuple(encoded["input_ids"]), subject_first=covering[0], subject_last=covering[-1]
    )


def encode_request(
    tokenizer: PreTrainedTokenizerBase, request: EditRequest, contexts: Sequence[str]
) -> EncodedRequest:
    """Encode a fact in all contexts (templates with one `{}`, which stands for the prompt).

    Raises:
        InputError: The subject cannot be located, or lies on the first position of the bare prompt,
            which is an attention sink: a key taken there would edit every text.
    """
    texts = [context.replace("{}", request.prompt, 1) for context in contexts]
    located = tuple(locate_subject(tokenizer, text, request.subject) for text in texts)
    if located[0].subject_last == 0:
        raise InputError(
            f"the subject {request.subject!r} is the single first token of the prompt, an "
            "attention sink whose key is shared by all texts; put a word before it",
            field="subject",
        )
    _, target_ids = encode_completion(tokenizer, request.text, request.target_new)
    if not target_ids:
        raise InputError("the target has no token", field="target_new")
    kl = locate_subject(tokenizer, KL_PROMPT, request.subject)
    return EncodedRequest(request=request, contexts=located, target_ids=tuple(target_ids), kl=kl)
