"""What a set of facts becomes when a source says something, in SQL over all facts at once.

Each source makes *claims*: facts that it says are so. A claim is `held` when a person or a run has
taken it out (retracted, quarantined). Of all claims to the answer of one question the rule picks
one, which is *active*; so the active facts follow from the claims, not from the order of runs.

    state of a claim   held if it is; else active or superseded while it is claimed; else
                       superseded (the source says something else now) or retracted

Knows the tables `state` and `statements`; does not know where they are kept (`fact_log`) or how
rows become statements (`rows`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeAlias

import duckdb
import pyarrow as pa

from workflows.ingestion.rows import NEIGHBOURS, TEXTS, TIME

Rule: TypeAlias = Literal["newest", "priority", "refuse"]

CLAIMS = pa.schema(
    [
        ("id", pa.string()),
        ("state", pa.string()),
        ("subject", pa.string()),
        ("prompt", pa.string()),
        ("target_new", pa.string()),
        ("target_true", pa.string()),
        ("paraphrases", TEXTS),
        ("neighbourhood", NEIGHBOURS),
        ("relation", pa.string()),
        ("valid_from", TIME),
        ("valid_to", TIME),
        ("reason", pa.string()),
        ("superseded_by", pa.string()),
        ("source", pa.string()),
        ("place", pa.string()),
        ("row", pa.int64()),
        ("snapshot", pa.string()),
        ("run", pa.string()),
        ("said_at", TIME),
        ("claimed", pa.bool_()),
        ("held", pa.string()),
        ("fact", pa.string()),
        ("content", pa.string()),
        ("question", pa.string()),
        ("changed_at", TIME),
        ("sequence", pa.int64()),
    ]
)
"""One claim; a segment of the log holds those that changed, the state the last of each."""

_TEXT = "id, subject, prompt, target_new, target_true, paraphrases, neighbourhood, relation"
_PLACE = "place, row, snapshot, run, said_at"
_NAMES = ", ".join(CLAIMS.names)


@dataclass(frozen=True, kw_only=True)
class Said:
    """Who says something, when, and what is done with contradictions."""

    source: str
    at: datetime
    run: str
    snapshot: str
    complete: bool
    rule: Rule
    priority: Sequence[str] = ()
    """Sources from the most trusted on; those not named come last."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A claim that is taken out (`retracted`, `quarantined`), or with None counts again."""

    source: str
    fact: str
    held: str | None
    reason: str | None


