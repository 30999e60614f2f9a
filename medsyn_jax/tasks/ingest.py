"""Ingestion: a source becomes <workdir>/shards, with a summary in results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medsyn_jax.core.log import console
from medsyn_jax.core.outputs import write_config, write_results
from medsyn_jax.data.sources import ingestion
from medsyn_jax.data.store import build, shards

CHECKS = ()  # the source checks its settings when it is listed
FREE = ("ingest.workers", "ingest.max_reject_share", "ingest.path", "ingest.splits")


def run(config: Any, workdir: Path) -> None:
    """Ingest `config.ingest`, or complete an earlier run; UserError as of `ingestion.ingest`."""
    directory = ingestion.ingest(config.ingest, workdir / "shards")
    write_config(workdir, config)
    info = shards.describe(directory)
    counts = {split: part["records"] for split, part in info["splits"].items()}
    metrics = {f"records/{split}": {"value": n, "n": n} for split, n in counts.items()}
    left_out = sum(info["left_out"].values())
    total = sum(counts.values()) + info["rejects"] + left_out
    metrics["rejects"] = {"value": info["rejects"], "n": total}
    metrics["left_out"] = {"value": left_out, "n": total}
    write_results(workdir, "ingest", metrics)
    lines = [f"{split}: sha256 of its keys {p['sha256']}" for split, p in info["splits"].items()]
    if (directory / build.REJECTS).read_text().count("\n") > 1:
        lines.append(f"records not taken, and why: {directory / build.REJECTS}")
    for line in (*lines, f"fingerprint {info['fingerprint']}"):
        console.print(line, soft_wrap=True)
