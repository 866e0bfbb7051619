"""One reader a layout: which field of a data set's row plays which role.

Knows how each data set names its fields. Does not know which layout a row has
(`memedit.layouts`) or what makes a text valid (`memedit.requests`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from memedit.errors import InputError
from memedit.layout_values import (
    Named,
    Parts,
    Row,
    get,
    inside,
    items,
    maybe,
    one_or_many,
    pairs,
    texts_in,
)
from memedit.requests import type_name


def read_native(row: Row) -> Parts:
    """The native layout, as `memedit.layouts.to_row` writes it."""
    return Parts(
        subject=get(row, "subject"),
        prompt=get(row, "prompt"),
        target_new=get(row, "target_new"),
        target_true=maybe(row, "target_true"),
        paraphrases=items(maybe(row, "paraphrases")),
        neighbourhood=[
            _native_neighbour(n) for n in items(maybe(row, "neighbourhood", "neighborhood"))
        ],
        **_beside(row),
    )


EVALUATION_ONLY = (
    *("attributes", "attribute_prompts", "portability", "generation_prompts", "references"),
    "relation_id",
)
"""What a row of any layout may hold for the evaluation, under memedit's own names."""


def _beside(row: Row) -> dict[str, Any]:
    """The roles of `EVALUATION_ONLY`."""
    return {
        "attributes": items(maybe(row, "attributes", "attribute_prompts")),
        "portability": list(_portability(maybe(row, "portability"))),
        "generation_prompts": one_or_many(maybe(row, "generation_prompts")),
        "references": one_or_many(maybe(row, "references")),
        "relation_id": maybe(row, "relation_id"),
    }


def _portability(portability: Named | None) -> Iterator[tuple[Named, Named]]:
    """A list of memedit's own, one question as EasyEdit adds it to zsRE, or groups as KnowEdit."""
    if portability is None:
        return
    if isinstance(portability.value, list | tuple):
        yield from (_native_neighbour(p) for p in items(portability))
    elif isinstance(portability.value, Mapping) and "New Question" in portability.value:
        question, answer = inside(portability, "New Question"), inside(portability, "New Answer")
        if question and answer:
            yield question, answer
    else:
        yield from _nested_locality(portability)


def _relation_in(row: Row, group: str, name: str) -> dict[str, Any]:
    """The relation that an edit names, or else the row."""
    found = inside(Named(group, row[group]), name)
    return {"relation_id": found or maybe(row, "relation_id")}


def _native_neighbour(item: Named) -> tuple[Named, Named]:
    if not isinstance(item.value, Mapping) or not {"prompt", "target"} <= item.value.keys():
        raise InputError(
            'expected an object {"prompt": "…", "target": "…"}, '
            f"found {type_name(item.value)}: {str(item.value)[:60]}",
            field=item.field,
        )
    return (
        Named(f"{item.field}.prompt", item.value["prompt"]),
        Named(f"{item.field}.target", item.value["target"]),
    )


def read_counterfact(row: Row) -> Parts:
    """CounterFact as published with ROME: its neighbours share the fact's true object."""
    target_true = get(row, "requested_rewrite", "target_true", "str")
    return Parts(
        subject=get(row, "requested_rewrite", "subject"),
        prompt=get(row, "requested_rewrite", "prompt"),
        target_new=get(row, "requested_rewrite", "target_new", "str"),
        target_true=target_true,
        paraphrases=items(maybe(row, "paraphrase_prompts")),
        neighbourhood=[(n, target_true) for n in items(maybe(row, "neighborhood_prompts"))],
        **_beside(row) | _relation_in(row, "requested_rewrite", "relation_id"),
    )


