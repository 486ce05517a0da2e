"""The signal handler of a rank, without torch: real signals to real processes."""

from __future__ import annotations

import signal
import subprocess
import sys


def run(code: str) -> subprocess.Popen[str]:
    """Start a Python process that runs `code`."""
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


INSTALL_HANDLER = """
import os, threading, time
from jepa_cluster.training.preemption import PreemptionHandler

def watch():
    handler.raised.wait()
    time.sleep(max(0.0, handler.deadline() - time.monotonic()))
    if not handler.ending:
        print("deadline", handler.signal, flush=True)
        os._exit(75)

handler = PreemptionHandler().install()
handler.grace = 0.2
threading.Thread(target=watch, daemon=True).start()
print("ready", flush=True)
"""
WAIT_FOR_LOCK = """
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""
IGNORE_SIGNALS = """
handler.ignore_signals()
print("down", flush=True)
time.sleep(0.3)
"""


def test_a_signal_raises_the_flag_while_the_main_thread_is_in_c() -> None:
    """The main thread waits for a lock, as it does in a collective; the deadline is kept too."""
    process = run(INSTALL_HANDLER + WAIT_FOR_LOCK)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.readline() == "deadline SIGUSR2\n"
    assert process.wait(10) == 75


def test_a_signal_before_the_first_line_of_python_reaches_the_handler() -> None:
    """The launcher blocks the signal while Python starts."""
    blocked = {signal.SIGUSR2, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        process = run(INSTALL_HANDLER + "time.sleep(30)")
        process.send_signal(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "deadline SIGTERM\n"
    assert process.wait(10) == 75


def test_a_signal_during_shutdown_does_not_change_the_exit_code() -> None:
    process = run(INSTALL_HANDLER + IGNORE_SIGNALS)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "down\n"
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


def test_the_handler_and_the_worker_need_no_torch() -> None:
    """Importing everything up to `train` imports none of torch, timm and mlflow."""
    code = "import sys, jepa_cluster.launch.worker.main\n"
    code += "print({'torch', 'timm', 'mlflow'} & set(sys.modules))"
    output, _ = run(code).communicate()
    assert output == "set()\n"
