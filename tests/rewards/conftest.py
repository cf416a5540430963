"""Workers that can get stuck: nothing that the reader reads does so, thus they are told to at marked answers."""

import pytest

from cppo_trl.rewards import checker

HANGING = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from cppo_trl.rewards import worker\n"
    "plain = worker.compare\n"
    "def compare(gold, answer):\n"
    "    if 'hang' in gold or 'hang' in answer:\n"
    "        9**9**9\n"  # holds the interpreter in C code, where no signal handler of Python's runs
    "    if 'memory' in answer:\n"
    "        bytes(1 << 40)\n"
    "    return plain(gold, answer)\n"
    "worker.compare = compare\n"
    "worker.serve(int(sys.argv[2]), int(sys.argv[3]))\n"
)


@pytest.fixture
def hanging(monkeypatch):
    """Workers that hang at a gold or an answer with the word "hang"; returns their code."""
    checker._close_all()
    monkeypatch.setattr(checker, "_BOOT", HANGING)
    yield HANGING
    checker._close_all()
