"""The queue's lock: one at a time, nobody forgotten, and no thread put to sleep that could have run."""

import faulthandler
import gc
import signal
import sys
import threading
import time
from contextlib import suppress

import pytest

from kvcache.parking import ParkingLock

PATIENCE = 60


@pytest.fixture(autouse=True)
def watchdog(capfd):
    with capfd.disabled():
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(interval)
        faulthandler.cancel_dump_traceback_later()


def in_threads(number, work):
    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def assert_idle(lock):
    assert not lock.locked() and not lock._parked and not lock._waking
    assert lock.take(False)
    lock.release()


def test_one_at_a_time():
    lock, inside, total = ParkingLock(), [], [0]

    def work():
        for _ in range(300):
            with lock:
                inside.append(1)
                seen = total[0]
                for _ in range(10):  # time enough to be interrupted in
                    pass
                total[0] = seen + 1
                assert len(inside) == 1
                inside.pop()

    in_threads(16, work)
    assert total == [16 * 300]
    assert_idle(lock)


def test_taking_it_does_not_wait():
    lock = ParkingLock()
    assert lock.take(False) and not lock.take(False)
    lock.release()
    assert_idle(lock)


def test_all_who_have_parked_get_it():
    lock, got = ParkingLock(), []
    lock.acquire()

    def work():
        with lock:
            got.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    while len(lock._parked) < 20:
        time.sleep(0.001)
    assert got == []
    lock.release()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(set(got)) == 20
    assert_idle(lock)


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="who is woken may run at once without the GIL"
)
def test_who_runs_may_take_it_before_the_one_that_was_woken():
    lock, got = ParkingLock(), []
    lock.acquire()
    sleeper = threading.Thread(target=lambda: (lock.acquire(), got.append("sleeper"), lock.release()))
    sleeper.start()
    while not lock._parked:
        time.sleep(0.001)
    sys.setswitchinterval(10)
    lock.release()
    taken = lock.take(False)  # it has been woken, and cannot have run
    got.append("runner")
    sys.setswitchinterval(1e-5)
    lock.release()
    sleeper.join(PATIENCE)
    assert taken and got == ["runner", "sleeper"]
    assert_idle(lock)


def test_takers_that_do_not_wait_and_those_that_do_get_along():
    lock, total = ParkingLock(), [0]

    def work():
        for turn in range(1000):
            if turn % 2 and not lock.take(False):
                continue
            if not turn % 2:
                lock.acquire()
            total[0] += 1
            lock.release()

    in_threads(8, work)
    assert 8 * 500 <= total[0] <= 8 * 1000
    assert_idle(lock)


def test_a_finalizer_that_tries_it_in_the_middle_of_it_does_no_harm():
    lock = ParkingLock()

    class Tries:
        def __init__(self):
            self.myself = self

        def __del__(self):
            if lock.take(False):
                lock.release()

    def work():
        for _ in range(500):
            Tries()
            with lock:
                pass

    thresholds = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    try:
        in_threads(8, work)
    finally:
        gc.set_threshold(*thresholds)
    assert_idle(lock)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
def test_a_thread_that_is_interrupted_while_it_has_parked_leaves_and_wakes_the_next():
    lock, got = ParkingLock(), []

    class Alarm(Exception):
        pass

    def interrupt(_number, _frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, interrupt)
    lock.acquire()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Alarm):
            lock.acquire()
        assert not lock._parked
        other = threading.Thread(target=lambda: (lock.acquire(), got.append(1), lock.release()))
        other.start()
        while not lock._parked:
            time.sleep(0.001)
        lock.release()
        other.join(PATIENCE)
    finally:
        signal.signal(signal.SIGALRM, before)
        with suppress(RuntimeError):
            lock.release()
    assert got == [1]
    assert_idle(lock)


def test_nobody_starves_beside_threads_that_want_nothing_else():
    """The one that has it gives the interpreter up, so that who is woken always finds it taken."""
    lock, stop, counts = ParkingLock(), time.monotonic() + 3.0, [0] * 5

    def want(number):
        while time.monotonic() < stop:
            with lock:
                time.sleep(1e-5)
                counts[number] += 1

    threads = [threading.Thread(target=want, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert min(counts) >= 3, counts
    assert not lock.locked() and not lock._heirs and not lock._parked
