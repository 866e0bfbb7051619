"""Every layout in use, recognised by its fields and read into the same request."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from memedit.errors import InputError
from memedit.layouts import LAYOUTS, layout_of, read_row, split_row, to_row
from memedit.requests import EditRequest, Neighbour, Provenance

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"

NATIVE: dict[str, Any] = {
    "id": "tower",
    "subject": "Eiffel Tower",
    "prompt": "{} is located in the city of",
    "target_new": "Rome",
    "target_true": "Paris",
    "paraphrases": ["Where does the Eiffel Tower stand? In"],
    "neighbourhood": [{"prompt": "The Louvre is in", "target": "Paris"}],
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 7,
    "pararel_idx": 1,
    "requested_rewrite": {
        "prompt": "{} is located in the city of",
        "relation_id": "P131",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "Paris", "id": "Q90"},
        "subject": "Eiffel Tower",
    },
    "paraphrase_prompts": ["Where does the Eiffel Tower stand? In"],
    "neighborhood_prompts": ["The Louvre is in"],
    "attribute_prompts": ["The Colosseum is in"],
    "generation_prompts": ["Eiffel Tower's surroundings include"],
}
EASYEDIT_FLAT = {
    "case_id": 7,
    "prompt": "Eiffel Tower is located in the city of",
    "target_new": "Rome",
    "subject": "Eiffel Tower",
    "ground_truth": "Paris",
    "rephrase_prompt": "Where does the Eiffel Tower stand? In",
    "locality_prompt": "The Louvre is in",
    "locality_ground_truth": "Paris",
}
EASYEDIT_NESTED = {
    "case_id": 7,
    "prompt": "Eiffel Tower is located in the city of",
    "target_new": "Rome",
    "subject": "Eiffel Tower",
    "ground_truth": "Paris",
    "rephrase_prompt": "Where does the Eiffel Tower stand? In",
    "locality": {"neighborhood": {"prompt": ["The Louvre is in"], "ground_truth": ["Paris"]}},
    "portability": {"one_hop": {"prompt": "Its country is", "ground_truth": "Italy"}},
}
KNOWEDIT = {
    "id": 7,
    "subject": "Eiffel Tower",
    "prompt": "Eiffel Tower is located in the city of",
    "target_new": "Rome",
    "ground_truth": [["Paris"], ["Lutetia"]],
    "rephrase": "Where does the Eiffel Tower stand? In",
    "portability": {"Subject_Aliasing": [{"prompt": "La dame de fer is in", "ground_truth": []}]},
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The Louvre is in", "ground_truth": [["Paris"], ["Paris, France"]]},
            {"prompt": "nothing is known of this", "ground_truth": [[]]},
        ]
    },
}
WIKIBIO = {
    "id": 7,
    "concept": "Eiffel Tower",
    "text": "Eiffel Tower is located in the city of",
    "labels": "Rome",
    "ground_truth": "Paris",
    "rephrase": ["Where does the Eiffel Tower stand? In"],
    "locality": {"Relation_Specificity": [{"prompt": "The Louvre is in", "ground_truth": "Paris"}]},
}
ZSRE = {
    "subject": "UniFirst",
    "src": "What is the product made by UniFirst?",
    "pred": "cloth",
    "rephrase": "What will be the product of UniFirst?",
    "alt": "unmanned aircraft",
    "answers": ["uniform"],
    "loc": "nq question: who voiced gaston in beauty and the beast",
    "loc_ans": "Richard White",
    "cond": "cloth >> unmanned aircraft || What is the product made by UniFirst?",
}


def without_id(request: EditRequest) -> dict[str, Any]:
    """What is edited and where it must hold; see `test_what_serves_the_evaluation_alone`."""
    return {
        name: value for name, value in to_row(request).items() if name in NATIVE.keys() - {"id"}
    }


@pytest.mark.parametrize(
    "row",
    [COUNTERFACT, EASYEDIT_FLAT, EASYEDIT_NESTED, KNOWEDIT, WIKIBIO],
    ids=["counterfact", "easyedit", "easyedit-nested", "knowedit", "wikibio"],
)
def test_every_layout_says_the_same(row: dict[str, Any]) -> None:
    request = read_row(row)
    assert request.case_id == "7"
    assert without_id(request) == without_id(read_row(NATIVE))


MQUAKE: dict[str, Any] = {
    "case_id": 7,
    "requested_rewrite": [
        {
            "prompt": "{} is located in the city of",
            "relation_id": "P131",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "Paris", "id": "Q90"},
            "subject": "Eiffel Tower",
            "question": "Where does the Eiffel Tower stand? In",
        },
        {
            "prompt": "{} is the capital of",
            "relation_id": "P1376",
            "target_new": {"str": "Spain", "id": "Q29"},
            "target_true": {"str": "Italy", "id": "Q38"},
            "subject": "Rome",
            "question": "Of which country is Rome the capital?",
        },
    ],
    "questions": ["In which country is the Eiffel Tower?", "The Eiffel Tower's country?"],
    "answer": "France",
    "new_answer": "Spain",
    "new_single_hops": [{"question": "Where?", "cloze": "It is in", "answer": "Rome"}],
}
RIPPLE_EDITS: dict[str, Any] = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the country of citizenship of Leo of Pisa is Syria.",
        "subject_id": "Q1",
        "relation": "COUNTRY_OF_CITIZENSHIP",
        "target_id": "Q858",
        "original_fact": {
            "prompt": "The name of the country of citizenship of Leo of Pisa is United States.",
            "subject_id": "Q1",
            "relation": "COUNTRY_OF_CITIZENSHIP",
            "target_id": "Q30",
        },
    },
    "Relation_Specificity": [
        {
            "test_queries": [
                {
                    "prompt": "The name of the mother of Leo of Pisa is",
                    "answers": [{"value": "Irma", "aliases": []}],
                    "query_type": "regular",
                    "subject_id": "Q1",
                    "relation": "MOTHER",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        },
        {
            "test_queries": [
                {
                    "prompt": "The names of the siblings of Leo of Pisa are",
                    "answers": [],
                    "query_type": "regular",
                    "subject_id": "Q1",
                    "relation": "SIBLING",
                }
            ],
            "test_condition": "OR",
            "condition_queries": [],
        },
    ],
    "Subject_Aliasing": [
        {
            "test_queries": [
                {
                    "prompt": "The name of the country of citizenship of Fibonacci is",
                    "answers": [],
                    "subject_id": "Q1",
                    "relation": "COUNTRY_OF_CITIZENSHIP",
                }
            ],
        }
    ],
    "Compositionality_I": [
        {
            "test_queries": [
                {
                    "prompt": "The capital of Leo's country is",
                    "answers": [{"value": "Damascus", "aliases": ["Dimashq"]}],
                    "query_type": "two_hop",
                    "subject_id": "Q1x",
                },
                {"prompt": "Nobody knows what is", "answers": [], "subject_id": "Q2"},
            ],
            "test_condition": "OR",
            "condition_queries": [],
        }
    ],
    "Forgetfulness": [],
}


def test_what_serves_the_evaluation_alone() -> None:
    request = read_row(COUNTERFACT)
    assert request.attributes == ("The Colosseum is in",)
    assert request.generation_prompts == ("Eiffel Tower's surroundings include",)
    assert request.relation == request.relation_id == "P131"
    assert read_row(NATIVE).relation == "{} is located in the city of"
    assert read_row({**NATIVE, "relation_id": 131}).relation == "131"
    assert read_row({**NATIVE, "relation_id": 131.0}).relation == "131"
    assert read_row({**NATIVE, "references": "A text."}).references == ("A text.",)
    follows = (Neighbour(prompt="Its country is", target="Italy"),)
    assert read_row(EASYEDIT_NESTED).portability == follows
    assert read_row(KNOWEDIT).portability == ()  # no answer, nothing to measure
    listed = {"Reasoning": [{"prompt": "Its country is", "ground_truth": [["Italy"], ["Italia"]]}]}
    assert read_row({**KNOWEDIT, "portability": listed}).portability == follows
    question = {"Recalled Relation": "r", "New Question": "Its use?", "New Answer": "war"}
    assert read_row({**ZSRE, "portability": question}).portability == (
        Neighbour(prompt="Its use?", target="war"),
    )
    nested = {**NATIVE, "portability": EASYEDIT_NESTED["portability"]}
    assert read_row(nested).portability == follows
    # None of it makes another fact.
    assert request.digest == read_row(NATIVE).digest


@pytest.mark.parametrize("less", [(), ("paraphrases", "neighbourhood"), ("references",)])
def test_what_serves_the_evaluation_survives_a_native_row(less: tuple[str, ...]) -> None:
    row = {
        **NATIVE,
        "attributes": ["The Colosseum is in"],
        "portability": [{"prompt": "Its country is", "target": "Italy"}],
        "generation_prompts": ["Near the Eiffel Tower"],
        "references": ["The Colosseum stands in Rome."],
        "relation_id": "P131",
    }
    row = {name: value for name, value in row.items() if name not in less}
    assert to_row(read_row(row)) == row
    assert read_row(to_row(read_row(row))) == read_row(row)


def test_mquake() -> None:
    first, second = map(read_row, split_row(MQUAKE))
    assert (first.case_id, second.case_id) == ("7.1", "7.2")
    assert (first.subject, first.target_new, first.target_true) == ("Eiffel Tower", "Rome", "Paris")
    assert first.paraphrases == ("Where does the Eiffel Tower stand? In",)
    assert first.portability == tuple(
        Neighbour(prompt=q, target="Spain") for q in MQUAKE["questions"]
    )
    assert (second.subject, second.relation, second.portability) == ("Rome", "P1376", ())
    alone = {**MQUAKE, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    (row,) = split_row(alone)
    assert read_row(row).case_id == "7"
    with pytest.raises(InputError, match="expected an object, found a list"):
        read_row(MQUAKE)  # several facts in one row
    for other in (NATIVE, COUNTERFACT, "text"):
        assert split_row(other) == [other]


def test_ripple_edits() -> None:
    request = read_row(RIPPLE_EDITS)
    assert (request.subject, request.target_new) == ("Leo of Pisa", "Syria")
    assert request.prompt == "The name of the country of citizenship of {} is"
    assert request.target_true == "United States"
    assert request.neighbourhood == (
        Neighbour(prompt="The name of the mother of Leo of Pisa is", target="Irma"),
    )
    assert request.portability == (
        Neighbour(prompt="The capital of Leo's country is", target="Damascus"),
    )
    assert request.relation == "COUNTRY_OF_CITIZENSHIP"
    mother, sibling = RIPPLE_EDITS["Relation_Specificity"]
    same = {"test_queries": [{**mother["test_queries"][0], "prompt": request.text}]}
    again = {"test_queries": [{**sibling["test_queries"][0], "prompt": request.text}]}
    for others in ([], [mother], [mother, mother], [same, again]):
        alone = {**RIPPLE_EDITS, "Relation_Specificity": others}
        with pytest.raises(InputError, match="do not tell how it is called") as raised:
            read_row(alone)
        assert raised.value.field == "subject"
    assert read_row({**alone, "subject": "Leo of Pisa"}).prompt == request.prompt
    with pytest.raises(InputError, match="no sentence") as raised:
        read_row({**RIPPLE_EDITS, "edit": {"prompt": "Leo, Syria"}})
    assert raised.value.field == "edit.prompt"


@pytest.mark.parametrize(
    ("row", "group", "name"),
    [(COUNTERFACT, "requested_rewrite", "relation_id"), (RIPPLE_EDITS, "edit", "relation")],
)
def test_a_relation_may_stand_beside_the_edit(row: dict[str, Any], group: str, name: str) -> None:
    without = {k: v for k, v in row[group].items() if k != name}
    assert read_row({**row, group: without, "relation_id": "P9"}).relation == "P9"
    assert read_row({**row, "relation_id": "P9"}).relation == row[group][name]


def test_native() -> None:
    place = Provenance(source="f.jsonl", row=3)
    request = read_row(NATIVE, provenance=place)
    assert request == EditRequest(
        case_id="tower",
        subject="Eiffel Tower",
        prompt="{} is located in the city of",
        target_new="Rome",
        target_true="Paris",
        paraphrases=("Where does the Eiffel Tower stand? In",),
        neighbourhood=(Neighbour(prompt="The Louvre is in", target="Paris"),),
    )
    assert request.provenance == place
    assert to_row(request) == NATIVE


def test_zsre() -> None:
    request = read_row(ZSRE)
    assert request.prompt == "What is the product made by {}?"
    assert (request.target_new, request.target_true) == ("unmanned aircraft", "uniform")
    assert request.paraphrases == ("What will be the product of UniFirst?",)
    assert request.neighbourhood == (
        Neighbour(prompt="who voiced gaston in beauty and the beast?", target="Richard White"),
    )


def test_zsre_whose_new_answer_is_the_right_one_corrects_the_prediction() -> None:
    request = read_row({**ZSRE, "alt": "uniform"})
    assert (request.target_new, request.target_true) == ("uniform", "cloth")


def test_the_least_row_gets_an_id_from_its_content() -> None:
    row = {"subject": "Rome", "prompt": "{} is in", "target_new": "France", "target_true": None}
    request = read_row(row)
    assert request.case_id == read_row(row).case_id == request.digest[:16]
    assert read_row({**row, "target_new": "Spain"}).case_id != request.case_id
    assert (request.target_true, request.paraphrases, request.neighbourhood) == (None, (), ())


def test_case_id_is_another_name_for_id() -> None:
    row = {k: v for k, v in NATIVE.items() if k != "id"}
    assert read_row({**row, "case_id": 15833}).case_id == "15833"


def test_placeholders_of_an_absent_old_answer_are_none() -> None:
    for nothing in ("", "<|endoftext|>", [], [[]]):
        assert read_row({**EASYEDIT_FLAT, "ground_truth": nothing}).target_true is None


def test_a_paraphrase_may_be_a_template_and_repetitions_are_dropped() -> None:
    request = read_row({**NATIVE, "paraphrases": ["Find {} in", "Find Eiffel Tower in"]})
    assert request.paraphrases == ("Find Eiffel Tower in",)


def test_composed_and_decomposed_letters_give_equal_requests() -> None:
    row = {**NATIVE, "subject": "Café Procope", "target_new": "Málaga"}
    text = json.dumps(row, ensure_ascii=False)
    rows = [json.loads(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")]
    assert rows[0] != rows[1]
    assert read_row(rows[0]) == read_row(rows[1])
    assert read_row(rows[0]).digest == read_row(rows[1]).digest


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"subject": " "}, "subject", "whitespace"),
        ({"subject": "a {} b"}, "subject", "in the subject"),
        ({"target_new": ""}, "target_new", "is empty"),
        ({"target_new": 1997}, "target_new", "expected text, found a number"),
        ({"target_new": None}, "target_new", "'target_new' is missing"),
        ({"target_new": "Pa\x07ris"}, "target_new", "control character"),
        ({"target_new": "Paris"}, "target_new", "nothing to edit"),
        ({"prompt": "It stands in"}, "prompt", "neither"),
        ({"prompt": "{} {} is"}, "prompt", "2 times"),
        ({"prompt": "Eiffel Tower or Eiffel Tower?"}, "prompt", "occurs 2 times"),
        ({"id": 1.5}, "id", "found a number"),
        ({"id": ""}, "id", "is empty"),
        ({"id": True}, "id", "boolean"),
        ({"target_true": ["Paris"]}, "target_true", "found a list"),
        ({"paraphrases": "Where?"}, "paraphrases", "expected a list"),
        ({"paraphrases": ["ok", 3]}, "paraphrases[1]", "found a number"),
        ({"paraphrases": ["{} {}"]}, "paraphrases[0]", "several"),
        ({"attributes": "x"}, "attributes", "expected a list"),
        ({"attributes": ["{} x"]}, "attributes[0]", "own subject"),
        ({"portability": [{"prompt": "x"}]}, "portability[0]", "expected an object"),
        ({"portability": "x"}, "portability", "expected an object of groups"),
        ({"references": [3]}, "references[0]", "found a number"),
        ({"relation_id": ["P1"]}, "relation_id", "found a list"),
        ({"relation_id": 1.5}, "relation_id", "found a number"),
        ({"neighbourhood": ["x"]}, "neighbourhood[0]", "expected an object"),
        ({"neighbourhood": [{"prompt": "x"}]}, "neighbourhood[0]", "expected an object"),
        (
            {"neighbourhood": [{"prompt": "x", "target": ""}]},
            "neighbourhood[0].target",
            "empty",
        ),
        (
            {"neighbourhood": [{"prompt": "{} x", "target": "y"}]},
            "neighbourhood[0].prompt",
            "own subject",
        ),
    ],
)
def test_bad_native_rows_name_place_field_and_reason(
    change: dict[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        read_row({**NATIVE, **change}, provenance=Provenance(source="f.jsonl", row=4))
    error = raised.value
    assert (error.source, error.row, error.field) == ("f.jsonl", 4, field)


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ({"requested_rewrite": [{}]}, "requested_rewrite", "expected an object, found a list"),
        (
            {"requested_rewrite": {"target_true": {"str": "x"}}},
            "requested_rewrite.subject",
            "is missing",
        ),
        (
            {
                "requested_rewrite": {
                    **COUNTERFACT["requested_rewrite"],
                    "target_new": {"str": " "},
                }
            },
            "requested_rewrite.target_new.str",
            "whitespace",
        ),
        (
            {"requested_rewrite": {**COUNTERFACT["requested_rewrite"], "relation_id": []}},
            "requested_rewrite.relation_id",
            "found a list",
        ),
        ({**ZSRE, "alt": " "}, "alt", "whitespace"),
        ({**ZSRE, "src": "What is made by it?"}, "src", "neither"),
        ({k: v for k, v in ZSRE.items() if k != "alt"}, "alt", "is missing"),
        ({k: v for k, v in ZSRE.items() if k != "loc_ans"}, "loc_ans", "is missing"),
        ({**EASYEDIT_FLAT, "ground_truth": "Rome"}, "target_new", "nothing to edit"),
        ({**EASYEDIT_FLAT, "locality_prompt": ["a", "b"]}, "locality_prompt", "2 prompts but 1"),
        ({**KNOWEDIT, "locality": ["x"]}, "locality", "object of groups"),
        ({**KNOWEDIT, "locality": {"g": "x"}}, "locality.g", "expected a list"),
        ({**KNOWEDIT, "locality": {"g": ["x"]}}, "locality.g[0]", "expected an object"),
        (["a list"], None, "found a list"),
        ("text", None, "found a value of type str"),
    ],
)
def test_bad_rows_of_other_layouts_name_the_field_as_it_is_there(
    row: object, field: str | None, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as raised:
        read_row(row)
    assert raised.value.field == field


def test_an_unknown_layout_is_told_what_was_found_and_what_is_expected() -> None:
    with pytest.raises(InputError) as raised:
        read_row({"head": "Rome", "relation": "capital of", "tail": "Italy"})
    for part in ("head, relation, tail", "requested_rewrite", "subject, prompt, target_new"):
        assert part in str(raised.value)


def test_every_layout_is_recognised_by_what_it_needs() -> None:
    for layout in LAYOUTS:
        assert layout_of({*layout.needs, layout.marks[0]}).read is layout.read


@pytest.mark.parametrize("column", ["src", "alt", "concept", "edit", "note"])
def test_a_further_column_does_not_make_it_another_layout(column: str) -> None:
    row = {k: NATIVE[k] for k in ("id", "subject", "prompt", "target_new")}
    assert read_row({**row, column: "x"}) == read_row(row)


def rows_of(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{name}")
    text = path.read_text()
    return json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))


def test_real_counterfact() -> None:
    rows = rows_of("counterfact-2000.jsonl")
    requests = [read_row(row) for row in rows]
    assert len(requests) == 2000
    for row, request in zip(rows, requests, strict=True):
        assert request.case_id == str(row["case_id"])
        assert (request.subject, request.prompt) == (row["subject"], row["prompt"])
        assert len(request.neighbourhood) <= len(row["neighbourhood"])


def test_real_zsre() -> None:
    rows = rows_of("zsre-mend-300.json")
    requests = [read_row(row) for row in rows]
    assert len(requests) == 300
    for row, request in zip(rows, requests, strict=True):
        assert request.text == row["src"].strip()
        assert request.target_true is not None
        assert not any("nq question" in n.prompt for n in request.neighbourhood)
