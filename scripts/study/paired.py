"""The paired study: what each trust region buys, per unit of drift.

    python scripts/study/paired.py --settings main --output docs/results/paired.jsonl

A unit is one checkpoint (weights and optimizer state) and one rollout from it. Every arm, a rule with its thresholds,
starts from there and makes the same updates on the same responses in the same order; then the true change of the
expected reward and the drift from the rollout policy are measured. A line for each unit; finished ones are kept.
docs/results.md says what is asked, and what came out. With a rule of your own, in a file in the working directory:

    python scripts/study/paired.py --rule my_rules.late --ladder delta=0.02,0.05,0.15 --output outputs/late.jsonl
"""

import argparse
import copy
import fcntl
import json
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one core per process
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))  # workers keep freed memory: 1.2x faster
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

import frontier
from cppo_trl.output.run_files import whole_lines
from cppo_trl.rules import RULES, Rule, find_rule
from cppo_trl.trust_region import Verdict, cppo_mask
from task import PROMPT, Task, hash_of, logps, sample, step, warm_start

RESPONSES = 8
"""To each prompt."""
ON_POLICY_RATE = 2e-4
"""Learning rate of the trainings that lead to the checkpoints: one update for each rollout."""


class Arm(NamedTuple):
    """A rule with its thresholds."""

    rule: Rule
    parameters: Mapping[str, Any]


def reversed_weights(
    divergence: Tensor, advantages: Tensor, log_ratio: Tensor, mask: Tensor, *, delta: float, w_min: float
) -> Tensor:
    """A control: the position weight alone, from ``w_min`` at the first token to 1 at the last."""
    order = -mask.cumsum(-1).double()
    return cppo_mask(divergence, advantages, log_ratio, mask, delta=delta, w_min=w_min, delta_b=math.inf, order=order)


def ladder(name: str, rule: Rule, steps: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Arm]:
    """The arms of one rule: its name with each step of the ladder."""
    return {f"{name} {label}": Arm(rule, {**common, **parameters}) for label, parameters in steps.items()}


def _deltas(*deltas: float, **ratios: float) -> dict[str, dict[str, float]]:
    return {f"{d:g}": {"delta": d, **{name: ratio * d for name, ratio in ratios.items()}} for d in deltas}


_DYNAMIC = {"delta_b_quantile": 0.9, "delta_b_max_multiple": 2.0}  # Eq. (22)
_RATIO = 0.02 / 0.15
"""δ_b over δ: the paper's."""
_THREE = (0.005, 0.02, 0.08)
_CPPO, _OFF = RULES["cppo"], {"delta_b": math.inf, **_DYNAMIC}
FEW = {
    **ladder("cppo", _CPPO, _deltas(*_THREE, delta_b=_RATIO), w_min=0.8, **_DYNAMIC),
    **ladder("dppo", RULES["dppo"], _deltas(*_THREE)),
    **ladder(
        "grpo", RULES["grpo"], {f"{e:g}": {"ratio_min": 1 - e, "ratio_max": 1 + 1.4 * e} for e in (0.02, 0.07, 0.2)}
    ),
    "none": Arm(RULES["none"], {}),
}
"""CPPO, DPPO, GRPO's clip with Clip-Higher's proportions, each on a ladder; no trust region."""
PARTS = {
    **FEW,
    **ladder("budget", _CPPO, _deltas(*_THREE, delta_b=_RATIO), w_min=1.0, **_DYNAMIC),
    **ladder("weight", _CPPO, _deltas(*_THREE), w_min=0.8, **_OFF),
}
"""Beside them, each part of CPPO alone."""
MAIN = {
    **PARTS,
    **ladder("amplified", _CPPO, _deltas(*_THREE), w_min=0.2, **_OFF),
    **ladder("shuffled", _CPPO, _deltas(*_THREE), w_min=0.8, shuffle_weights=True, **_OFF),
    **ladder("reversed", Rule(reversed_weights, "control"), _deltas(*_THREE), w_min=0.8),
    **ladder("reversed 0.2", Rule(reversed_weights, "control"), _deltas(*_THREE), w_min=0.2),
}
"""Beside them, the controls of the position weight."""
OTHERS = {
    **ladder("dppo", RULES["dppo"], _deltas(*_THREE)),
    **ladder("soft gate", RULES["cppo_soft"], _deltas(*_THREE, delta_b=_RATIO), w_min=0.8, **_DYNAMIC),
    **ladder("trm_max", RULES["trm_max"], _deltas(0.01, 0.05, 0.2)),
    **ladder("trm_avg", RULES["trm_avg"], _deltas(0.0003, 0.001, 0.004)),
    **ladder("minpro", RULES["minpro"], {f"{m:g}": {"ratio_min": 0.0, "ratio_max": m} for m in (1.03, 1.1, 1.28)}),
    **ladder("cispo", RULES["cispo"], {f"{m:g}": {"ratio_min": 0.0, "ratio_max": m} for m in (1.03, 1.1, 1.28)}),
    **ladder("drpo", RULES["drpo"], _deltas(0.02, 0.1, 0.5)),
    **ladder("ipo", RULES["ipo"], _deltas(*_THREE)),
    **ladder("vaco", RULES["vaco"], _deltas(0.002, 0.01, 0.05)),
}
"""The other rules and the soft gate, beside DPPO."""


