"""A pool of worker processes that compares answers in bounded time and memory.

Each worker belongs to a thread of this process. The thread starts it, hands it chunks, waits for every answer with a
deadline, and kills and replaces it when the deadline passes. A comparison that is stuck costs only itself.
"""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import NamedTuple

CHUNK_ITEMS = 64
CHUNK_CHARS = 1 << 16
START_LIMIT_S = 120.0  # a cold file system may need this long to import sympy
START_ATTEMPTS = 5
MAX_DEATHS = 3  # a comparison that loses its worker is tried again, as the worker may have been killed from outside
_BOOT = (
    "import json,sys; sys.path[:]=json.loads(sys.argv[1]);"
    "from cppo_trl.rewards.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class Outcome(NamedTuple):
    """What one comparison gave.

    Attributes:
        why: ``"equal"``, ``"different"``, ``"unparseable_gold"``, ``"unparseable_answer"``, ``"timeout"``,
            ``"crash"`` (the worker died of it: memory, stack) or ``"error:<exception>"``.
        gold: The gold as parsed, shortened; None if it was not.
        answer: The answer as parsed, shortened; None if it was not.
    """

    why: str
    gold: str | None = None
    answer: str | None = None


@dataclass
class _Item:
    gold: str
    answer: str
    seconds_left: float
    deaths: int = 0
    future: "Future[Outcome]" = field(default_factory=Future)

    def settle(self, result: Outcome | BaseException) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled: nobody waits for it any more
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class _WorkerDiedError(Exception):
    pass


class _Worker:
    """One child process and the socket to it."""

    def __init__(self, memory_bytes: int):
        self.socket, theirs = socket.socketpair()
        self.unread = b""
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(os.getpid()), str(memory_bytes)],
                stdin=theirs,
                stdout=theirs,
                start_new_session=True,  # a Ctrl-C in the terminal is the trainer's business
            )

    def send(self, items: Sequence[_Item]) -> None:
        message = json.dumps([(item.gold, item.answer, item.seconds_left) for item in items])
        self.socket.settimeout(START_LIMIT_S)
        try:
            self.socket.sendall(message.encode("ascii") + b"\n")
        except OSError as error:
            raise _WorkerDiedError from error

    def receive(self, limit: float) -> list:
        """Return the next message, within ``limit`` seconds (TimeoutError) or while the worker lives (_WorkerDiedError)."""
        deadline = time.monotonic() + limit
        while b"\n" not in self.unread:
            self.socket.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise _WorkerDiedError from error
            if not data:
                raise _WorkerDiedError
            self.unread += data
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.close()


