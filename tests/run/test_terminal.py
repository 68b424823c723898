"""Streams that outlive their terminal; laws/test_terminals.py tries it through pseudo-terminals."""

import io
import os

import pytest

from lab.run.terminal import Terminal, one_line, write_in_handler


class Dead(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def fileno(self):
        return 99  # not the test's own stdout


@pytest.mark.parametrize("error", [OSError(5, "EIO"), BrokenPipeError(32, "EPIPE"), ValueError("closed")])
def test_a_stream_that_nobody_will_read_again_is_dead_and_raises_nothing(error):
    stream = Terminal(Dead(error))
    assert stream.write("words") == 5 and stream.is_dead
    stream.writelines(["more", "words"])
    stream.flush()


def test_a_full_disk_may_have_room_again():
    stream = Terminal(Dead(OSError(28, "ENOSPC")))
    stream.write("words")
    assert not stream.is_dead


def test_what_a_locale_cannot_say_is_said_in_ascii():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    Terminal(inner).write("0.5 ± 0.1")
    assert inner.buffer.getvalue() == b"0.5 ? 0.1"


def test_a_handler_writes_past_a_stream_and_to_an_open_log(capfd):
    with open("log.txt", "w") as log:
        write_in_handler("SIGTERM\n", log)
    write_in_handler("again\n", log)  # closed: only the terminal
    assert capfd.readouterr().err == "SIGTERM\nagain\n" and open("log.txt").read() == "SIGTERM\n"
    assert os.path.exists("log.txt")


def test_a_line_of_the_screen_holds_no_control_characters():
    assert one_line("a\nb\tc\x1b[31md") == "a / b c [31md"


def test_what_a_terminal_would_obey_is_not_written_but_bars_go_up_a_line():
    inner = io.StringIO()
    Terminal(inner).write("a\x1b]0;title\x07b\x1b[2Jc\x9bd\x1b[Ae\r\n\tf")
    assert inner.getvalue() == "a?]0;title?b?[2Jc?d\x1b[Ae\r\n\tf"
