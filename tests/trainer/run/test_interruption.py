"""A signal stops at once where nothing is lost, and waits for the end of an update."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from opd_env.trainer.run.interruption import Interruption


def send(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def stopped_by(error, work):
    """Runs ``work(interruption, done)``, which must end in ``error``; returns what it had done by then."""
    done = []
    with Interruption() as interruption, pytest.raises(error):
        work(interruption, done)
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_an_update_it_stops_at_once(number):
    def work(interruption, done):
        send(number)
        done.append("never")

    assert stopped_by(KeyboardInterrupt, work) == []


def test_within_an_update_it_stops_at_its_end():
    def work(interruption, done):
        with interruption.postponed():
            send()
            done.append("update finished")
        done.append("never")

    assert stopped_by(KeyboardInterrupt, work) == ["update finished"]


def test_the_second_signal_stops_at_once_even_within_an_update():
    def work(interruption, done):
        with interruption.postponed():
            send()
            done.append("first")
            send()
            done.append("never")

    assert stopped_by(KeyboardInterrupt, work) == ["first"]


@pytest.mark.parametrize("ours", [True, False])
def test_processes_that_agree_stop_together_at_the_end_of_a_block(ours):
    """Whoever gets the signal, and wherever: all go on to the end of the block, ask each other there, and stop."""
    done, asked = [], []

    def agree(requested):
        asked.append(requested)
        return len(asked) == 2

    def work(interruption):
        for step in range(9):
            if step == 1 and ours:
                send()
            done.append("rollout")
            with interruption.postponed():
                done.append("update")

    with Interruption(agree) as interruption, pytest.raises(KeyboardInterrupt):
        work(interruption)
    assert asked == [False, ours]
    assert done == ["rollout", "update"] * 2


def test_an_error_within_an_update_is_not_hidden_by_a_signal():
    def work(interruption, done):
        with interruption.postponed():
            send()
            raise ZeroDivisionError

    assert stopped_by(ZeroDivisionError, work) == []


def test_the_handlers_of_before_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_another_thread_may_use_it_without_signals():
    reached = []

    def work():
        with Interruption() as interruption, interruption.postponed():
            reached.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reached == [True]


def test_it_needs_no_torch():
    code = "import sys, opd_env.trainer.run.interruption; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
