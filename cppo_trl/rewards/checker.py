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
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CHUNK_ITEMS = 64
CHUNK_CHARS = 1 << 16
START_LIMIT_S = 120.0  # a cold file system may need this long to import sympy
START_ATTEMPTS = 20  # only for workers killed while they start; one that gives up is not tried again
SEND_LIMIT_S = 10.0
MAX_DEATHS = 3  # a comparison that loses its worker is tried again, as the worker may have been killed from outside
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from cppo_trl.rewards.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class Outcome(NamedTuple):
    """What one comparison gave.

    Attributes:
        why: ``"equal"``, ``"different"``, ``"no_answer"``, ``"unparseable_answer"``, ``"unparseable_gold"``,
            ``"timeout"``, ``"gold_timeout"`` (the gold alone took too long), ``"crash"`` (the worker died of it:
            memory, stack) or ``"error:<exception>"``.
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

    def settle(self, result: Outcome | Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled: nobody waits for it any more
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class _WorkerDiedError(Exception):
    pass


class _Worker:
    """One child process and the socket to it."""

    def __init__(self, memory_bytes: int):
        self.started = False
        self.unread = b""
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), str(os.getpid()), str(memory_bytes)],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,  # a Ctrl-C in the terminal is the trainer's business
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy's order of terms, and so a verdict, may hang on it
            )

    def send(self, items: Sequence[_Item]) -> None:
        message = json.dumps([(item.gold, item.answer, item.seconds_left) for item in items])
        self.socket.settimeout(SEND_LIMIT_S)
        try:
            self.socket.sendall(message.encode("ascii") + b"\n")
        except OSError as error:
            raise _WorkerDiedError from error

    def receive(self, deadline: float) -> Any:
        """Return the next message; raises TimeoutError at the deadline, _WorkerDiedError at the worker's end."""
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

    def end(self) -> None:
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
            raise ValueError(f"memory_mb must be at least 512, which sympy needs to start, got {memory_mb}")
        self.workers = workers
        self._memory_bytes = memory_mb << 20
        self._reset()
        _checkers.add(self)

    def _reset(self) -> None:
        self._waiting: deque[_Item] = deque()
        self._wake = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._children: set[_Worker] = set()
        self._stop = threading.Event()

    def forget(self) -> None:
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
            pairs: Gold and answer, as from ``extract_gold`` and ``extract_answer``. Equal pairs are compared once.
            time_limit: Seconds one comparison may take.
            progress: Called with the number of pairs answered since the last call.

        Raises:
            RuntimeError: If no worker can be started.
        """
        counts = Counter(pairs)
        items = {pair: _Item(*pair, seconds_left=time_limit) for pair in counts}
        if items:
            with self._wake:
                self._start_threads()
                self._waiting.extend(items.values())
                self._wake.notify_all()
        try:
            for pair, item in items.items():
                item.future.result()
                if progress:
                    progress(counts[pair])
        except BaseException:  # Ctrl-C, or a worker that cannot start: nobody waits for the rest
            for item in items.values():
                item.future.cancel()
            raise
        return [items[pair].future.result() for pair in pairs]

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
        workers: deque[_Worker] = deque()  # the one in use and perhaps its successor
        while chunk := self._take(stop):
            left = deque(chunk)
            try:
                self._await_start(workers, stop)
                workers[0].send(chunk)
                while left:
                    self._await_outcome(workers, left)
                continue
            except (TimeoutError, _WorkerDiedError):
                self._end(workers.popleft())
                if stop.is_set():
                    for item in left:
                        item.future.cancel()
                    break
                with self._wake:
                    self._waiting.extendleft(reversed(left))
                    self._wake.notify_all()
            except Exception as error:  # no worker can be had: say so to everybody who waits
                with self._wake:
                    left.extend(self._waiting)
                    self._waiting.clear()
                for item in left:
                    item.settle(error)
        for worker in workers:
            self._end(worker)

    def _await_outcome(self, workers: deque[_Worker], left: deque[_Item]) -> None:
        """Settle the first item left, unless its worker dies and it may try again."""
        item = left[0]
        began = time.monotonic()
        deadline = began + item.seconds_left
        gold_read = False
        try:
            while True:
                try:
                    message = workers[0].receive(began + item.seconds_left / 2)
                except TimeoutError:  # its start should not add to the time limit
                    if len(workers) == 1:
                        workers.append(self._launch())
                    message = workers[0].receive(deadline)
                if message != "gold_read":
                    break
                gold_read = True
            left.popleft().settle(Outcome(*message))
        except TimeoutError:
            left.popleft().settle(Outcome("timeout" if gold_read else "gold_timeout"))
            if not gold_read:  # nor would any other answer to it come to an end
                with self._wake:
                    for other in [*left, *self._waiting]:
                        if other.gold == item.gold:
                            other.settle(Outcome("gold_timeout"))
                    self._waiting = deque(other for other in self._waiting if not other.future.done())
                for _ in range(len(left)):
                    other = left.popleft()
                    if not other.future.done():
                        left.append(other)
            raise
        except _WorkerDiedError:
            item.deaths += 1
            item.seconds_left = deadline - time.monotonic()
            if item.deaths == MAX_DEATHS or item.seconds_left <= 0:
                left.popleft().settle(Outcome("crash"))
            raise

    def _launch(self) -> _Worker:
        worker = _Worker(self._memory_bytes)
        with self._wake:
            self._children.add(worker)
        return worker

    def _await_start(self, workers: deque[_Worker], stop: threading.Event) -> None:
        """Have a worker that is ready for its first chunk."""
        for _ in range(START_ATTEMPTS):
            if not workers:
                workers.append(self._launch())
            if workers[0].started:
                return
            try:
                workers[0].started = workers[0].receive(time.monotonic() + START_LIMIT_S) == "ready"
                return
            except (TimeoutError, _WorkerDiedError) as failure:
                if stop.is_set():
                    raise
                worker = workers.popleft()
                self._end(worker)
                if isinstance(failure, TimeoutError) or worker.process.returncode > 0:
                    break
        raise RuntimeError(
            "a reward worker does not start; what it said is on standard error. "
            f"Does `{sys.executable} -c 'import math_verify'` work?"
        )

    def _end(self, worker: _Worker) -> None:
        worker.end()
        with self._wake:
            self._children.discard(worker)


_checkers: "weakref.WeakSet[Checker]" = weakref.WeakSet()
_shared: Checker | None = None
_shared_lock = threading.Lock()


def shared_checker() -> Checker:
    """Return the one pool of this process, made on first use; ``CPPO_REWARD_WORKERS`` sets its size."""
    global _shared  # noqa: PLW0603
    with _shared_lock:
        if _shared is None:
            workers = os.environ.get("CPPO_REWARD_WORKERS")
            _shared = Checker(int(workers) if workers else None)
        return _shared


def _close_all() -> None:
    for checker in list(_checkers):
        checker.close()


def _forget_all() -> None:
    global _shared_lock  # noqa: PLW0603
    _shared_lock = threading.Lock()
    for checker in list(_checkers):
        checker.forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
