"""Made-up histories of a registry, for the tests of its page."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from memedit.outcome import METRIC_KEYS
from workflows.ingestion.page import PageHistory, PageReject, PageSource, PageVersion

START = datetime(2026, 9, 1, 4, tzinfo=UTC)
HOSTILE = (
    '<script>alert("x")</script><img src=http://evil.example/x onerror=alert(1)>'
    "' onload='x \u202egnp.exe\x00\x1b[31m \ud800 $\\frac{1}{$ {{ 7 * 6 }} {% endif %}"
)
RTL = "الحقائق من المصدر الأول: עברית 123"


def made_version(i: int, **changes: Any) -> PageVersion:
    at = (START + timedelta(days=i)).isoformat()
    percents = dict.fromkeys(METRIC_KEYS, 90.0 - 0.1 * (i % 30))
    shares = {"wiki-dump": 400 + 6 * i, "crm": 220 + 2 * i, "tickets": 40 + (i % 7)}
    version = PageVersion(
        run_id=f"nightly-{START + timedelta(days=i):%Y%m%dT%H%M%S}Z",
        created_at=at,
        moved_at=at,
        method="memit",
        facts=sum(shares.values()),
        added=8 + i % 5,
        superseded=i % 4,
        retracted=i % 3,
        rejected=i % 2,
        metrics=percents
        | {
            "efficacy": 97.5 + (i % 5) / 2,
            "paraphrase": 88.0 + (i * 7 % 11) / 2,
            "neighbourhood": 76.0 - 0.2 * (i % 20),
            "score": 85.0 + (i * 3 % 7) / 3,
            "perplexity": 21.0 + 0.02 * i + (i % 3) / 10,
            "drift_kl": 0.012,
        },
        path=f"s3://models/registry/versions/nightly-{i}",
        by="publish",
        sources=shares,
    )
    return replace(version, **changes)


def made_history(n: int = 12, *, current: int = 0, rejects: int = 60) -> PageHistory:
    """The `current`th newest of `n` versions is current."""
    versions = [made_version(i) for i in reversed(range(n))]
    if n:
        versions[current] = replace(
            versions[current], current=True, by="rollback" if current else "publish"
        )
    reasons = (
        "target_new: must not be empty",
        "prompt: 'The {} of' needs one {} for the subject, found 2",
        "subject: contradicts row 12 of facts.parquet, which is newer",
    )
    return PageHistory(
        registry="s3://models/registry",
        model="HuggingFaceTB/SmolLM2-135M",
        generated_at="2026-12-01T05:00:00+00:00",
        current=versions[current].run_id if n else None,
        versions=tuple(versions),
        sources=(
            PageSource(
                name="wiki-dump",
                kind="iceberg",
                place="s3://lake/warehouse/facts.wiki_dump",
                active=466,
                last_read="2026-12-01T03:58:00+00:00",
                snapshot="snapshot 8231749012374",
            ),
            PageSource(name="crm", kind="delta", place="s3://lake/crm/facts", active=242),
            PageSource(name="tickets", kind="files", place="/data/in/*.jsonl", active=44),
        )
        if n
        else (),
        rejects=tuple(
            PageReject(
                at=(START + timedelta(days=9, minutes=-i)).isoformat(),
                source=("crm", "tickets")[i % 2],
                place=f"s3://lake/crm/facts/part-{i:05}.parquet",
                row=1000 + i,
                field=("target_new", "prompt", None)[i % 3],
                reason=reasons[i % 3].replace("12", str(i)),
                raw=json.dumps({"subject": f"Customer {i}", "prompt": "The {} of", "n": "x" * 90}),
            )
            for i in range(rejects)
        ),
        rejects_total=rejects,
        states={"active": 752, "superseded": 61, "retracted": 18, "quarantined": 5} if n else {},
    )


def hostile_history() -> PageHistory:
    long = "reason of ten thousand letters " * 330 + HOSTILE
    versions = tuple(
        made_version(
            i,
            run_id=f"{HOSTILE}{i}",
            created_at=HOSTILE,
            moved_at=HOSTILE,
            current=i == 2,
            method=HOSTILE,
            path="s3://key:secret@models/" + HOSTILE,
            pinned=True,
            problems=(HOSTILE, "x" * 5000),
            by="rollback",
            metrics={"score": None, "efficacy": float("nan"), "perplexity": float("inf")},
            sources={HOSTILE: 4, RTL: 9, "x" * 400: 3} | {f"s{k}{HOSTILE}": 1 for k in range(9)},
        )
        for i in reversed(range(3))
    )
    return PageHistory(
        registry=HOSTILE,
        model=HOSTILE,
        generated_at=HOSTILE,
        current=versions[0].run_id,
        versions=versions,
        sources=(
            PageSource(
                name=HOSTILE, kind=HOSTILE, place=HOSTILE, active=4, last_read=RTL, snapshot=HOSTILE
            ),
            PageSource(name=RTL, kind="x" * 300, place="y" * 9000, active=9, snapshot="z" * 300),
        ),
        rejects=tuple(
            PageReject(
                at=HOSTILE,
                source=HOSTILE,
                place="/data/" + "deep/" * 60,
                field=HOSTILE,
                reason=f"{chr(97 + i % 26)}{chr(97 + i // 26)} {(long, HOSTILE, RTL)[i % 3]}",
                raw=(HOSTILE, "q" * 300, RTL)[i % 3],
            )
            for i in range(250)
        ),
        rejects_total=12_345,
        states={"active": 3, HOSTILE: 2},
    )
