"""The page: what it shows first, what it loads, and what it says of a run that logged little."""

import json
import re
import subprocess
import sys

from cppo_trl.report.command import main
from cppo_trl.report.runs import read_runs
from tests.report.conftest import DPPO, make_run


def test_the_report_loads_neither_torch_nor_the_trainer():
    program = "import sys, cppo_trl.report.page, cppo_trl.report.command; print({'torch', 'trl'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_the_page_is_self_contained(page):
    text = page.read_text()
    for remote in ('src="http', "src='http", 'href="http', "@import", "url(http"):
        assert remote not in text
    assert page.stat().st_size < 1.5e6
    assert text.count("</script>") == text.count("<script")  # a token's own was escaped
    assert [path.name for path in page.parent.glob("report*")] == ["report.html"]


def test_the_theorem_in_words_and_numbers(page):
    text = " ".join(re.sub("<[^>]+>", "", page.read_text()).split())
    assert "δ = 0.1, wmin = 0.8; δb, T and ξ are the largest budget in force" in text
    assert (
        "it is at most 3. J itself has a range of 2ξ, at most 2: the bound is vacuous in 2 of 4 logged" in text
    )  # 1.5, 2, 2.5, 3 against the range 2
    assert "is at most 0.4: the bound is tighter" in text
    assert "held at 75.00 % of the positions, and at all positions of 50.00 % of the responses" in text
    assert text.count("Theorem 1 as a gauge") == 2  # not for DPPO


def test_a_run_that_logged_little_still_gets_its_page(tmp_path, capsys):
    make_run(tmp_path / "a", 0, DPPO)
    for name in ("trainer_state.json", "run.json", "trust_region_tokens.jsonl"):
        (tmp_path / "a" / name).unlink()
    about = {"command": "python train.py --beta '<0>'", "versions": {"trl": "1.16.0", "torch": "2.10"}}
    (tmp_path / "a" / "run.json").write_text(json.dumps(about))
    main([str(tmp_path / "a")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a" / "report.html")]
    text = (tmp_path / "a" / "report.html").read_text()
    assert "<td>python train.py --beta &#39;&lt;0&gt;&#39;</td>" in text
    assert "<td>trl 1.16.0, torch 2.10</td>" in text
    assert re.findall("<h2>(.*?)</h2>", text) == ["The run", "By position"]  # no empty section, no selector


def test_the_outcome_comes_first(tmp_path):
    make_run(tmp_path / "a")
    accuracy = {"greedy": 0.5, "avg_at_16": 0.25, "avg_at_16_stderr": 0.01}
    (tmp_path / "a" / "results.json").write_text(
        json.dumps({"before": accuracy, "after": {**accuracy, "greedy": 0.875}})
    )
    (run,) = read_runs([tmp_path / "a"])
    assert (run.about["dataset"], run.about["model"]) == ("sums", "task/seed-0/warm_start")
    main([str(tmp_path / "a")])
    text = (tmp_path / "a" / "report.html").read_text()
    rows = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
    assert list(rows.items())[:4] == [
        ("held-out accuracy, greedy", "0.500 → 0.875"),
        ("held-out accuracy, avg at 16", "0.250 → 0.250"),
        ("training reward, first and last tenth", "0.200 → 0.800"),
        ("tokens masked", "10.00%"),
    ]
    assert (rows["dataset"], rows["begun"]) == ("sums", run.about["date"])
    assert run.about["date"][:4].isdigit()
