"""A pool of worker processes that compares answers in bounded time and memory.

Every answer has a deadline; a worker past it is killed and replaced. A comparison that is stuck costs only itself.
"""

import atexit
import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

CHUNK_ITEMS = 64
START_LIMIT_S = 120.0
START_ATTEMPTS = 20  # for workers killed while they start; one that gives up is not tried again
SEND_LIMIT_S = 10.0
MAX_DEATHS = 3  # a comparison that loses its worker is tried again, as the worker may have been killed from outside
SHORTEST_LIMIT_S = 0.3  # a comparison takes milliseconds; see `_Batch.seconds`
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from cppo_trl.rewards import worker; worker.serve(int(sys.argv[2]), int(sys.argv[3]))"
)

Pair = tuple[str, str]


class Outcome(NamedTuple):
    """What one comparison gave.

    Attributes:
        why: ``"equal"``, ``"different"``, ``"no_answer"``, ``"unparseable_answer"``, ``"unparseable_gold"``,
            ``"timeout"``, ``"crash"`` (the worker died of it) or ``"error:<exception>"``.
        gold: The gold as read, shortened; None if it was not.
        answer: The answer as read, shortened; None if it was not.
    """

    why: str
    gold: str | None = None
    answer: str | None = None


class _Worker:
    """One child process, the socket to it, and the pairs it has not answered yet."""

    def __init__(self, memory_bytes: int):
        self.pairs: deque[Pair] = deque()
        self.started = False
        self.deadline = time.monotonic() + START_LIMIT_S
        self.unread = b""
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(SEND_LIMIT_S)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(os.getpid()), str(memory_bytes)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,  # a Ctrl-C in the terminal is the trainer's business
            )

    def send(self, pairs: Sequence[Pair], seconds: float) -> None:
        self.pairs.extend(pairs)
        self.deadline = time.monotonic() + seconds
        self.socket.sendall(json.dumps([(*pair, seconds) for pair in pairs]).encode("ascii") + b"\n")

    def receive(self) -> list[Any]:
        """Return the messages that have come; raises OSError at the worker's end."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise BrokenPipeError
        *lines, self.unread = (self.unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


class _Batch:
    """The state of one call: what waits, what is answered, and what is known to be stuck."""

    def __init__(self, pairs: Sequence[Pair], time_limit: float):
        self.waiting = deque(dict.fromkeys(pairs))
        self.count = len(self.waiting)
        self.outcomes: dict[Pair, Outcome] = {}
        self.deaths: Counter[Pair] = Counter()
        self.starts = 0
        self.timeouts = 0
        self.stuck: Counter[str] = Counter()  # time-outs by text
        self._time_limit = time_limit

    @property
    def seconds(self) -> float:
        """The time limit, a quarter of it after each answer that was stuck: a batch of them should not add up."""
        return max(self._time_limit / 4**self.timeouts, min(self._time_limit, SHORTEST_LIMIT_S))

    def time_out(self, pair: Pair) -> None:
        """Settle a pair that is stuck; a gold or an answer is given up at the second."""
        self.timeouts += 1
        self.stuck.update(pair)
        self.outcomes[pair] = Outcome("timeout")

    def take(self, share: int) -> list[Pair]:
        """Return the next pairs for a worker; settle those that are given up."""
        chunk: list[Pair] = []
        while self.waiting and len(chunk) < min(CHUNK_ITEMS, share):
            pair = self.waiting.popleft()
            if max(self.stuck[text] for text in pair) > 1:
                self.outcomes[pair] = Outcome("timeout")
            else:
                chunk.append(pair)
        return chunk


class Checker(AbstractContextManager):
    """Compares answers in worker processes; safe to use from any thread. A forked child needs one of its own.

    Args:
        workers: Number of processes. Default: the cores this process may use divided by ``LOCAL_WORLD_SIZE`` (the
            ranks of this machine, set by torchrun and accelerate), at least one.
        memory_mb: Address space a worker may use, in MiB.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, workers: int | None = None, memory_mb: int = 2048):
        if workers is None:
            workers = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}; leave it out for one per core")
        if memory_mb < 512:
            raise ValueError(f"memory_mb must be at least 512, got {memory_mb}")
        self.workers = workers
        self.owner = os.getpid()
        self._memory_bytes = memory_mb << 20
        self._children: list[_Worker] = []
        self._lock = threading.Lock()
        self._starter = ThreadPoolExecutor(1)  # Linux ends a worker with the thread that starts it
        self._closings = 0
        _checkers.add(self)

    def check(self, pairs: Sequence[Pair], time_limit: float = 5.0) -> list[Outcome]:
        """Compare each (gold, answer); the outcomes come in the order of the pairs.

        Args:
            pairs: Gold and answer, as from ``extract_gold`` and ``extract_answer``. Equal pairs are compared once.
            time_limit: Seconds one comparison may take; a quarter of that after each that took longer.

        Raises:
            RuntimeError: If no worker can be started.
            CancelledError: If the checker is closed meanwhile.
        """
        batch = _Batch(pairs, time_limit)
        with self._lock:
            closings = self._closings
            try:
                while len(batch.outcomes) < batch.count:
                    if self._closings != closings:
                        raise CancelledError
                    self._hand_out(batch)
                    self._collect(batch)
            except BaseException:  # Ctrl-C, or a worker that cannot start: nobody waits for the rest
                for child in [child for child in self._children if child.pairs or not child.started]:
                    self._end(child)
                raise
        return [batch.outcomes[pair] for pair in pairs]

    def close(self) -> None:
        """End the workers, also in the middle of a check; a later check starts them again."""
        self._closings += 1
        for child in list(self._children):
            child.process.kill()
        with self._lock:
            for child in list(self._children):
                self._end(child)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(self, batch: _Batch) -> None:
        """Give every idle worker a fair share of what waits; start the workers that are missing."""
        while len(self._children) < self.workers and batch.waiting:
            batch.starts += 1
            self._children.append(self._starter.submit(_Worker, self._memory_bytes).result())
        for child in list(self._children):
            if child.started and not child.pairs and (chunk := batch.take(-(-len(batch.waiting) // self.workers))):
                try:
                    child.send(chunk, batch.seconds)
                except OSError:
                    self._lose(child, batch)

    def _collect(self, batch: _Batch) -> None:
        """Wait for an answer or a deadline, and settle what it is about."""
        busy = [child for child in self._children if child.pairs or not child.started]
        if not busy:
            return
        wait = min(child.deadline for child in busy) - time.monotonic()
        ready = select.select([child.socket for child in busy], [], [], max(wait, 0))[0]
        for child in busy:
            try:
                if child.socket in ready:
                    for message in child.receive():
                        if child.started:
                            batch.outcomes[child.pairs.popleft()] = Outcome(*message)
                        child.started = True
                        child.deadline = time.monotonic() + batch.seconds
                elif child.deadline < time.monotonic():
                    if child.started:
                        batch.time_out(child.pairs.popleft())
                    self._lose(child, batch, overdue=True)
            except OSError:
                self._lose(child, batch)

    def _lose(self, child: _Worker, batch: _Batch, overdue: bool = False) -> None:
        """Do without a worker: what it had waits again, unless the comparison it was at has ended too many."""
        self._end(child)
        if not child.started and (overdue or child.process.returncode > 0 or batch.starts > START_ATTEMPTS):
            raise RuntimeError(
                f"a reward worker does not start; see standard error. Does `{sys.executable} -c 'import mpmath'` work?"
            )
        if child.pairs and not overdue:
            batch.deaths[child.pairs[0]] += 1
            if batch.deaths[child.pairs[0]] == MAX_DEATHS:
                batch.outcomes[child.pairs.popleft()] = Outcome("crash")
        batch.waiting.extendleft(reversed(child.pairs))

    def _end(self, child: _Worker) -> None:
        child.process.kill()
        child.process.wait()
        child.socket.close()
        self._children.remove(child)


_checkers: "weakref.WeakSet[Checker]" = weakref.WeakSet()
_shared: dict[int, Checker] = {}  # by process


def shared_checker() -> Checker:
    """Return the one pool of this process, made on first use; ``CPPO_REWARD_WORKERS`` sets its size."""
    if os.getpid() not in _shared:
        workers = os.environ.get("CPPO_REWARD_WORKERS")
        _shared.setdefault(os.getpid(), Checker(int(workers) if workers else None))  # of several threads, one makes it
    return _shared[os.getpid()]


@atexit.register
def _close_all() -> None:
    for checker in list(_checkers):
        if checker.owner == os.getpid():  # a forked child inherits its parent's
            checker.close()
