"""Samples: how old they are, and their seeds."""

import json
import random

import pytest

from cppo_trl.asynchronous.samples import seeded
from tests.asynchronous.conftest import make_trainer


def test_metrics_by_staleness(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, cppo_delta=0.02, cppo_delta_b=0.002)
    trainer.train()
    rows = trainer.state.log_history[:-1]
    for step, row in enumerate(rows):
        stale = [name for name in row if name.startswith("cppo/staleness_")]
        assert len(stale) == 2  # every sample is of version 1, published before the first update
        assert row[f"cppo/staleness_{step}/divergence"] == pytest.approx(row["cppo/divergence/mean"])
        assert row[f"cppo/staleness_{step}/masked"] == pytest.approx(row["cppo/masked"])
    assert rows[0]["cppo/rollout_mismatch"] < 1e-6
    assert rows[0]["cppo/rollout_mismatch_nats"] < 1e-5
    assert "cppo/rollout_mismatch" not in rows[1]
    assert rows[3]["cppo/divergence/mean"] > 10 * rows[0]["cppo/divergence/mean"]
    assert rows[3]["cppo/masked"] > 0
    assert rows[0]["sample/kept_length"] > 3
    profile = [json.loads(line) for line in (tmp_path / "out" / "trust_region.jsonl").read_text().splitlines()]
    assert [row["step"] for row in profile] == list(range(1, len(rows) + 1))
    assert not [name for row in rows for name in row if name.startswith("clip_ratio")]
    assert (tmp_path / "out" / "run.json").exists()


def test_the_seeds_of_the_requests_are_those_of_the_run_and_of_its_place():
    def drawn(seed, place):
        return seeded(lambda dataset_start_index: random.getrandbits(63), seed, dataset_start_index=place)

    assert drawn(3, 0) == drawn(3, 0)
    assert len({drawn(3, 0), drawn(3, 5), drawn(4, 0), drawn(30, 0)}) == 4
