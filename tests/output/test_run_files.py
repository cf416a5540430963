import json
import subprocess
import sys
from datetime import datetime, timedelta
from importlib.metadata import version

import pytest

from cppo_trl.output.run_files import RUN, exclusive, write_run

HOLD = "import sys, pathlib; from cppo_trl.output.run_files import exclusive\n"
HOLD += "with exclusive(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_directory_belongs_to_one_process_until_that_dies(holder, tmp_path):
    in_use = rf"output_dir='{tmp_path}' is in use by process {holder.pid} on"
    with pytest.raises(ValueError, match=in_use), exclusive(tmp_path):
        pass
    with exclusive(tmp_path, main_process=False):  # another rank of a run leaves the lock to the main process
        pass
    holder.kill()
    holder.wait()
    with exclusive(tmp_path), exclusive(tmp_path):  # nested within one process
        pass
    with exclusive(tmp_path):
        pass


def test_a_trainer_keeps_to_a_directory_of_its_own(holder, make_trainer, tmp_path):
    with pytest.raises(ValueError, match="is in use by process"):
        make_trainer().train()
    holder.kill()
    holder.wait()
    trainer = make_trainer(max_steps=1)
    with exclusive(tmp_path):  # as scripts/train.py does around it
        trainer.train()
    trainer.train()


def test_a_run_records_its_command_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "x.yaml", "--hub_token", "hf_secret"])
    write_run(tmp_path / "new", "model", "sums", {"rollout": "..."}, {"seed": 0})
    run = json.loads((tmp_path / "new" / RUN).read_text())
    assert run["command"].endswith("train.py --config x.yaml --hub_token ***")
    assert run["versions"]["trl"] == version("trl")
    assert (run["model"], run["dataset"], run["config"]) == ("model", "sums", {"seed": 0})
    assert abs(datetime.strptime(run["date"][:16], "%Y-%m-%d %H:%M") - datetime.now()) < timedelta(minutes=2)
