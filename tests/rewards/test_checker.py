"""The pool of workers: order, sharing, replacement, and nothing left behind however its process ends."""

import asyncio
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from cppo_trl.rewards import AccuracyReward, Checker, accuracy_reward, accuracy_reward_async
from cppo_trl.rewards import checker as checker_module

pytestmark = pytest.mark.timeout(180)

STUCK = ("1/2", "hang")  # to workers of the fixture `hanging`
ROOT = Path(__file__).parents[2]


def worker_pids(checker):
    return {child.process.pid for child in list(checker._children)}  # its threads change the set


def is_running(pid):
    """Tell whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_script(body, boot=checker_module._BOOT, **kwargs):
    """Run a script that says the pids of its workers on its first line; returns the process and the pids."""
    head = """
        import os, signal, sys, threading, time
        from cppo_trl.rewards import accuracy_reward, checker
        from cppo_trl.rewards.checker import shared_checker
        checker._BOOT = os.environ["BOOT"]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        def say_pids():
            print(*(child.process.pid for child in shared_checker()._children), flush=True)
        accuracy_reward([r"\\boxed{1/3}", r"\\boxed{1/4}"] * 50, ["1/2"] * 100)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CPPO_REWARD_WORKERS": "2", "BOOT": boot},
        **kwargs,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert pids, process.stderr.read()
    return process, pids


@pytest.fixture(scope="module")
def checker():
    with Checker(workers=2) as checker:
        yield checker


def test_outcomes_come_in_order_and_each_pair_is_compared_once(checker, monkeypatch):
    sent = []
    send = checker_module._Worker.send

    def counted_send(self, pairs, seconds):
        sent.extend(pairs)
        send(self, pairs, seconds)

    monkeypatch.setattr(checker_module._Worker, "send", counted_send)
    pairs = [(f"{i % 50}/7", f"{i % 20}/7") for i in range(1000)]
    outcomes = checker.check(pairs)
    assert [outcome.why == "equal" for outcome in outcomes] == [i % 50 == i % 20 for i in range(1000)]
    assert sorted(sent) == sorted(set(pairs))


def test_workers_are_reused(checker):
    checker.check([("1/2", "0.5")] * 10)
    before = worker_pids(checker)
    for i in range(20):
        assert checker.check([(f"{i}/3", f"{i}/3")])[0].why == "equal"
    assert worker_pids(checker) == before
    assert len(before) == 2