@dataclass(frozen=True)
class Setting:
    """Where the arms are compared.

    Args:
        task: its task.
        arms: by name.
        prompts: of a rollout for 16 updates; for fewer there are fewer, so that an update is as large.
        updates: made on a rollout.
        age: on-policy updates between the policy that sampled and the one that is trained.
        learning_rate: of the updates.
        trajectories: on-policy trainings from warm starts of their own.
        maturities: checkpoints of each, in on-policy updates.
        rollouts: from each checkpoint.
    """

    task: Task = field(default_factory=Task)
    arms: Mapping[str, Arm] = field(default_factory=lambda: FEW)
    prompts: int = 32
    updates: int = 16
    age: int = 0
    learning_rate: float = 5e-5
    trajectories: int = 8
    maturities: tuple[int, ...] = (10, 20, 40, 60)
    rollouts: int = 1


class Rollout(NamedTuple):
    """What every arm of a unit is trained on."""

    ids: Tensor
    """``(B, PROMPT + T)``"""
    mu: Tensor
    """``(B, T, V)`` log μ"""
    advantages: Tensor
    """``(B, 1)`` reward minus the mean of the prompt's responses"""


class Measured(NamedTuple):
    """What an arm did."""

    gain: float
    """J(π) - J of the policy before the updates"""
    kl: float
    """KL(μ‖π) of whole responses in nats: Σ_t of the exact KL, over fresh responses of μ"""
    tv: float
    """total variation between whole responses, over the same"""
    drift: float
    """Σ_t of the exact total variation of each token, over the same"""
    surrogate: float
    """L' of Eq. (1) with group-relative advantages, on the rollout itself"""
    masked: float
    """share of the tokens with an advantage whose weight is 0, over the updates"""
    greedy: float
    """prompts answered right by greedy decoding"""


@torch.no_grad()
def roll_out(task: Task, mu: Any, prompts: int, seed: int) -> Rollout:
    """Sample `RESPONSES` to each of so many prompts."""
    torch.manual_seed(seed)
    asked = task.prompts(prompts, random.Random(seed)).repeat_interleave(RESPONSES, 0)
    ids = sample(mu, asked, task.length)
    rewards = (ids[:, None, PROMPT:] == task.answers(asked)).all(-1).any(-1).float()
    advantages = rewards.view(-1, RESPONSES) - rewards.view(-1, RESPONSES).mean(1, keepdim=True)
    return Rollout(ids, logps(mu, ids), advantages.view(-1, 1))


def estimate(rule: Rule, levels: Tensor, mu: Tensor, log_ratio: Tensor, sampled: Tensor) -> Tensor:
    """D_t as the rule has it: the exact total variation, the exact KL(μ‖π), or Binary TV, each ``(B, T)``."""
    if rule.estimators and rule.estimators[0].endswith("kl"):
        return (mu.exp() * (mu - levels)).sum(-1).clamp(min=0.0)
    if rule.estimators == ("binary_tv",):
        return (sampled.exp() * (1 - (-log_ratio).exp())).abs()
    return 0.5 * (levels.exp() - mu.exp()).abs().sum(-1)


def train(policy: Any, optimizer: Any, rollout: Rollout, arm: Arm, order: Tensor, updates: int) -> float:
    """One pass over the rollout in so many updates; returns the share of masked tokens."""
    masked = active = 0.0
    for rows in order.chunk(updates):
        ids, advantages = rollout.ids[rows], rollout.advantages[rows]
        levels, mu, tokens = logps(policy, ids), rollout.mu[rows], ids[:, PROMPT:, None]
        sampled = levels.gather(-1, tokens).squeeze(-1)
        log_ratio = sampled - mu.gather(-1, tokens).squeeze(-1)
        detached = log_ratio.detach()
        divergence = estimate(arm.rule, levels.detach(), mu, detached, sampled.detach())
        verdict: Verdict = arm.rule.judge(
            divergence, advantages, detached, torch.ones_like(detached), response_ids=rows, **arm.parameters
        )
        step(policy, optimizer, -(log_ratio.exp() * advantages * verdict.weight).mean())
        with_advantage = (advantages != 0).expand_as(detached)
        masked += float((with_advantage & (verdict.weight == 0)).sum())
        active += float(with_advantage.sum())
    return masked / max(active, 1.0)