def read_zsre_mend(row: Row) -> Parts:
    """The zsRE published with MEND: questions, and one unrelated question as the neighbour."""
    target_new = get(row, "alt")
    answers = [*one_or_many(maybe(row, "answers")), *one_or_many(maybe(row, "pred"))]
    locality = maybe(row, "loc")
    neighbourhood = []
    if locality is not None and isinstance(locality.value, str):
        # "nq question: " is a task tag for the T5 of that paper, and its questions end openly.
        question = locality.value.strip().removeprefix("nq question: ").rstrip("? ") + "?"
        neighbourhood = [(Named("loc", question), get(row, "loc_ans"))]
    return Parts(
        subject=get(row, "subject"),
        prompt=get(row, "src"),
        target_new=target_new,
        target_true=_old_answer(answers, target_new),
        paraphrases=one_or_many(maybe(row, "rephrase")),
        neighbourhood=neighbourhood,
        **_beside(row),
    )


def read_easyedit(row: Row) -> Parts:
    """EasyEdit's CounterFact and zsRE, flat or with a nested `locality`, and KnowEdit."""
    return _edit_row(row, subject="subject", prompt="prompt", target_new="target_new")


def read_wikibio(row: Row) -> Parts:
    """KnowEdit's WikiBio, which names the same things differently."""
    return _edit_row(row, subject="concept", prompt="text", target_new="labels")


def _edit_row(row: Row, *, subject: str, prompt: str, target_new: str) -> Parts:
    new = get(row, target_new)
    rephrased = maybe(row, "rephrase_prompt", "rephrase_prompts", "rephrase")
    return Parts(
        subject=get(row, subject),
        prompt=get(row, prompt),
        target_new=new,
        target_true=_old_answer(texts_in(maybe(row, "ground_truth", "target_true")), new),
        paraphrases=one_or_many(rephrased),
        neighbourhood=[*_flat_locality(row), *_nested_locality(maybe(row, "locality"))],
        **_beside(row),
    )


def read_mquake(row: Row) -> Parts:
    """MQuAKE with one rewrite (see `split_rewrites`): several-hop questions that it decides."""
    answer, beside = maybe(row, "new_answer"), _beside(row)
    questions = [(q, answer) for q in items(maybe(row, "questions")) if answer]
    return Parts(
        subject=get(row, "requested_rewrite", "subject"),
        prompt=get(row, "requested_rewrite", "prompt"),
        target_new=get(row, "requested_rewrite", "target_new", "str"),
        target_true=get(row, "requested_rewrite", "target_true", "str"),
        paraphrases=one_or_many(maybe(row["requested_rewrite"], "question")),
        **beside
        | {"portability": [*beside["portability"], *questions]}
        | _relation_in(row, "requested_rewrite", "relation_id"),
    )


def split_rewrites(row: Row) -> list[Row]:
    """One row for each rewrite of a case of MQuAKE, which may have several.

    The questions, which need all of them, go with the first. Other rows stay as they are.
    """
    rewrites = row.get("requested_rewrite")
    if not isinstance(rewrites, list | tuple) or not rewrites or "new_answer" not in row:
        return [row]
    several = len(rewrites) > 1 and row.get("case_id") is not None
    return [
        {
            **row,
            "requested_rewrite": rewrite,
            "questions": row.get("questions") if first else [],
            **({"case_id": f"{row['case_id']}.{number}"} if several else {}),
        }
        for number, rewrite in enumerate(rewrites, start=1)
        for first in (number == 1,)
    ]


FOLLOW = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
STAY = ("Relation_Specificity", "Forgetfulness")


def read_ripple_edits(row: Row) -> Parts:
    """RippleEdits: what follows from the edit, and what must stay.

    Its edit is a sentence that ends in the new object, and names the subject by its Wikidata id
    only: what the subject is called is read off the other prompts about it, unless the row has a
    `subject`. What else a query requires to hold (`condition_queries`) is not looked at.
    """
    prompt, target_new = _sentence(get(row, "edit", "prompt"))
    original, beside = maybe(row["edit"], "original_fact"), _beside(row)
    follow = [pair for group in FOLLOW for pair in _queries(row, group)]
    old = (
        None if original is None else inside(Named("edit.original_fact", original.value), "prompt")
    )
    return Parts(
        subject=maybe(row, "subject") or _subject(row, prompt),
        prompt=prompt,
        target_new=target_new,
        target_true=None if old is None else _sentence(old)[1],
        neighbourhood=[pair for group in STAY for pair in _queries(row, group)],
        **beside
        | {"portability": [*beside["portability"], *follow]}
        | _relation_in(row, "edit", "relation"),
    )


