"""What an executor owes and since when it is silent, on a virtual clock."""

import trio

from hypha.worker.owed import Owed
from tests.sim.virtual import VirtualRuntime


def owed() -> Owed:
    return Owed(VirtualRuntime(1, "w"))


async def test_it_owes_its_first_word_from_the_start(autojump_clock):
    debts = owed()
    await trio.sleep(3)
    assert debts.silent_s() == 3
    debts.heard()
    assert debts.silent_s() == 0
    await trio.sleep(2)
    assert debts.silent_s() == 2


async def test_who_owes_nothing_may_be_silent_for_ever(autojump_clock):
    debts = owed()
    debts.settle()
    await trio.sleep(1000)
    assert debts.silent_s() == 0
    debts.owe("merge")
    await trio.sleep(4)
    assert debts.silent_s() == 4


async def test_one_answer_pays_one_debt(autojump_clock):
    debts = owed()
    debts.settle()
    debts.owe(1)
    debts.owe(2)
    debts.settle(1)
    await trio.sleep(5)
    assert debts.silent_s() == 5
    debts.settle(2)
    assert debts.silent_s() == 0


async def test_a_further_debt_does_not_start_the_clock_again(autojump_clock):
    debts = owed()
    await trio.sleep(5)
    debts.owe("more")
    assert debts.silent_s() == 5


async def test_the_clock_stands_while_any_of_its_questions_is_open(autojump_clock):
    debts = owed()
    with debts.answering():
        with debts.answering():
            await trio.sleep(10)
        await trio.sleep(10)
        assert debts.silent_s() == 0
    await trio.sleep(1)
    assert debts.silent_s() == 1


async def test_a_question_that_ends_in_another_thread_makes_no_debt(autojump_clock):
    debts = owed()
    with debts.answering():
        debts.settle()
    await trio.sleep(500)
    assert debts.silent_s() == 0