class Merge:
    """One change to the facts, made in a database in memory.

    Args:
        database: Has a table or view `state` (`CLAIMS`).
        sequence: The number of this change.
        at: When it is made.
    """

    def __init__(self, database: duckdb.DuckDBPyConnection, *, sequence: int, at: datetime) -> None:
        self.database, self.sequence, self.at = database, sequence, at

    def take(self, said: Said) -> list[tuple[int, str, str]]:
        """Let a source speak; its statements are in the table `statements` with a `position`.

        Returns:
            Statements that are refused: position, field, reason.
        """
        self._sql(
            """CREATE OR REPLACE TEMP TABLE batch AS
            SELECT position, op, explicit, again, fact, content, question, id,
                coalesce(asserted_at, $at) AS said_at,
                row_number() OVER (ORDER BY coalesce(asserted_at, $at), position) AS turn
            FROM statements""",
            at=said.at,
        )
        self._sql(
            "CREATE OR REPLACE TEMP TABLE mine AS SELECT fact, content, question, id, state,"
            " claimed, held, said_at, superseded_by FROM state WHERE source = $source",
            source=said.source,
        )
        # What was read before says nothing new, unless no fact could be made of it then.
        self._sql(
            """DELETE FROM batch b WHERE b.again AND (b.op = 'retract' OR EXISTS (
                SELECT 1 FROM mine m WHERE m.fact = b.fact
                AND (m.content = b.content OR NOT m.claimed OR m.held IS NOT NULL)))"""
        )
        refused = self._retractions()
        self._sql(
            """CREATE OR REPLACE TEMP TABLE said AS
            WITH final AS (
                SELECT fact, arg_max(op, turn) AS op FROM (
                    SELECT fact, op, turn FROM batch WHERE op = 'assert'
                    UNION ALL SELECT fact, 'retract', turn FROM retractions
                ) GROUP BY fact
            ), latest AS (
                SELECT b.* FROM batch b JOIN final USING (fact)
                WHERE b.op = 'assert' AND final.op = 'assert'
                QUALIFY row_number() OVER (PARTITION BY b.fact ORDER BY b.turn DESC) = 1
            )
            SELECT * FROM latest"""
        )
        refused += self._foreign_ids(said)
        if said.rule == "refuse":
            refused += self._contradictions(said)
        self._sql(
            """CREATE OR REPLACE TEMP TABLE ranked AS
            SELECT *, first(fact) OVER q AS answer, first(fact) OVER i AS same_id
            FROM said WINDOW
                q AS (PARTITION BY question ORDER BY turn DESC),
                i AS (PARTITION BY id ORDER BY turn DESC)"""
        )
        self._changes(said)
        self._resolve(said.rule, said.priority)
        return refused

    def hold(
        self, claims: Sequence[Held], *, run: str, rule: Rule, priority: Sequence[str]
    ) -> None:
        """Take claims out, or let them count again."""
        rows = [(c.source, c.fact, c.held, c.reason) for c in claims]
        names = ("source", "fact", "new_held", "new_reason")
        table = pa.table(
            {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(names)}
        )
        self.database.register("chosen", table)
        self._sql(
            """CREATE OR REPLACE TEMP TABLE changed AS
            SELECT s.* REPLACE (h.new_held AS held, h.new_reason AS reason, $run AS run)
            FROM state s JOIN chosen h USING (source, fact)""",
            run=run,
        )
        self.database.unregister("chosen")
        self._resolve(rule, priority)

    def gone(self, source: str) -> tuple[int, int]:
        """How many facts of a source are gone, and how many it claimed before."""
        row = self._sql(
            """SELECT count(*) FILTER (e.reason = 'gone from the source'), count(*)
            FROM mine m LEFT JOIN events e ON e.source = $source AND e.fact = m.fact
            WHERE m.claimed""",
            source=source,
        ).fetchone()
        assert row is not None, "count(*) gives a row"
        return int(row[0]), int(row[1])

    def _sql(self, text: str, **values: Any) -> duckdb.DuckDBPyConnection:
        return self.database.execute(text, values) if values else self.database.execute(text)

    def _retractions(self) -> list[tuple[int, str, str]]:
        """Table `retractions`: which facts a retraction means; and those that mean none."""
        self._sql(
            """CREATE OR REPLACE TEMP TABLE retractions AS
            WITH known AS (
                SELECT fact, question, id, 0 AS turn FROM mine WHERE claimed
                UNION ALL SELECT fact, question, id, turn FROM batch WHERE op = 'assert'
            ), wanted AS (SELECT * FROM batch WHERE op = 'retract')
            SELECT w.position, w.turn, k.fact FROM wanted w JOIN known k
                ON w.fact = k.fact WHERE k.turn < w.turn
            UNION SELECT w.position, w.turn, k.fact FROM wanted w JOIN known k
                ON w.question = k.question WHERE w.fact IS NULL AND k.turn < w.turn
            UNION SELECT w.position, w.turn, k.fact FROM wanted w JOIN known k
                ON w.id = k.id WHERE w.fact IS NULL AND w.question IS NULL AND k.turn < w.turn"""
        )
        unknown = self._sql(
            """SELECT position FROM batch WHERE op = 'retract' AND explicit
            AND position NOT IN (SELECT position FROM retractions) ORDER BY position"""
        ).fetchall()
        return [(p, "id", "a retraction of what this source does not say") for (p,) in unknown]

    def _foreign_ids(self, said: Said) -> list[tuple[int, str, str]]:
        """Take out what uses an id by which another source knows something else."""
        return self._take_out(
            """SELECT b.position, 'id',
                'the id ' || b.id || ' names another fact of the source ' || min(s.source)
            FROM said b JOIN state s ON s.id = b.id
            WHERE s.claimed AND s.source <> $source AND s.question <> b.question
            GROUP BY b.position, b.id""",
            source=said.source,
        )

    def _contradictions(self, said: Said) -> list[tuple[int, str, str]]:
        """Take out what contradicts what stands, also earlier in the same batch."""
        return self._take_out(
            """WITH gone AS (
                SELECT fact FROM retractions
                UNION SELECT fact FROM mine WHERE $complete AND fact NOT IN (SELECT fact FROM said)
            ), standing AS (
                SELECT question, fact, target_new, id FROM state WHERE state = 'active'
                AND NOT (source = $source AND fact IN (SELECT fact FROM gone))
            ), first_said AS (
                SELECT question, fact, id FROM said
                QUALIFY row_number() OVER (PARTITION BY question ORDER BY turn) = 1
            )
            SELECT b.position, 'target_new', 'contradicts the fact ' || s.id || ' (' ||
                s.target_new || '), which stands until it is retracted'
            FROM said b JOIN standing s USING (question) WHERE s.fact <> b.fact
            UNION ALL
            SELECT b.position, 'target_new', 'contradicts the row before with the id ' || f.id
            FROM said b JOIN first_said f USING (question)
            WHERE f.fact <> b.fact AND question NOT IN (SELECT question FROM standing)""",
            source=said.source,
            complete=said.complete,
        )

    def _take_out(self, query: str, **values: Any) -> list[tuple[int, str, str]]:
        found: list[tuple[int, str, str]] = self._sql(query, **values).fetchall()
        if found:
            positions = pa.table({"position": pa.array([f[0] for f in found], pa.int64())})
            self.database.register("out", positions)
            self._sql("DELETE FROM said WHERE position IN (SELECT position FROM out)")
            self.database.unregister("out")
        return sorted(found)

    def _changes(self, said: Said) -> None:
        """Table `changed`: the claims of the source that are not as they were."""
        self._sql(
            """CREATE OR REPLACE TEMP TABLE verdicts AS
            WITH late AS (  -- what the source said before is newer than what it says now
                SELECT r.fact, max_by(m.fact, m.said_at) AS rival FROM ranked r
                JOIN mine m USING (question)
                WHERE m.claimed AND m.held IS NULL AND m.fact <> r.fact AND m.said_at > r.said_at
                AND NOT $complete AND m.fact NOT IN (SELECT fact FROM retractions)
                GROUP BY r.fact
            ), winners AS (
                SELECT * FROM ranked WHERE answer = fact AND same_id = fact
                AND fact NOT IN (SELECT fact FROM late)
            ), losers AS (
                SELECT r.fact, r.position, coalesce(l.rival, CASE WHEN r.answer <> r.fact
                    THEN r.answer ELSE r.same_id END) AS rival
                FROM ranked r LEFT JOIN late l USING (fact)
                WHERE r.fact NOT IN (SELECT fact FROM winners)
            ), replaced AS (
                SELECT fact, max(rival) AS rival FROM (
                    SELECT m.fact, w.fact AS rival FROM mine m JOIN winners w USING (question)
                    WHERE m.claimed AND m.fact <> w.fact
                    UNION ALL
                    SELECT m.fact, w.fact AS rival FROM mine m JOIN winners w USING (id)
                    WHERE m.claimed AND m.fact <> w.fact
                ) GROUP BY fact
            )
            SELECT w.fact, w.position, true AS claimed, NULL::VARCHAR AS rival, NULL::VARCHAR AS why
            FROM winners w LEFT JOIN mine m USING (fact)
            WHERE m.fact IS NULL OR NOT m.claimed OR m.content <> w.content
                OR (m.state <> 'active' AND NOT $complete)
            UNION ALL
            SELECT l.fact, l.position, false, l.rival, 'the source says something else'
            FROM losers l LEFT JOIN mine m USING (fact)
            WHERE m.fact IS NULL OR m.claimed OR m.superseded_by IS DISTINCT FROM l.rival
            UNION ALL
            SELECT fact, NULL, false, rival, 'the source says something else' FROM replaced
            WHERE fact NOT IN (SELECT fact FROM said)
            UNION ALL
            SELECT m.fact, NULL, false, NULL, 'retracted by the source'
            FROM mine m WHERE m.claimed AND m.fact IN (SELECT fact FROM retractions)
            AND m.fact NOT IN (SELECT fact FROM said) AND m.fact NOT IN (SELECT fact FROM replaced)
            UNION ALL
            SELECT m.fact, NULL, false, NULL, 'gone from the source'
            FROM mine m WHERE $complete AND m.claimed
            AND m.fact NOT IN (SELECT fact FROM batch WHERE op = 'assert')
            AND m.fact NOT IN (SELECT fact FROM replaced)
            AND m.fact NOT IN (SELECT fact FROM retractions)""",
            complete=said.complete,
        )
        self._sql(
            f"""CREATE OR REPLACE TEMP TABLE changed AS
            WITH named AS (
                SELECT s.{_TEXT.replace(", ", ", s.")}, s.place, s.row, $snapshot AS snapshot,
                    $run AS run, coalesce(s.asserted_at, $at) AS said_at,
                    s.fact, s.content, s.question, v.claimed, v.rival, v.why
                FROM verdicts v JOIN statements s USING (position)
                UNION ALL
                SELECT o.{_TEXT.replace(", ", ", o.")}, o.{_PLACE.replace(", ", ", o.")},
                    o.fact, o.content, o.question, v.claimed, v.rival, v.why
                FROM verdicts v JOIN state o ON o.source = $source AND o.fact = v.fact
                WHERE v.position IS NULL
            )
            SELECT n.id, o.state, n.subject, n.prompt, n.target_new, n.target_true, n.paraphrases,
                n.neighbourhood, n.relation, o.valid_from, o.valid_to,
                n.why AS reason, n.rival AS superseded_by,
                $source AS source, n.place, n.row, n.snapshot, n.run, n.said_at, n.claimed,
                NULL::VARCHAR AS held, n.fact, n.content, n.question,
                $at AS changed_at, 0 AS sequence
            FROM named n LEFT JOIN state o ON o.source = $source AND o.fact = n.fact""",
            source=said.source,
            at=said.at,
            snapshot=said.snapshot,
            run=said.run,
        )

    def _resolve(self, rule: Rule, priority: Sequence[str]) -> None:
        """Table `events`: every claim whose row changes, as it is from now on."""
        ranks = pa.table(
            {"source": list(priority), "rank": list(range(len(priority)))},
            schema=pa.schema([("source", pa.string()), ("rank", pa.int64())]),
        )
        self.database.register("ranks", ranks)
        trusted = "coalesce(r.rank, 1000000)," if rule == "priority" else ""
        # A fact that stands is not pushed aside where contradictions are refused.
        standing = "(c.state IS DISTINCT FROM 'active')," if rule == "refuse" else ""
        self._sql(
            f"""CREATE OR REPLACE TEMP TABLE events AS
            WITH affected AS (SELECT DISTINCT question FROM changed),
            touched AS (
                SELECT {_NAMES}, true AS dirty FROM changed
                UNION ALL
                SELECT s.{_NAMES.replace(", ", ", s.")}, false FROM state s
                WHERE s.question IN (SELECT question FROM affected)
                AND NOT EXISTS (
                    SELECT 1 FROM changed c WHERE c.source = s.source AND c.fact = s.fact)
            ), answers AS (
                SELECT c.question, first(c.source ORDER BY {trusted} {standing} c.said_at DESC,
                        c.sequence = 0 DESC, c.sequence DESC, c.source) AS by_source,
                    first(c.fact ORDER BY {trusted} {standing} c.said_at DESC,
                        c.sequence = 0 DESC, c.sequence DESC, c.source) AS by_fact
                FROM touched c LEFT JOIN ranks r USING (source)
                WHERE c.claimed AND c.held IS NULL GROUP BY c.question
            ), judged AS (
                SELECT t.*, a.by_fact, CASE
                    WHEN t.claimed AND t.held IS NOT NULL THEN t.held
                    WHEN t.claimed AND a.by_source = t.source AND a.by_fact = t.fact THEN 'active'
                    WHEN t.claimed OR t.superseded_by IS NOT NULL THEN 'superseded'
                    ELSE 'retracted' END AS new_state
                FROM touched t LEFT JOIN answers a USING (question)
            )
            SELECT id, new_state AS state, subject, prompt, target_new, target_true, paraphrases,
                neighbourhood, relation,
                CASE WHEN new_state = 'active' AND state IS DISTINCT FROM 'active' THEN $at
                    ELSE valid_from END AS valid_from,
                CASE WHEN new_state = 'active' THEN NULL
                    WHEN state = 'active' THEN $at ELSE valid_to END AS valid_to,
                CASE WHEN new_state = 'active' THEN NULL
                    WHEN claimed AND held IS NULL THEN 'another source says something else'
                    ELSE reason END AS reason,
                CASE WHEN new_state = 'active' THEN NULL
                    WHEN claimed AND held IS NULL THEN by_fact ELSE superseded_by END
                    AS superseded_by,
                source, place, row, snapshot, run, said_at, claimed, held, fact, content, question,
                $at AS changed_at, $sequence AS sequence
            FROM judged
            WHERE dirty OR new_state IS DISTINCT FROM state
                OR (new_state = 'superseded' AND claimed AND by_fact IS DISTINCT FROM superseded_by)
            """,
            at=self.at,
            sequence=self.sequence,
        )
        self.database.unregister("ranks")
