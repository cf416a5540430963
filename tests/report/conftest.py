"""Log files of made-up runs, small enough to check by hand."""

import json

import pytest

from cppo_trl.output.run_files import FATES, append_profile, append_tokens, write_run
from cppo_trl.report.command import main

UPDATES, POSITIONS = 8, 4
CONFIG = {"steps_per_generation": 2, "gradient_accumulation_steps": 1, "num_iterations": 1, "logging_steps": 2}
CONFIG |= {"max_completion_length": 9}
CPPO = {"trust_region": "cppo", "cppo_delta": 0.1, "cppo_delta_b": 0.02, "cppo_w_min": 0.8}
DPPO = {"trust_region": "dppo", "cppo_delta": 0.1, "cppo_delta_b": None, "cppo_w_min": 0.8}


def make_run(directory, seed=0, rule=CPPO, **extra):
    """A run of `UPDATES` updates, two per rollout; its numbers grow with update and seed."""
    budget = rule["trust_region"] == "cppo"
    config = {**CONFIG, **rule, "cppo_divergence": "binary_tv", "seed": seed, "output_dir": str(directory), **extra}
    write_run(directory, f"task/seed-{seed}/warm_start", "sums", {"trust region": rule["trust_region"]}, config)
    history = []
    for step in range(1, UPDATES + 1):
        masked = [1.0, 2.0, 3.0, 4.0 * step]
        append_profile(
            directory,
            step,
            {
                "tokens": [20.0] * POSITIONS,
                "divergence": [0.2 * step] * POSITIONS,
                "active": [10.0] * POSITIONS,
                "masked_by_threshold": [float(step > 2)] * POSITIONS,
                "masked_by_budget": [x / 10 for x in masked] if budget else [0.0] * POSITIONS,
                "prefix_average": [0.4 * step * p for p in range(POSITIONS)] if budget else [0.0] * POSITIONS,
            },
        )
        if step % 2 == 0:
            row = {"step": step, "reward": step / 10 + seed, "completions/mean_length": 40.0, "cppo/masked": 0.1}
            row |= {"entropy": None if step == 2 else 0.5, "cppo/masked_by_threshold": 0.1}
            row |= {"cppo/masked_by_budget": 0.0}
            if budget:
                row |= {"cppo/delta_b": 0.03, "cppo/theorem/prefixes": 0.75, "cppo/theorem/responses": 0.5}
                row |= {"cppo/theorem/bound_ratio": 0.3 + step / 80, "cppo/theorem/deduction": 1.0 + step / 4}
                row |= {"cppo/theorem/range": 2.0}
            history.append(row)
    history.append({"step": 4, "eval_avg@16": 0.25, "eval_aime24/avg@16": 0.5, "eval_avg@16_stderr": 0.01})
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    append_tokens(directory, 4, [token_record(budget), {**token_record(budget), "response": 1}])
    return directory


def token_record(budget):
    record = {"response": 0, "prompt": "1+1=", "text": ["2", "\n", "</script>", "∑"], "length": 9, "advantage": 0.5}
    names = ("toward", "threshold", "budget" if budget else "within", "within")
    record |= {"fate": [FATES.index(name) for name in names], "divergence": [0.05, 0.3, 0.0123456, 0.0]}
    record |= {"ratio": [0.9, 2.0, 1.1, 1.0], "weight": [1.0, 0.0, 0.0 if budget else 1.0, 1.0]}
    if budget:
        record |= {"position_weight": [1.0, 0.9, 0.85, 0.8], "threshold": [0.1, 0.07, -0.18, -0.17]}
        record |= {"spent": [0.05, 0.32, 0.3305, 0.3305], "weight_sum": [1.0, 1.9, 2.75, 3.55], "delta_b": 0.03}
    return record


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The report of two seeds of CPPO and one run of DPPO, written by the command."""
    directory = tmp_path_factory.mktemp("runs")
    runs = [make_run(directory / "cppo-0"), make_run(directory / "cppo-1", 1), make_run(directory / "dppo", 0, DPPO)]
    path = directory / "report.html"
    main([*map(str, runs), "--output", str(path)])
    return path
