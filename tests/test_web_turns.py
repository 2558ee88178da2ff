"""Turns: fair, limited, given up."""

import threading
import time

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.turns import Line, in_turn


def test_next_comes_whoever_had_no_turn_for_longest():
    waiting = [("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5), ("c", 6)]

    def order(served):
        return [who + str(when) for who, when in in_turn(waiting, lambda one: one[0], lambda one: one[1], served)]

    assert order({}) == ["a1", "b4", "c6", "a2", "b5", "a3"]
    assert order({"a": 9.0}) == ["b4", "c6", "a1", "b5", "a2", "a3"]
    assert order({"a": 7.0, "b": 9.0, "c": 8.0}) == ["a1", "c6", "b4", "a2", "b5", "a3"]


def test_a_line_serves_all_in_turn_one_at_a_time():
    line, served, never = Line(9, 9), [], threading.Event()

    def wish(who):
        with line.wish(who):
            assert line.take(who, never, lambda: None)
            served.append(who)
            time.sleep(0.01)
            line.give_back(who)

    assert line.take_if_free() and not line.take_if_free()
    threads = []
    for who in "aaabbc":
        threads.append(threading.Thread(target=wish, args=(who,)))
        threads[-1].start()
        while len(line._waiting) < len(threads):
            time.sleep(0.001)
    assert line.others_wait("a") and not line.is_free
    line.give_back()
    for thread in threads:
        thread.join()
    assert "".join(served) == "abcaba" and line.is_free


def test_who_gives_up_waiting_is_in_nobodys_way():
    line, cancelled, told = Line(9, 9), threading.Event(), []
    line.take_if_free()
    assert not line.take("a", cancelled, lambda: (told.append("waits"), cancelled.set()))
    assert told == ["waits"] and not line.others_wait("b")
    line.give_back()
    assert line.take("b", threading.Event(), lambda: told.append("waits")) and told == ["waits"]


def test_wishes_are_counted_by_person_and_in_all():
    line = Line(2, 3)
    with line.wish("a"), line.wish("a"):
        with pytest.raises(SVFitError, match="2 of your orders"), line.wish("a"):
            pass
        with line.wish("b"), pytest.raises(SVFitError, match="3 orders wait already"), line.wish("c"):
            pass
    with line.wish("a"), line.wish("b"), line.wish("c"):
        pass
