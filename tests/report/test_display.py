"""Progress: a few lines in a log file, a bar in a terminal, silence on other processes."""

import re
from io import StringIO

from rich.console import Console

from opd_env.report.display import Display
from tests.episode.trajectory_samples import make_trajectory


def played(steps, **keywords):
    file = StringIO()
    display = Display(Console(file=file, width=120, **keywords.pop("console", {})), **keywords)
    with display:
        advance = display.phase("training", steps)
        for step in range(1, steps + 1):
            advance(step, {"KL": "0.5"})
        display.say("done [x]")
    return file.getvalue()


def test_a_log_file_gets_about_twenty_lines_and_the_last_step():
    lines = played(100).splitlines()
    assert 18 <= len(lines) <= 22
    assert lines[-2].startswith("training 100/100  KL 0.5  0:00:00 left")
    assert lines[-1] == "done [x]"


def test_a_terminal_gets_a_bar():
    assert "━" in played(3, console={"force_terminal": True})


def test_other_processes_are_silent_but_for_warnings():
    assert played(5, enabled=False) == ""
    file = StringIO()
    Display(Console(file=file, width=120), enabled=False).warn("look")
    assert file.getvalue() == "warning: look\n"


def test_episodes_are_told_with_their_speed_and_those_of_an_earlier_run_took_no_time():
    file = StringIO()
    with Display(Console(file=file, width=120)) as display:
        meter = display.episodes("arithmetic (test)")
        for done in range(91, 101):
            meter.count(make_trajectory())
            meter.advance(done, 100)
    first, last = file.getvalue().splitlines()[0], file.getvalue().splitlines()[-1]
    assert first.startswith("arithmetic (test) 95/100  ")
    assert re.fullmatch(r"arithmetic \(test\) 100/100  [\d,]+ tokens/s  0:00:00 left", last)
    assert first.endswith("0:00:00 left")
