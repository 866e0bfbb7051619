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
from datetime import datetime
from typing import Any

import duckdb
import pyarrow as pa

from workflows.ingestion.claims import CLAIMS, Held, Rule, Said
from workflows.ingestion.standing import Standing, Stands

_TEXT = "id, subject, prompt, target_new, target_true, paraphrases, neighbourhood, relation"
_PLACE = "place, row, snapshot, run, said_at"
_NAMES = ", ".join(CLAIMS.names)


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
            SELECT position, op, again, rewritten, fact, content, question, id,
                asserted_at IS NOT NULL AS timed, coalesce(asserted_at, $at) AS said_at,
                row_number() OVER (ORDER BY coalesce(asserted_at, $at), position) AS turn
            FROM statements""",
            at=said.at,
        )
        self._sql(
            "CREATE OR REPLACE TEMP TABLE mine AS SELECT fact, content, question, id, state,"
            " claimed, held, said_at, superseded_by, place FROM state WHERE source = $source",
            source=said.source,
        )
        self._leave_out_what_is_known(said)
        self._sql(
            "CREATE OR REPLACE TEMP TABLE listed AS"
            " SELECT DISTINCT fact FROM batch WHERE op = 'assert'"
        )
        refused = self._foreign_ids(said)
        if said.rule == "refuse" or said.guarded:
            refused += self._contradictions(said)
        self._spare(said, refused)
        refused += self._retractions()
        # What was said is pushed aside by what is said later, also if that is taken back then.
        self._sql(
            """CREATE OR REPLACE TEMP TABLE ranked AS
            SELECT *, first(fact) OVER q AS answer, first(fact) OVER i AS same_id
            FROM batch WHERE op = 'assert' WINDOW
                q AS (PARTITION BY question ORDER BY turn DESC),
                i AS (PARTITION BY id ORDER BY turn DESC)
            QUALIFY row_number() OVER (PARTITION BY fact ORDER BY turn DESC) = 1"""
        )
        self._sql(
            """CREATE OR REPLACE TEMP TABLE said AS
            SELECT r.* FROM ranked r
            LEFT JOIN (SELECT fact, max(turn) AS turn FROM retractions GROUP BY fact) x USING (fact)
            WHERE x.turn IS NULL OR x.turn < r.turn"""
        )
        self._changes(said)
        self._resolve(said.rule, said.priority, all_contested=said.rule_is_new)
        return refused

    def decide(self, rule: Rule, priority: Sequence[str]) -> None:
        """Answer all contested questions again, by another rule."""
        self._sql("CREATE OR REPLACE TEMP TABLE changed AS FROM state LIMIT 0")
        self._resolve(rule, priority, all_contested=True)

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

    def spared(self) -> int:
        """How many facts would be gone if their rows had not been rejected."""
        row = self._sql(
            "SELECT count(*) FROM spared WHERE fact NOT IN (SELECT fact FROM verdicts)"
        ).fetchone()
        assert row is not None, "count(*) gives a row"
        return int(row[0])

    def _sql(self, text: str, **values: Any) -> duckdb.DuckDBPyConnection:
        return self.database.execute(text, values) if values else self.database.execute(text)

    def _leave_out_what_is_known(self, said: Said) -> None:
        """Take out of the batch what says nothing new."""
        # What was read before, unless no fact could be made of it then.
        self._sql(
            """DELETE FROM batch b WHERE b.again AND (b.op = 'retract' OR EXISTS (
                SELECT 1 FROM mine m WHERE m.fact = b.fact
                AND (m.content = b.content OR NOT m.claimed OR m.held IS NOT NULL)))"""
        )
        again, rewritten = self._any_was_read_before()
        # A second chance does not make an old row newer than what the source has said since.
        for known_by in ("question", "id") if again else ():
            self._sql(
                f"""DELETE FROM batch WHERE position IN (
                    SELECT b.position FROM batch b JOIN statements n USING (position)
                    JOIN state m ON m.{known_by} = b.{known_by}
                    WHERE b.again AND b.op = 'assert' AND NOT b.timed
                    AND m.source = $source AND m.claimed AND m.fact <> b.fact
                    AND NOT (m.place = n.place AND m.row <= n.row))""",
                source=said.source,
            )
        if rewritten:
            self._leave_out_what_was_rewritten()
        # What the source has said at a later time than this.
        self._sql(
            """DELETE FROM batch b WHERE b.op = 'assert' AND NOT $complete AND EXISTS (
                SELECT 1 FROM mine m WHERE m.fact = b.fact AND m.said_at > b.said_at
                AND (m.claimed OR m.superseded_by IS NOT NULL))""",
            complete=said.complete,
        )

    def _any_was_read_before(self) -> tuple[bool, bool]:
        row = self._sql("SELECT bool_or(again), bool_or(rewritten) FROM batch").fetchone()
        assert row is not None, "an aggregate gives a row"
        return bool(row[0]), bool(row[1])

    def _leave_out_what_was_rewritten(self) -> None:
        """A file that is written whole each time says its old rows in it, but not anew."""
        self._sql(
            """CREATE OR REPLACE TEMP TABLE kept AS
            SELECT b.fact, b.question, b.id, b.turn FROM batch b JOIN mine m USING (fact)
            WHERE b.rewritten AND b.op = 'assert' AND m.claimed AND m.content = b.content
                AND (m.held IS NOT NULL OR NOT b.timed OR b.said_at <= m.said_at)
            UNION  -- what another file has answered otherwise since
            SELECT b.fact, b.question, b.id, b.turn FROM batch b JOIN mine m USING (fact)
            JOIN statements n USING (position) JOIN mine o ON o.fact = m.superseded_by
            WHERE b.rewritten AND b.op = 'assert' AND m.content = b.content
                AND m.place = n.place AND o.claimed AND o.place <> n.place
                AND (NOT b.timed OR b.said_at <= m.said_at)"""
        )
        # With it goes what stands before it and speaks of the same.
        for known_by in ("question", "id"):
            self._sql(
                f"""DELETE FROM batch b USING (
                    SELECT {known_by}, max(turn) AS turn FROM kept GROUP BY {known_by}
                ) k WHERE b.rewritten AND b.{known_by} = k.{known_by} AND b.turn <= k.turn"""
            )

    def _spare(self, said: Said, refused: Sequence[tuple[int, str, str]]) -> None:
        """Table `spared`: what a list still has, in a row that was rejected."""
        wrong = pa.table(
            {
                "id": pa.array([name for name, _, _ in said.rejected], pa.string()),
                "place": pa.array([place for _, place, _ in said.rejected], pa.string()),
                "row": pa.array([row for _, _, row in said.rejected], pa.int64()),
            }
        )
        self.database.register("wrong", wrong)
        self._sql(
            """CREATE OR REPLACE TEMP TABLE spared AS
            WITH rejected AS (
                FROM wrong
                UNION ALL SELECT id, place, row FROM statements WHERE position IN $refused
            ), named AS (
                SELECT s.fact FROM state s JOIN rejected w ON w.id = s.id
                WHERE $complete AND s.source = $source AND s.claimed
                UNION SELECT s.fact FROM state s
                JOIN rejected w ON w.id IS NULL AND w.place = s.place AND w.row = s.row
                WHERE $complete AND s.source = $source AND s.claimed
            ) FROM named WHERE fact NOT IN (SELECT fact FROM listed)""",
            refused=[position for position, _, _ in refused],
            complete=said.complete,
            source=said.source,
        )
        self.database.unregister("wrong")

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
                ON w.id = k.id WHERE w.fact IS NULL AND w.question IS NULL AND k.turn < w.turn
                AND NOT EXISTS (SELECT 1 FROM known n WHERE n.fact = k.fact AND n.id <> k.id
                    AND n.turn > k.turn AND n.turn < w.turn)"""
        )
        unknown = self._sql(
            """SELECT position FROM batch WHERE op = 'retract'
            AND position NOT IN (SELECT position FROM retractions) ORDER BY position"""
        ).fetchall()
        return [(p, "id", "a retraction of what this source does not say") for (p,) in unknown]

    def _foreign_ids(self, said: Said) -> list[tuple[int, str, str]]:
        """Take out what uses an id by which another source knows something else."""
        found: list[tuple[int, str, str]] = self._sql(
            """SELECT b.position, 'id',
                'the id ' || b.id || ' names another fact of the source ' || min(s.source)
            FROM batch b JOIN state s ON s.id = b.id
            WHERE b.op = 'assert' AND s.claimed AND s.source <> $source
                AND s.question <> b.question
            GROUP BY b.position, b.id""",
            source=said.source,
        ).fetchall()
        return self._take_out(found)

    def _contradictions(self, said: Said) -> list[tuple[int, str, str]]:
        """Take out what contradicts what stands at that moment, also earlier in the same batch."""
        self._sql(
            """CREATE OR REPLACE TEMP TABLE contested AS
            WITH asked AS (SELECT question, fact FROM batch WHERE op = 'assert')
            SELECT question FROM (
                FROM asked UNION ALL SELECT question, fact FROM state WHERE state = 'active'
                AND question IN (SELECT question FROM asked)
            ) GROUP BY question HAVING count(DISTINCT fact) > 1"""
        )
        standing = Standing()
        for question, fact, name, why, own in self._sql(
            """SELECT question, fact, id, 'the fact ' || id || ' (' || target_new
                || '), which stands until it is retracted', source = $source
            FROM state WHERE claimed AND held IS NULL AND question IN (FROM contested)
                AND (source <> $source OR (state = 'active'
                    AND (NOT $complete OR fact IN (FROM listed))))
            ORDER BY state = 'active', said_at, sequence, source DESC""",
            source=said.source,
            complete=said.complete,
        ).fetchall():
            standing.put(question, Stands(fact=fact, id=name, why=why), own=own)
        found: list[tuple[int, str, str]] = []
        for position, op, question, fact, name, matters in self._sql(
            """SELECT position, op, question, fact, id, question IN (FROM contested) FROM batch
            WHERE op = 'retract' OR question IN (FROM contested) OR id IN (
                SELECT id FROM batch WHERE question IN (FROM contested) UNION ALL
                SELECT id FROM state WHERE question IN (FROM contested))
            ORDER BY turn"""
        ).fetchall():
            if op == "retract":
                standing.retract(question, fact, name)
                continue
            stands = standing.of(question)
            if stands is not None and stands.fact != fact:
                found.append((position, "target_new", f"contradicts {stands.why}"))
                continue
            standing.let_go(name)
            if matters:
                why = f"the row before with the id {name}"
                standing.put(question, Stands(fact=fact, id=name, why=why), own=True)
        return self._take_out(found)

    def _take_out(self, found: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
        if found:
            positions = pa.table({"position": pa.array([f[0] for f in found], pa.int64())})
            self.database.register("out", positions)
            self._sql("DELETE FROM batch WHERE position IN (SELECT position FROM out)")
            self.database.unregister("out")
        return sorted(found)

    def _changes(self, said: Said) -> None:
        """Table `changed`: the claims of the source that are not as they were."""
        self._sql(
            """CREATE OR REPLACE TEMP TABLE verdicts AS
            WITH older AS (  -- what the source says otherwise, and has said at a later time
                SELECT r.fact, m.fact AS rival, m.said_at FROM said r JOIN mine m USING (question)
                WHERE m.fact <> r.fact AND m.said_at > r.said_at
                    AND (m.claimed OR m.superseded_by IS NOT NULL)
                UNION ALL
                SELECT r.fact, m.fact AS rival, m.said_at FROM said r JOIN mine m USING (id)
                WHERE m.fact <> r.fact AND m.said_at > r.said_at
                    AND (m.claimed OR m.superseded_by IS NOT NULL)
            ), late AS (
                SELECT fact, max_by(rival, said_at) AS rival FROM older
                WHERE NOT $complete AND rival NOT IN (SELECT fact FROM retractions)
                GROUP BY fact
            ), winners AS (
                SELECT * FROM said WHERE answer = fact AND same_id = fact
                AND fact NOT IN (SELECT fact FROM late)
            ), losers AS (
                SELECT r.*, coalesce(l.rival, CASE WHEN r.answer <> r.fact
                    THEN r.answer ELSE r.same_id END) AS rival
                FROM said r LEFT JOIN late l USING (fact)
                WHERE r.fact NOT IN (SELECT fact FROM winners)
            ), replaced AS (
                SELECT fact, max_by(rival, turn) AS rival FROM (
                    SELECT m.fact, b.fact AS rival, b.turn FROM mine m JOIN batch b USING (question)
                    WHERE b.op = 'assert' AND m.claimed AND m.fact <> b.fact
                        AND ($complete OR b.said_at >= m.said_at)
                    UNION ALL
                    SELECT m.fact, b.fact AS rival, b.turn FROM mine m JOIN batch b USING (id)
                    WHERE b.op = 'assert' AND m.claimed AND m.fact <> b.fact
                        AND ($complete OR b.said_at >= m.said_at)
                ) WHERE fact NOT IN (SELECT fact FROM said) GROUP BY fact
            )
            SELECT w.fact, w.position, true AS claimed, NULL::VARCHAR AS rival, NULL::VARCHAR AS why
            FROM winners w LEFT JOIN mine m USING (fact)
            WHERE m.fact IS NULL OR NOT m.claimed OR m.content <> w.content
                OR (m.state <> 'active' AND NOT $complete) OR (w.timed AND w.said_at > m.said_at)
            UNION ALL
            SELECT l.fact, l.position, false, l.rival, 'the source says something else'
            FROM losers l LEFT JOIN mine m USING (fact)
            WHERE m.fact IS NULL OR m.claimed OR m.superseded_by IS NULL
                OR (l.timed AND l.said_at > m.said_at)
            UNION ALL
            SELECT fact, NULL, false, rival, 'the source says something else' FROM replaced
            UNION ALL
            SELECT m.fact, NULL, false, NULL, 'retracted by the source'
            FROM mine m WHERE m.claimed AND m.fact IN (SELECT fact FROM retractions)
            AND m.fact NOT IN (SELECT fact FROM said) AND m.fact NOT IN (SELECT fact FROM replaced)
            UNION ALL
            SELECT r.fact, r.position, false, NULL, 'retracted by the source'
            FROM ranked r WHERE r.fact NOT IN (SELECT fact FROM said)
            AND r.fact NOT IN (SELECT fact FROM mine)
            UNION ALL
            SELECT m.fact, NULL, false, NULL, 'gone from the source'
            FROM mine m WHERE $complete AND m.claimed
            AND m.fact NOT IN (SELECT fact FROM listed)
            AND m.fact NOT IN (SELECT fact FROM spared)
            AND m.fact NOT IN (SELECT fact FROM replaced)
            AND m.fact NOT IN (SELECT fact FROM retractions)""",
            complete=said.complete,
        )
        # A list that still has what was taken out does not say it anew.
        stays = "$complete AND n.claimed AND o.claimed AND o.held IS NOT NULL"
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
                CASE WHEN {stays} THEN o.reason ELSE n.why END AS reason,
                n.rival AS superseded_by, $source AS source,
                n.place, n.row, n.snapshot, n.run, n.said_at, n.claimed,
                CASE WHEN {stays} THEN o.held END AS held, n.fact, n.content, n.question,
                $at AS changed_at, 0 AS sequence
            FROM named n LEFT JOIN state o ON o.source = $source AND o.fact = n.fact""",
            source=said.source,
            at=said.at,
            snapshot=said.snapshot,
            run=said.run,
            complete=said.complete,
        )

    def _resolve(self, rule: Rule, priority: Sequence[str], *, all_contested: bool = False) -> None:
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
            WITH affected AS (
                SELECT question FROM changed
                UNION SELECT question FROM state
                WHERE $all_contested AND claimed AND held IS NULL
                GROUP BY question HAVING count(*) > 1
            ),
            touched AS (
                SELECT {_NAMES}, true AS dirty FROM changed
                UNION ALL
                SELECT s.{_NAMES.replace(", ", ", s.")}, false FROM state s
                WHERE s.question IN (SELECT question FROM affected)
                AND NOT EXISTS (
                    SELECT 1 FROM changed c WHERE c.source = s.source AND c.fact = s.fact)
            ), answers AS (
                -- Equal times come from columns only: no change is made at the time of another.
                SELECT c.question, first(c.source ORDER BY {trusted} {standing} c.said_at DESC,
                        c.source, c.fact) AS by_source,
                    first(c.fact ORDER BY {trusted} {standing} c.said_at DESC,
                        c.source, c.fact) AS by_fact
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
            all_contested=all_contested,
        )
        self.database.unregister("ranks")
