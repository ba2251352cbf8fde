"""SIGTERM and Ctrl-C, sent to this very process."""

import functools
import signal
import threading

import pytest

from bltjax.runtime.signals import STOPPED, Stopped, handling, interrupting, noticing

BOTH = (signal.SIGTERM, signal.SIGINT)
ignoring = functools.partial(handling, signal.SIG_IGN)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = handlers()
    yield
    found = handlers()
    for number, old in zip(BOTH, before, strict=True):
        signal.signal(number, old)
    assert found == before


@pytest.mark.parametrize("number", BOTH)
def test_the_first_signal_is_noticed(number):
    with noticing() as notice:
        assert notice.received is None
        signal.raise_signal(number)
        assert notice.received == number
    assert notice.received == number


@pytest.mark.parametrize("first", BOTH)
def test_ctrl_c_after_a_signal_interrupts_at_once(first):
    with pytest.raises(KeyboardInterrupt) as raised, noticing():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(raised.value, Stopped)  # which would say that something is saved


@pytest.mark.parametrize("first", BOTH)
def test_sigterm_after_a_signal_changes_nothing(first):
    """Platforms repeat it, while the run saves."""
    with noticing() as notice:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGTERM)
        assert notice.received is not None


@pytest.mark.parametrize("number", BOTH)
def test_interrupting_raises_wherever_the_block_is(number):
    with pytest.raises(Stopped, match=f"stopped by {number.name}: run the same command again"):  # noqa: SIM117
        with interrupting():
            signal.raise_signal(number)
            raise AssertionError("went on")


def test_a_stop_is_no_error_that_somebody_could_swallow():
    assert not issubclass(Stopped, Exception)
    assert STOPPED not in (0, 1, 2, 3)  # what other ends of a run say


def test_noticing_within_interrupting():
    with interrupting():
        with noticing() as notice:
            signal.raise_signal(signal.SIGTERM)
        assert notice.received == signal.SIGTERM
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_a_block_that_fails_gives_the_handlers_back():
    before = handlers()
    for block in (noticing, interrupting, ignoring):
        with pytest.raises(OSError, match="disk"), block():
            assert handlers() != before
            raise OSError("disk")
        assert handlers() == before


def test_signals_are_ignored_where_the_handler_says_so():
    with ignoring():
        for number in BOTH:
            signal.raise_signal(number)


def test_other_threads_take_no_signals():
    seen = []

    def work():
        for block in (noticing, interrupting, ignoring):
            with block() as notice:
                seen.append((handlers(), getattr(notice, "received", None)))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)] * 3