class Checker:
    """Compares answers in worker processes; safe to use from any thread, and from forked children.

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
            raise ValueError(f"memory_mb must be at least 512 (sympy needs about 300), got {memory_mb}")
        self.workers = workers
        self._memory_bytes = memory_mb << 20
        self._reset()
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def _reset(self) -> None:
        self._waiting: deque[_Item] = deque()
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._children: set[_Worker] = set()
        self._stop = threading.Event()

    def _forget(self) -> None:
        """In a forked child: the processes, threads and locks are the parent's; keep only the settings."""
        for child in self._children:
            child.socket.close()
            child.process.returncode = 0  # not ours to wait for
        self._reset()

    def check(
        self,
        pairs: Sequence[tuple[str, str]],
        time_limit: float = 5.0,
        progress: Callable[[int], object] | None = None,
    ) -> list[Outcome]:
        """Compare each (gold, answer); the outcomes come in the order of the pairs.

        Args:
            pairs: Gold and answer texts, as from :mod:`cppo_trl.rewards.answers`. Equal pairs are compared once.
            time_limit: Seconds one comparison may take.
            progress: Called with the number of pairs answered since the last call.

        Raises:
            RuntimeError: If no worker can be started.
        """
        counts: dict[tuple[str, str], int] = {}
        for pair in pairs:
            counts[pair] = counts.get(pair, 0) + 1
        items = {pair: _Item(*pair, seconds_left=time_limit) for pair in counts}
        with self._wake:
            self._start_threads()
            self._waiting.extend(items.values())
            self._wake.notify_all()
        try:
            outcomes = {}
            for pair, item in items.items():
                outcomes[pair] = item.future.result()
                if progress:
                    progress(counts[pair])
        except BaseException:  # Ctrl-C, or a worker that cannot start: nobody waits for the rest
            for item in items.values():
                item.future.cancel()
            raise
        return [outcomes[pair] for pair in pairs]

    def close(self) -> None:
        """End the workers; a later check starts them again."""
        with self._wake:
            threads, self._threads = self._threads, []
            self._stop.set()
            self._stop = threading.Event()
            for item in self._waiting:
                item.future.cancel()
            self._waiting.clear()
            for child in self._children:
                child.process.kill()
            self._wake.notify_all()
        for thread in threads:
            thread.join()

    def __enter__(self) -> "Checker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_threads(self) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._drive, args=(self._stop,), daemon=True) for _ in range(self.workers)
            ]
            for thread in self._threads:
                thread.start()

    def _take(self, stop: threading.Event) -> list[_Item]:
        """Wait for work and take a fair share of it; nothing when it is time to stop."""
        chunk: list[_Item] = []
        with self._wake:
            while not chunk and not stop.is_set():
                self._wake.wait_for(lambda: self._waiting or stop.is_set())
                room = CHUNK_CHARS
                for _ in range(min(CHUNK_ITEMS, -(-len(self._waiting) // self.workers))):
                    room -= len(self._waiting[0].gold) + len(self._waiting[0].answer)
                    if room < 0 and chunk:  # a long text travels alone
                        break
                    item = self._waiting.popleft()
                    if not item.future.cancelled():
                        chunk.append(item)
        return chunk

    def _drive(self, stop: threading.Event) -> None:
        """Own one worker for the life of this thread: Linux ends a child with the thread that started it."""
        worker = None
        while chunk := self._take(stop):
            left = deque(chunk)
            began = None
            try:
                worker = worker or self._start_worker(stop)
                worker.send(chunk)
                while left:
                    began = time.monotonic()
                    outcome = Outcome(*worker.receive(left[0].seconds_left))
                    left.popleft().settle(outcome)
            except TimeoutError:
                left.popleft().settle(Outcome("timeout"))
            except _WorkerDiedError:
                if began is not None:
                    left[0].deaths += 1
                    left[0].seconds_left -= time.monotonic() - began
                    if left[0].deaths == MAX_DEATHS or left[0].seconds_left <= 0:
                        left.popleft().settle(Outcome("crash"))
            except Exception as error:  # no worker can be had: say so to everybody who waits
                with self._wake:
                    left.extend(self._waiting)
                    self._waiting.clear()
                while left:
                    left.popleft().settle(error)
            else:
                continue
            self._end(worker)
            worker = None
            with self._wake:
                self._waiting.extendleft(reversed(left))
                self._wake.notify_all()
        self._end(worker)

    def _start_worker(self, stop: threading.Event) -> _Worker:
        for _ in range(START_ATTEMPTS):
            worker = _Worker(self._memory_bytes)
            with self._wake:
                self._children.add(worker)
            try:
                worker.receive(START_LIMIT_S)
                return worker
            except (TimeoutError, _WorkerDiedError):
                self._end(worker)
            if stop.is_set():
                break
        raise RuntimeError(
            "a reward worker does not start; what it said is on standard error. "
            f"Does `{sys.executable} -c 'import math_verify'` work?"
        )

    def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            with self._wake:
                self._children.discard(worker)
            worker.kill()


_shared: Checker | None = None
_shared_lock = threading.Lock()


def shared_checker() -> Checker:
    """Return the one pool of this process, made on first use (``CPPO_REWARD_WORKERS`` sets its size)."""
    global _shared  # noqa: PLW0603
    with _shared_lock:
        if _shared is None:
            workers = os.environ.get("CPPO_REWARD_WORKERS")
            _shared = Checker(int(workers) if workers else None)
        return _shared
