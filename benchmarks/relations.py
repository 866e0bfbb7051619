"""CounterFact's relations, told from their templates: the table in use names none."""

from __future__ import annotations

import json
from typing import Any

NAMES = {
    "P27": "citizenship",
    "P103": "mother tongue",
    "P1412": "language spoken",
    "P495": "country of origin",
    "P413": "position played",
    "P106": "occupation",
    "P190": "twin city",
    "P37": "official language",
    "P127": "owner",
    "P740": "place of founding",
    "P449": "broadcaster",
    "P30": "continent",
    "P364": "original language",
    "P176": "manufacturer",
    "P178": "developer",
    "P159": "headquarters",
    "P20": "place of death",
    "P937": "work location",
    "P140": "religion",
    "P39": "position held",
    "P641": "sport",
    "P1303": "instrument",
    "P101": "field of work",
    "P108": "employer",
}
TEMPLATES = {
    "P27": ("citizen of", "citizenship from"),
    "P103": (
        "mother tongue of",
        ", a native",
        "native language of",
        "speaker of",
        "spoke the language",
    ),
    "P1412": ("{} speaks", "language used by", "writes in"),
    "P495": ("created in", "originated in", "formulated in", "developed in"),
    "P413": ("plays in the position", "plays the position", "position does", "plays as"),
    "P106": ("profession of", "'s profession", "occupation", "works as"),
    "P190": ("twin city",),
    "P37": ("official language", "language spoken is", "they understand", "declares the language"),
    "P127": (" owner", "owned by"),
    "P740": ("founded in", "formed in", "started in"),
    "P449": ("debut", "premiere", "released on", "aired on"),
    "P30": ("continent",),
    "P364": ("riginal language of", "The language of"),
    "P176": ("produced by", "product of", "created by"),
    "P178": ("developed by",),
    "P159": ("headquarter",),
    "P20": ("passed away", " died ", "life ended", "expired at", "succumbed", "lost their life"),
    "P937": ("worked in", "employment in", "to work in", "took up work", "employed in"),
    "P140": ("religion", "follower of"),
    "P39": ("the position of", "holds the title", "position is that of"),
    "P641": ("What sport", "is a professional"),
    "P1303": ("performing on the", "plays the instrument"),
    "P101": ("expertise", "field of", "domain of", "specializes in"),
    "P108": ("employed by", "works for"),
}
"""Parts of the templates that CounterFact words a relation with."""


def with_relation(line: str) -> dict[str, Any]:
    """A row of a JSON lines fact table, with `relation_id` where its template tells it."""
    row: dict[str, Any] = json.loads(line)
    relation = relation_of(row["prompt"])
    return row if relation is None else {**row, "relation_id": relation}


def relation_of(template: str) -> str | None:
    """The relation that a template words; None for others."""
    for relation, parts in TEMPLATES.items():
        if any(part in template for part in parts):
            return relation
    return None
