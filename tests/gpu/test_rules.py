"""Rules, estimators and records: a batch on the device against each response on its own on the CPU."""

import warnings

import pytest
import torch

from cppo_trl.divergence import ESTIMATORS
from cppo_trl.metrics import add_records, loss_record, position_profile, summarize, total_over_processes
from cppo_trl.rules import RULES
from tests.conftest import parameters_of, random_rows
from tests.gpu.conftest import DEVICE

ROWS, WIDTH = 48, 700
MAY_DIFFER = 1e-3  # of the tokens: those that sit on a limit up to the rounding of a prefix sum


def judge(rule, inputs):
    parameters = parameters_of(rule)
    if "delta_b_quantile" in parameters:
        parameters["delta_b_quantile"] = 0.9
    return RULES[rule].judge(*inputs, **parameters)


@pytest.mark.parametrize("rule", RULES)
def test_verdicts_and_records_are_those_of_the_cpu(rule):
    inputs = random_rows(ROWS, WIDTH, seed=0)
    mask = inputs[3]
    given = [x.to(DEVICE) for x in inputs]
    verdict = judge(rule, given)
    weight, record = verdict.weight.cpu(), loss_record(*given, verdict)
    expected, total = torch.zeros(ROWS, WIDTH), None
    for b in range(ROWS):
        own = mask[b]
        if own.any():
            row = [x[b, own][None] for x in inputs]
            alone = judge(rule, row)
            expected[b, own] = alone.weight[0]
            total = add_records(total, loss_record(*row, alone))
    differs = ((weight - expected).abs() > 1e-4) & mask
    assert differs.sum() <= MAY_DIFFER * mask.sum()
    if rule != "none":
        assert 0.02 < (expected < 1)[mask].float().mean() < 0.98
    found = total_over_processes(record, lambda x: x)
    reference = total_over_processes(total, lambda x: x)
    assert summarize(found, None) == pytest.approx(summarize(reference, None), rel=2e-3, abs=1e-6)
    for name, sums in position_profile(reference).items():
        assert position_profile(found)[name] == pytest.approx(sums, rel=2e-3, abs=1.5), name


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_those_of_fp64(name):
    """On log-probs of two whole distributions; the definitions are written out."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 50, generator=g, dtype=torch.double)
    mu = logits.log_softmax(-1)
    pi = (logits + 0.3 * torch.randn(64, 50, generator=g, dtype=torch.double)).log_softmax(-1)
    listed = 5 if name.startswith("topk") else 1
    top = mu.topk(listed)
    both = [x.gather(-1, top.indices) for x in (pi, mu)]
    p, q = (torch.cat([x.exp(), 1 - x.exp().sum(-1, keepdim=True)], -1) for x in both)
    expected = (p - q).abs().sum(-1) / 2 if name.endswith("tv") else (q * (q / p).log()).sum(-1)
    given = [x.float().to(DEVICE)[:, None] if listed > 1 else x.float().to(DEVICE) for x in both]
    found = ESTIMATORS[name](*given).cpu().double().flatten()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


def test_the_compiled_rule_is_the_eager_one():
    given = [x.to(DEVICE) for x in random_rows(ROWS, WIDTH, seed=1)]
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"  # no compiler is asked for on the CPU
    compiled = torch.compile(judge, backend=backend)
    for rule in ("cppo", "dppo"):
        found, expected = compiled(rule, given), judge(rule, given)
        differs = (found.weight - expected.weight).abs() > 1e-4
        assert differs.sum() <= MAY_DIFFER * given[3].sum()
        assert 0 < expected.weight[given[3]].mean() < 1


@pytest.mark.parametrize("rows", [1, ROWS])  # torch sums a single row by another kernel on CUDA
@pytest.mark.parametrize("strict", [False, True])
def test_determinism_mode_gives_the_same_bits(strict, rows):
    """Strict mode raises where torch has no deterministic kernel: shown as an expected failure."""
    given = [x[-rows:].to(DEVICE) for x in random_rows(ROWS, WIDTH, seed=2)]
    given[3][:] = True

    def once():
        verdict = judge("cppo", given)
        return verdict.weight, loss_record(*given, verdict)

    torch.use_deterministic_algorithms(True, warn_only=not strict)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first, second = once(), once()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        pytest.xfail(str(error).split(",")[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