def test_threads_share_the_pool(checker):
    wrong = []

    def grade(seed):
        numbers = random.Random(seed).choices(range(1, 200), k=150)
        outcomes = checker.check([(f"{n}/7", f"\\frac{{{n + (n % 3 == 0)}}}{{7}}") for n in numbers])
        wrong.extend(n for n, o in zip(numbers, outcomes, strict=True) if (o.why == "equal") == (n % 3 == 0))

    threads = [threading.Thread(target=grade, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_workers_outlive_the_thread_that_first_needed_them():
    """Linux ends a child with the thread that started it, if the child asks to be ended with its parent."""
    with Checker(workers=2) as checker:
        thread = threading.Thread(target=checker.check, args=([("1/2", "0.5"), ("1/3", "0.5")] * 20,))
        thread.start()
        thread.join(60)
        before = worker_pids(checker)
        time.sleep(0.2)
        assert all(is_running(pid) for pid in before)
        assert checker.check([("1/2", "0.5")])[0].why == "equal"
        assert worker_pids(checker) == before


def test_asynchronous_form_leaves_the_loop_free(hanging):
    logged = {}

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticker = asyncio.create_task(tick())
        slow = type(accuracy_reward_async)(time_limit=1.0)
        rewards = await asyncio.gather(
            slow([r"\boxed{hang}"], ["1/2"]),
            *(
                accuracy_reward_async([rf"\boxed{{{i}/7}}"], ["3/7"], log_metric=logged.__setitem__)
                for i in range(1, 9)
            ),
        )
        ticker.cancel()
        return rewards, ticks

    rewards, ticks = asyncio.run(main())
    assert rewards == [[0.0]] + [[float(i == 3)] for i in range(1, 9)]
    assert ticks > 20
    assert logged["reward/timeout"] == 0.0


def test_forked_child_has_its_own_workers():
    checker_module._close_all()  # a worker that an earlier test has stuck may still be on its way out
    accuracy_reward([r"\boxed{1/3}"], ["1/2"])
    mine = worker_pids(checker_module.shared_checker())
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            rewards = accuracy_reward([r"\boxed{0.5}", r"\boxed{0.6}"], ["1/2"] * 2)
            own = worker_pids(checker_module.shared_checker())
            checker_module._close_all()
            os.write(write, pickle.dumps((rewards, own)))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        rewards, theirs = pickle.loads(pipe.read())
    os.waitpid(pid, 0)
    assert rewards == [1.0, 0.0]
    assert theirs
    assert not theirs & mine
    assert accuracy_reward([r"\boxed{0.25}"], ["1/4"]) == [1.0]
    assert worker_pids(checker_module.shared_checker()) >= mine
    wait_until(lambda: not any(is_running(pid) for pid in theirs))


def _grade_in_child(reward, queue):
    queue.put(reward([r"\boxed{0.5}", r"\boxed{0.6}"], ["1/2"] * 2))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_rewards_travel_to_processes_of_every_kind(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_grade_in_child, args=(AccuracyReward(time_limit=3.0), queue))
    process.start()
    assert queue.get(timeout=60) == [1.0, 0.0]
    process.join(30)
    assert process.exitcode == 0


def test_workers_killed_from_outside_are_replaced(checker):
    for pid in worker_pids(checker):
        os.kill(pid, signal.SIGKILL)
    outcomes = checker.check([(f"{i}/7", f"{i}/7") for i in range(1, 300)])
    assert {outcome.why for outcome in outcomes} == {"equal"}
    assert all(is_running(pid) for pid in worker_pids(checker))


def test_a_stopped_worker_is_replaced():
    with Checker(workers=1) as checker:
        checker.check([("1/2", "0.5")])
        (pid,) = worker_pids(checker)
        os.kill(pid, signal.SIGSTOP)
        outcomes = checker.check([("1/2", "0.5"), ("1/3", "1/3")], time_limit=1.0)
        assert outcomes[1].why == "equal"
        assert not is_running(pid)


def test_a_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Checker(workers=1) as checker, pytest.raises(RuntimeError, match="does not start"):
        checker.check([("1/2", "0.5")])
    monkeypatch.undo()
    assert checker.check([("1/2", "0.5")])[0].why == "equal"
    checker.close()


def test_closing_leaves_no_process_and_no_zombie():
    with Checker(workers=2) as checker:
        checker.check([("1/2", "0.5"), ("1/3", "0.5")] * 50)
        pids = worker_pids(checker)
    assert pids
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_closing_ends_a_check_that_is_under_way(hanging):
    checker = Checker(workers=1)
    ended = []

    def run():
        try:
            checker.check([STUCK, ("1/2", "0.5")], time_limit=60.0)
        except BaseException as error:
            ended.append(type(error).__name__)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: any(child.started for child in list(checker._children)))
    time.sleep(0.2)
    checker.close()
    thread.join(10)
    assert ended == ["CancelledError"]


def test_a_script_that_ends_leaves_nothing():
    process, pids = start_script("say_pids()")
    assert process.wait(20) == 0
    assert not any(is_running(pid) for pid in pids)
    assert process.stderr.read() == ""


def test_a_script_killed_while_its_workers_idle_leaves_nothing():
    process, pids = start_script("say_pids(); time.sleep(60)")
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids), 5)


@pytest.mark.parametrize("setup", ["", "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())"])
def test_a_script_killed_while_a_worker_is_stuck_leaves_nothing(setup, hanging):
    process, pids = start_script(
        f"""
        {setup}
        from cppo_trl.rewards import AccuracyReward
        threading.Timer(1.0, say_pids).start()
        AccuracyReward(time_limit=60.0)([r"\\boxed{{hang}}", r"\\boxed{{hang on}}"], ["1/2"] * 2)
        """,
        boot=hanging,
    )
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_running(pid) for pid in pids), 5)