def _sentence(named: Named) -> tuple[Named, Named]:
    """`The capital of Italy is Rome.` as a prompt and the object that it ends in."""
    start, verb, end = str(named.value).strip().removesuffix(".").rpartition(" is ")
    if not verb:
        raise InputError(
            f"no sentence that says what something is: {named.value!r}", field=named.field
        )
    return Named(named.field, f"{start} is"), Named(named.field, end)


def _subject(row: Row, prompt: Named) -> Named:
    """The words that end the prompts about all relations of the subject, behind the first `of`.

    Only what must stay names the subject as the edit does (`Subject_Aliasing` does not), and of two
    further relations at least, since two alone may end alike: "date of birth of", "place of birth
    of".
    """
    asked = {row["edit"].get("relation"): _named_words(prompt)}
    for query in _test_queries(row, "Relation_Specificity"):
        about, text = inside(query, "subject_id"), inside(query, "prompt")
        if about and text and about.value == row["edit"].get("subject_id"):
            relation = inside(query, "relation") or text
            asked.setdefault(str(relation.value), _named_words(text))
    common: list[str] = []
    for words in zip(*(reversed(words) for words in asked.values()), strict=False):
        if len(set(words)) > 1:
            break
        common.insert(0, words[0])
    name = f" {' '.join(common)}".partition(" of ")[2]
    if len(asked) < 3 or not name or len(common) == min(map(len, asked.values())):
        raise InputError(
            "'subject' is missing, and the row's other prompts do not tell how it is called",
            field="subject",
        )
    return Named("edit.prompt", name)


def _named_words(prompt: Named) -> list[str]:
    """`The names of the siblings of Leo are` without its verb."""
    words = str(prompt.value).split()
    return words[:-1] if words[-1:] in (["is"], ["are"]) else words


def _test_queries(row: Row, group: str) -> Iterator[Named]:
    for test in items(maybe(row, group)):
        yield from items(inside(test, "test_queries"))


def _queries(row: Row, group: str) -> Iterator[tuple[Named, Named]]:
    """The prompts of a group with their first answers; one without an answer is left out."""
    for query in _test_queries(row, group):
        prompt = inside(query, "prompt")
        values = (inside(answer, "value") for answer in items(inside(query, "answers")))
        answer = next((value for value in values if value is not None and value.value), None)
        if prompt is not None and answer is not None:
            yield prompt, answer


def _flat_locality(row: Row) -> Iterator[tuple[Named, Named]]:
    prompts = one_or_many(maybe(row, "locality_prompt"))
    return pairs(prompts, one_or_many(maybe(row, "locality_ground_truth")), "locality_prompt")


def _nested_locality(locality: Named | None) -> Iterator[tuple[Named, Named]]:
    """Every group of a `locality`: {group: [{prompt, ground_truth}]} or one such object of lists.

    A prompt without any answer is left out: nothing can be measured on it.
    """
    if locality is None:
        return
    if not isinstance(locality.value, Mapping):
        raise InputError(
            f"expected an object of groups, found {type_name(locality.value)}",
            field=locality.field,
        )
    for group, value in locality.value.items():
        named = Named(f"{locality.field}.{group}", value)
        if isinstance(value, Mapping):
            yield from pairs(
                one_or_many(inside(named, "prompt")),
                one_or_many(inside(named, "ground_truth")),
                named.field,
            )
        elif value is not None:
            for item in items(named):
                prompt, answers = inside(item, "prompt"), inside(item, "ground_truth")
                answer = next(texts_in(answers), None)
                if prompt is not None and answer is not None:
                    yield from ((p, answer) for p in one_or_many(prompt))


def _old_answer(answers: Iterable[Named], target_new: Named) -> Named | None:
    """The first answer that is not the new object; if there is no other, the first."""
    found = list(answers)
    return next((a for a in found if a.value != target_new.value), found[0] if found else None)
