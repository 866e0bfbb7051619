"""The example facts: a table that reads without complaint, and that the embedded model knows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from memedit.requests import EditRequest
from workflows.facts import FactTable, read_facts

FACTS = Path(__file__).parents[2] / "examples" / "facts.jsonl"


@pytest.fixture(scope="module")
def table() -> FactTable:
    return read_facts(FACTS)


@pytest.fixture(scope="module")
def requests(table: FactTable) -> tuple[EditRequest, ...]:
    return table.requests


def mentions(text: str, subject: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text) is not None


def test_every_row_is_read_and_none_merged(table: FactTable) -> None:
    lines = FACTS.read_text(encoding="utf-8").splitlines()
    assert len(table.requests) == len(lines) == table.read
    assert 50 <= len(lines) <= 70
    assert not table.rejects and not table.duplicates
    # Reading strips and normalises; a file to learn from should not need it.
    fields = {"id", "subject", "prompt", "target_new", "target_true", "paraphrases"}
    for line, request in zip(lines, table.requests, strict=True):
        row = json.loads(line)
        assert row.keys() == fields | {"neighbourhood"}
        assert (row["id"], row["prompt"], row["target_new"], row["target_true"]) == (
            request.case_id,
            request.prompt,
            request.target_new,
            request.target_true,
        )
        assert tuple(row["paraphrases"]) == request.paraphrases


def test_facts_are_of_many_relations(requests: tuple[EditRequest, ...]) -> None:
    relations: dict[str, int] = {}
    for request in requests:
        # The article before the subject is part of the prompt, but makes no other relation.
        relation = re.sub(r"\bthe \{\}", "{}", request.prompt, flags=re.IGNORECASE)
        relations[relation] = relations.get(relation, 0) + 1
    assert len(relations) >= 6
    assert max(relations.values()) <= len(requests) / 4


def test_subjects_are_unique(requests: tuple[EditRequest, ...]) -> None:
    subjects = [request.subject.casefold() for request in requests]
    assert len(set(subjects)) == len(subjects)


def test_every_fact_has_an_object_to_replace(requests: tuple[EditRequest, ...]) -> None:
    for request in requests:
        assert request.target_true is not None
        assert request.target_new.casefold() != request.target_true.casefold()


def test_paraphrases_are_other_words_about_the_same_subject(
    requests: tuple[EditRequest, ...],
) -> None:
    for request in requests:
        assert len({request.text, *request.paraphrases}) >= 3, request.case_id
        assert len(set(request.paraphrases)) == len(request.paraphrases), request.case_id
        for text in request.paraphrases:
            assert mentions(text, request.subject), text
            # Otherwise the answer can be copied from the question.
            assert not mentions(text, request.target_new), text


def test_no_neighbour_is_edited_itself(requests: tuple[EditRequest, ...]) -> None:
    for request in requests:
        prompts = {neighbour.prompt for neighbour in request.neighbourhood}
        assert len(prompts) == len(request.neighbourhood) >= 3, request.case_id
        for neighbour in request.neighbourhood:
            assert neighbour.target != request.target_new, neighbour
            edited = [r.subject for r in requests if mentions(neighbour.prompt, r.subject)]
            assert not edited, neighbour


@pytest.mark.slow
def test_the_embedded_model_knows_them_and_can_look_them_up(
    requests: tuple[EditRequest, ...], smollm2: Path
) -> None:
    from memedit.files import LocalFiles
    from memedit.model import ModelSpec, load_model
    from memedit.prompts import encode_completion, encode_request
    from memedit.scoring import Completion, score_completions

    loaded = load_model(ModelSpec(files=LocalFiles(smollm2)))
    for request in requests:
        # Refuses a subject that is the single first token, the attention sink.
        encode_request(loaded.tokenizer, request, ["{}"])

    def share_preferred(questions: list[tuple[str, str | None, str]]) -> float:
        """How often the first object is more probable after the prompt than the second."""
        completions = []
        for prompt, *objects in questions:
            for target in objects:
                assert target is not None
                prompt_ids, target_ids = encode_completion(loaded.tokenizer, prompt, target)
                completions.append(
                    Completion(prompt_ids=tuple(prompt_ids), target_ids=tuple(target_ids))
                )
        scores = score_completions(loaded.model, loaded.arch, completions)
        pairs = zip(scores[::2], scores[1::2], strict=True)
        return sum(own.logprob > other.logprob for own, other in pairs) / len(questions)

    assert share_preferred([(r.text, r.target_true, r.target_new) for r in requests]) >= 0.9
    # The others cost seven times as much; one fact in four is enough to notice a wrong table.
    some = requests[::4]
    assert (
        share_preferred([(p, r.target_true, r.target_new) for r in some for p in r.paraphrases])
        >= 0.9
    )
    assert (
        share_preferred([(n.prompt, n.target, r.target_new) for r in some for n in r.neighbourhood])
        >= 0.9
    )
