"""The process that compares answers: one JSON line in per chunk, one JSON line out per answer.

:mod:`cppo_trl.rewards.checker` starts it. It never imports torch, and may be killed at any moment. Three things end it
without its parent's help: the end of its socket, the death of the parent (Linux), and an alarm with the default
action, which works even while C code holds the interpreter.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

from cppo_trl.rewards.comparing import compare

PR_SET_PDEATHSIG = 1
GRACE_S = 2.0  # the parent's deadline comes first; the alarm is for when there is no parent left


def serve(parent_pid: int, memory_bytes: int) -> None:
    """Answer chunks of (gold, answer, seconds) from standard input until it ends."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a parent's blocked signals are inherited
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        return
    channel = os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_RDWR)
    for standard in (1, 2):  # nothing a library prints may reach the socket or the trainer's screen
        os.dup2(quiet, standard)

    def say(message: Any) -> None:
        channel.write(json.dumps(message).encode() + b"\n")
        channel.flush()

    say("ready")
    for line in sys.stdin.buffer:
        for gold, answer, seconds in json.loads(line):
            signal.setitimer(signal.ITIMER_REAL, seconds + GRACE_S)
            try:
                result = compare(gold, answer)
            except MemoryError:
                os._exit(1)  # a heap this full is not worth keeping: the parent starts another
            except Exception as error:
                result = ("error:" + type(error).__name__, None, None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            say(result)
