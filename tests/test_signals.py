# SPDX-License-Identifier: Apache-2.0
"""One handler of Ctrl-C and SIGTERM: a request, then an end; what was there before comes back."""

import os
import signal
import threading

import pytest

from modeling_vit_scratch.common import processes as signals
from modeling_vit_scratch.common.errors import TrainingInterrupted
from modeling_vit_scratch.common.processes import StopSignals


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_the_first_signal_is_a_request_and_the_second_ends(monkeypatch):
    clock, heard = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals(heard.append) as stop:
        send(signal.SIGTERM)
        assert (stop.poll(), stop.is_urgent, heard) == (signal.SIGTERM, False, ["SIGTERM"])
        clock[0] += 1.0
        send(signal.SIGINT)  # the same request, sent twice
        assert (stop.number, stop.is_urgent) == (signal.SIGTERM, False)
        clock[0] += 0.1
        with pytest.raises(TrainingInterrupted) as caught:
            send(signal.SIGINT)
        assert (caught.value.number, stop.is_urgent) == (signal.SIGINT, True)
    assert signal.getsignal(signal.SIGTERM) is before
    with stop:  # begins anew
        assert (stop.poll(), stop.is_urgent) == (0, False)


def test_a_request_can_end_at_once():
    with StopSignals(at_once=True), pytest.raises(TrainingInterrupted) as caught:
        send(signal.SIGTERM)
    assert caught.value.number == signal.SIGTERM


def test_a_worker_that_has_just_been_forked_is_not_asked(monkeypatch):
    with StopSignals() as stop:
        monkeypatch.setattr(signals.os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.undo()
        assert stop.number == 0


def test_the_end_of_the_launcher_is_noticed_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(signals, "launcher", os.getppid)
    heard = []
    with StopSignals(heard.append) as stop:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert (stop.number, heard) == (0, [])
        assert (stop.poll(), stop.poll(), heard) == (signal.SIGTERM, signal.SIGTERM, ["The launcher has ended"])


def test_another_thread_handles_no_signals():
    before, seen = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: seen.append(StopSignals().start()._handlers))
    thread.start()
    thread.join()
    assert seen == [{}]
    assert signal.getsignal(signal.SIGINT) is before