def test_a_stuck_worker_ends_itself_where_nobody_else_does():
    """The alarm alone, as on a system that does not end a child with its parent."""
    code = """
        import os, signal, sys
        from cppo_trl.rewards import worker
        worker.GRACE_S = 0.5
        worker.PR_SET_PDEATHSIG = 0  # not an option of prctl: changes nothing
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        worker.compare = lambda gold, answer: 9**9**9
        worker.serve(os.getppid(), 2 << 30)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    process.stdin.write(b'[["1/2", "1/3", 0.5]]\n')
    process.stdin.flush()
    try:
        assert process.wait(30) == -signal.SIGALRM
    finally:
        process.kill()


@pytest.mark.parametrize("ignored", ["", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"])
def test_ctrl_c_stops_the_script_and_its_workers(ignored, hanging):
    """A terminal sends it to the whole process group."""
    process, pids = start_script(
        f"""
        {ignored}
        from cppo_trl.rewards import AccuracyReward
        threading.Timer(1.0, say_pids).start()
        AccuracyReward(time_limit=60.0)([r"\\boxed{{hang}}", r"\\boxed{{hang on}}"], ["1/2"] * 2)
        """,
        boot=hanging,
        start_new_session=True,
    )
    assert all(is_running(pid) for pid in pids)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) in (1, -signal.SIGINT)
    assert "KeyboardInterrupt" in process.stderr.read()
    assert not any(is_running(pid) for pid in pids)


def test_a_training_script_is_not_run_again_by_its_workers(tmp_path):
    """Nor is its directory in the way: it holds a module of a name that the workers need."""
    (tmp_path / "json.py").write_text("raise ImportError('this is not the one')")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nsys.path.remove(sys.path[0])\nfrom cppo_trl.rewards import accuracy_reward\n"
        "print(accuracy_reward([r'\\boxed{0.5}'], ['1/2']))\n"
    )
    result = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.stdout == "[1.0]\n"


def test_torch_is_imported_neither_here_nor_in_the_workers(checker):
    code = "import cppo_trl.rewards, cppo_trl.rewards.worker, sys; assert not {'torch', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    checker.check([("1/2", "0.5")])
    for pid in worker_pids(checker):
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_ranks_of_a_machine_divide_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    sizes = {}
    for ranks in ("1", "2", "3", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        sizes[ranks] = Checker().workers
    assert sizes == {"1": 8, "2": 4, "3": 2, "64": 1}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="workers must be at least 1"):
        Checker(workers=0)
    with pytest.raises(ValueError, match="memory_mb must be at least 512"):
        Checker(memory_mb=10)


def test_soak_with_workers_killed_at_random(monkeypatch):
    """Twenty thousand comparisons in batches; somewhere in each, somebody kills a worker."""
    fractions = [
        (top, scale) for top in range(1, 21) for scale in range(1, 11)
    ]  # twenty values, each written ten ways
    pairs = random.Random(0).sample([(gold, answer) for gold in fractions for answer in fractions], 20_000)
    killer = random.Random(1)
    kills = answered = strike_at = 0
    receive = checker_module._Worker.receive

    def count_and_strike(worker):
        nonlocal kills, answered
        messages = receive(worker)
        before, answered = answered, answered + len(messages)
        if before < strike_at <= answered and (pids := sorted(worker_pids(checker))):
            os.kill(killer.choice(pids), signal.SIGKILL)
            kills += 1
        return messages

    monkeypatch.setattr(checker_module._Worker, "receive", count_and_strike)
    with Checker(workers=2) as checker:
        for begin in range(0, len(pairs), 1000):
            batch = pairs[begin : begin + 1000]
            answered, strike_at = 0, killer.randint(1, 900)
            outcomes = checker.check(
                [(f"{a * k}/{7 * k}", f"\\frac{{{b * m}}}{{{7 * m}}}") for (a, k), (b, m) in batch]
            )
            expected = ["equal" if gold[0] == answer[0] else "different" for gold, answer in batch]
            assert [outcome.why for outcome in outcomes] == expected
    assert kills >= 10