@torch.no_grad()
def measure(task: Task, policy: Any, before: float, rollout: Rollout, fresh: Rollout, masked: float) -> Measured:
    """Hold a trained policy against the one that sampled."""
    objective, greedy = task.objective(policy)

    def log_ratio(of: Rollout, levels: Tensor) -> Tensor:
        return (levels - of.mu).gather(-1, of.ids[:, PROMPT:, None]).squeeze(-1)

    levels = logps(policy, fresh.ids)
    kl = (fresh.mu.exp() * (fresh.mu - levels)).sum((1, 2)).mean()
    tv = 0.5 * (log_ratio(fresh, levels).sum(1).exp() - 1).abs().mean()
    drift = 0.5 * (fresh.mu.exp() - levels.exp()).abs().sum((1, 2)).mean()
    surrogate = ((log_ratio(rollout, logps(policy, rollout.ids)).exp() - 1) * rollout.advantages).sum(1).mean()
    return Measured(objective - before, float(kl), float(tv), float(drift), float(surrogate), masked, greedy)


class Checkpoint(NamedTuple):
    """Of an on-policy training."""

    policy: Any
    optimizer: Any
    mu: Any
    """the policy that samples: the same, or that of ``Setting.age`` updates ago"""


def unit(setting: Setting, checkpoint: Checkpoint, seed: int) -> dict[str, Measured]:
    """Every arm from one checkpoint, on one rollout."""
    policy, optimizer, mu = checkpoint
    rollout = roll_out(setting.task, mu, setting.prompts * setting.updates // 16, seed)
    fresh = roll_out(setting.task, mu, setting.prompts, seed + 1)
    order = torch.randperm(len(rollout.ids), generator=torch.Generator().manual_seed(seed))
    before, _ = setting.task.objective(policy)
    results = {}
    for name, arm in setting.arms.items():
        moved = copy.deepcopy(policy)
        own = torch.optim.AdamW(moved.parameters(), lr=setting.learning_rate, weight_decay=0.0)
        own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        own.param_groups[0]["lr"] = setting.learning_rate
        masked = train(moved, own, rollout, arm, order, setting.updates)
        results[name] = measure(setting.task, moved, before, rollout, fresh, masked)
    return results


Key = tuple[str, int, int, int]
"""Setting, trajectory, maturity, rollout."""


def checkpoints(setting: Setting, number: int, models: Path) -> Iterator[tuple[int, Checkpoint]]:
    """Train one policy on-policy, one update for each rollout; kept in ``models`` for all settings of the task."""
    last = max(setting.maturities)
    file = models / f"{hash_of((setting.task, setting.prompts, setting.maturities, number))}-trajectory.pt"
    policy = warm_start(setting.task, number, models)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=ON_POLICY_RATE, weight_decay=0.0)
    if file.exists():
        policies, optimizers = torch.load(file)
    else:
        policies, optimizers = [], {}
        for at in range(last + 1):
            policies.append(copy.deepcopy(policy.state_dict()))
            if at in setting.maturities:
                optimizers[at] = copy.deepcopy(optimizer.state_dict())
            if at < last:
                rollout = roll_out(setting.task, policy, setting.prompts, hash_of((setting.task, number, at)))
                train(policy, optimizer, rollout, Arm(RULES["none"], {}), torch.arange(len(rollout.ids)), 1)
        torch.save((policies, optimizers), file)
    for at in setting.maturities:
        mu = copy.deepcopy(policy)
        mu.load_state_dict(policies[at - setting.age])
        policy.load_state_dict(policies[at])
        optimizer.load_state_dict(optimizers[at])
        yield at, Checkpoint(policy, optimizer, mu)


def trajectory(name: str, setting: Setting, number: int, done: set[Key], models: Path) -> Iterator[dict[str, Any]]:
    """The units of one on-policy training that are not done."""
    keys = [(name, number, at, rollout) for at in setting.maturities for rollout in range(setting.rollouts)]
    missing = [key for key in keys if key not in done]
    for at, checkpoint in checkpoints(setting, number, models) if missing else ():
        for key in (key for key in missing if key[2] == at):
            arms = unit(setting, checkpoint, hash_of(key))
            yield dict(zip(("setting", "trajectory", "maturity", "rollout"), key, strict=True)) | {
                "before": [float(f"{x:.5g}") for x in setting.task.objective(checkpoint.policy)],
                "arms": {arm: [float(f"{x:.5g}") for x in measured] for arm, measured in arms.items()},
            }


