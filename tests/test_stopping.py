"""Signals that end a training, and a terminal that is gone."""

import os
import signal
import sys

import pytest
import toy_training
from toy_training import config

from ddm_training.progress import Journal
from ddm_training.stopping import StopRequest

store = toy_training.store  # a fixture
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")


def test_a_hang_up_asks_a_training_to_end_however_often_it_is_told():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        stop = StopRequest(None)
        assert not stop
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_sigterm_does_not_wait_unless_it_tells_of_the_same_request(monkeypatch):
    now = 100.0
    monkeypatch.setattr("ddm_training.stopping.time.monotonic", lambda: now)
    stop = StopRequest(None)
    try:
        for _ in range(2):  # of the cluster, and of torchrun
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
            now += 0.5
        now += 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        stop.restore()


def test_under_nohup_a_hang_up_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopRequest(None)
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_words_that_no_terminal_takes_do_not_end_a_training(store, tmp_path, monkeypatch):
    class HungUp:
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def flush(self) -> None:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return False

    with Journal(config(store, tmp_path), start=0, unit="patches", samples_per_step=2) as journal:
        monkeypatch.setattr(sys, "stderr", HungUp())
        journal.say("step 1")
