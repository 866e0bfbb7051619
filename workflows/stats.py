"""`memedit stats`: collect second moments only, for later edits of the same model.

Loads the blocks up to the last edited layer and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.artifacts import open_artifacts
from cluster.publication import open_publication
from memedit.manifest import code_versions
from memedit.moments import save_moment
from memedit.progress import Progress
from workflows.moments import STATS_NAME, TokenSource, corpus_of, moments_for, moments_name
from workflows.plain import write_result
from workflows.progress import Timed
from workflows.session import open_base, open_workers, settings_of
from workflows.settings import StatsJob, new_run_id


def run_stats(job: StatsJob, progress: Progress) -> Mapping[str, Any]:
    """Run `memedit stats`; the folder appears whole or not at all."""
    timed = Timed(progress)
    with open_publication(
        job.out, run_id=job.run_id or new_run_id(), storage=job.storage_settings
    ) as publication:
        timed.start("load")
        base = open_base(job, timed)
        settings = settings_of(job, base, 1, timed)
        base.checkpoint.check_finite()
        artifacts = open_artifacts(
            job.artifacts, cache=job.cache_folder, storage=job.storage_settings
        )
        source = TokenSource(
            corpus=corpus_of(job),
            base=base,
            settings=settings.moments,
            heldout_tokens=0,
            artifacts=artifacts,
        )
        # Sampling needs the whole model; counting only the blocks below.
        until = None if source.corpus.kind == "self" else settings.layers[-1]
        with open_workers(job, base.spec(until_layer=until), timed) as executor:
            timed.finish("load")
            moments = moments_for(
                source,
                base=base,
                settings=settings,
                executor=executor,
                artifacts=artifacts,
                progress=timed,
            )
        layers: dict[str, dict[str, Any]] = {}
        for layer in sorted(moments):
            moment = moments[layer]
            path = publication.staging / moments_name(layer)
            save_moment(path, moment, metadata={"digest": moments.digests[layer]})
            layers[str(layer)] = asdict(moment.summary)
            del moment  # not held while the next one is read
        stats = {
            "model": {"name": base.name, "digest": base.checkpoint.digest},
            "corpus": dict(moments.corpus),
            "settings": dict(moments.settings),
            "moments": {str(layer): digest for layer, digest in moments.digests.items()},
            "layers": layers,
            "versions": code_versions(),
        }
        write_result(publication.staging / STATS_NAME, stats)
        publication.appear()
    return {
        "out": job.out,
        "model": base.name,
        "corpus": source.corpus.spec,
        "layers": layers,
        "timings_s": timed.timings_s,
    }