TASKS = {
    "long": Task(19, (("", 0.035),), (500, 200)),
    "longest": Task(62, (("", 0.006),), (600, 300)),
    "first token": Task(6, (("b", 0.05), ("d", 0.15), ("o", 0.35)), (600, 0)),
}
SETTINGS = {
    "main": Setting(arms=MAIN, trajectories=12, rollouts=2),
    "first token decides": Setting(TASKS["first token"], arms=PARTS),
    "twice the rate": Setting(arms=PARTS, learning_rate=1e-4),
    "four times the rate": Setting(arms=PARTS, learning_rate=2e-4),
    "4 updates": Setting(updates=4),
    "2 updates old": Setting(age=2),
    "8 updates old": Setting(age=8),
    "other rules": Setting(arms=OTHERS),
    "T = 152": Setting(TASKS["long"], arms=PARTS, trajectories=6, maturities=(10, 20)),
    "T = 496": Setting(TASKS["longest"], prompts=8, trajectories=6, maturities=(10,)),
}
"""One factor at a time around the main setting."""


def _work(name: str, setting: Setting, number: int, output: Path, models: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    done = {key_of(row) for row in whole_lines(output)}
    for row in trajectory(name, setting, number, done, models):
        with output.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(json.dumps(row) + "\n")


def key_of(row: Mapping[str, Any]) -> Key:
    """What tells a unit from all others."""
    return row["setting"], row["trajectory"], row["maturity"], row["rollout"]


def run(settings: Mapping[str, Setting], output: Path, processes: int, first: int, models: Path) -> None:
    """Make the units that are missing, a trajectory on each core."""
    output.parent.mkdir(parents=True, exist_ok=True)
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool, tqdm(unit="trajectory") as bar:
        futures = [
            pool.submit(_work, name, setting, first + number, output, models)
            for name, setting in settings.items()
            for number in range(setting.trajectories)
        ]
        bar.reset(total=len(futures))
        for future in as_completed(futures):
            future.result()
            bar.update()


def own_rule(path: str, given: Sequence[str]) -> Setting:
    """A quick setting with a rule of the user's own on its ladder, beside CPPO and DPPO.

    Args:
        path: as the field ``trust_region``.
        given: ``name=value`` or ``name=value,value,...``; all lists of one length.
    """
    values = {name: [float(v) for v in text.split(",")] for name, _, text in (item.partition("=") for item in given)}
    length = max(map(len, values.values()), default=1)
    steps = [{name: column[at % len(column)] for name, column in values.items()} for at in range(length)]
    rule = find_rule(path, {} if path in RULES else steps[0])
    own = ladder(path, rule, {",".join(f"{v:g}" for v in s.values()): s for s in steps})
    others = {name: arm for name, arm in FEW.items() if not name.startswith("grpo")}
    return Setting(arms={**own, **others}, trajectories=6, maturities=(10, 20))


def main() -> None:
    """Make the units, then tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="*", default=[], choices=SETTINGS, metavar="NAME", help=", ".join(SETTINGS)
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one for each unit")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    parser.add_argument("--rule", help="dotted path of a rule of your own, or a name of trust_region")
    parser.add_argument("--ladder", nargs="*", default=[], metavar="NAME=VALUES", help="its parameters")
    parser.add_argument("--trajectories", type=int, help="fewer or more than the setting has")
    parser.add_argument("--rollouts", type=int, help="fewer or more from each checkpoint")
    parser.add_argument("--first", type=int, default=0, help="number of the first trajectory")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="one core each")
    options = parser.parse_args()
    settings = {name: SETTINGS[name] for name in options.settings}
    if options.rule:
        settings = {options.rule: own_rule(options.rule, options.ladder)}
    for name in ("trajectories", "rollouts"):
        if (value := getattr(options, name)) is not None:
            settings = {key: replace(setting, **{name: value}) for key, setting in settings.items()}
    run(settings, options.output, options.processes, options.first, Path("outputs/study"))
    rows = [row for row in whole_lines(options.output) if row["setting"] in settings]
    print(frontier.tables(rows, options.rule))
    if not options.rule:
        print(frontier.summary(rows))
    if options.figure:
        frontier.draw(rows, options.figure)


if __name__ == "__main__":
    main()
