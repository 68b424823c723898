"""The judge against a server on this machine that counts what it is asked, and fails as real ones do."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from conftest import PROJECT
from toys.judge import (
    Handler,
    grade,
    in_process,
    judge_of,
    row,
    serve,  # noqa: F401 (a fixture)
    write,
)
from toys.results import make_run

import core
from lab.compare import facts, judge
from lab.compare.grades import lines_of_score
from lab.compare.rows import judge_notes, judged_rows

KEY = "sk-Zq7Vb2Xw9"  # no part of it is to be found anywhere


def rows(n):
    return [row(number) for number in range(n)]


def recorded(tmp_path):
    return [
        json.loads(line) for path in tmp_path.glob("runs/replies/*") for line in path.read_text().splitlines()
    ]


def gives_up(some, asked):
    with pytest.raises(core.UserError) as error:
        judge.score(asked, some)
    for thread in threading.enumerate():  # what was in flight is kept, too
        if "(_work)" in thread.name:
            thread.join(10)
    assert "\n" not in str(error.value) and "\r" not in str(error.value)
    return str(error.value)


def process(server, *argv):
    argv = ["--mode", "judge", "--run", "responses.json", "--judge_url", server.url, *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(PROJECT / "eval.py"), *argv], **pipes)


def test_each_answer_is_asked_once_and_mean_interval_and_counts_are_those_of_hand(serve):
    server, nothing = serve(), {"model_response": " \n"}
    some = [row(i, input=f"given {i}") for i in range(40)] * 2 + [row(77, **nothing), row(77, **nothing)]
    found = judge.score(judge_of(server), some)
    assert len(server.replied) == 40 and set(server.asked.values()) == {1}
    body, text = server.bodies[7], server.bodies[7]["messages"][0]["content"]
    i = grade(text)
    assert body == {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": text}]}
    for part in (f"Instruction:\nName thing {i}.", f"Input:\ngiven {i}", f"reference {i}", f"answer {i}"):
        assert text.count(part) == 1
    per_prompt = [*range(40), 0]
    half = scipy.stats.t.ppf(0.975, 40) * np.std(per_prompt, ddof=1) / np.sqrt(41)
    interval = [np.mean(per_prompt) - half, np.mean(per_prompt) + half]  # of 82 rows: 1.4 times narrower
    assert found["score"] == pytest.approx(np.mean(per_prompt))
    assert found["score_interval"] == pytest.approx(interval, rel=0.03)
    counts = {name: found[name] for name in ("rows", "graded", "empty", "unreadable", "repeats", "noise")}
    assert counts == {"rows": 82, "graded": 82, "empty": 2, "unreadable": 0, "repeats": 1, "noise": None}
    assert [entry["grades"] for entry in found["grades"]] == [[i] for i in [*range(40)] * 2 + [0, 0]]


def test_grades_that_are_all_alike_have_an_interval_on_their_own_scale(serve):
    found = judge.score(judge_of(serve(lambda text: "100")), rows(12))
    assert found["score_interval"] == pytest.approx([75, 100])  # the rule of three: 3 of 12 prompts
    found = judge.score(judge_of(serve()), [row(i, model_response="") for i in range(12)])
    assert found["score_interval"] == pytest.approx([0, 25])


@pytest.mark.parametrize("requests", [4, 1])
def test_a_slow_judge_has_as_many_requests_at_once_as_allowed(serve, requests):
    server = serve(delay=0.1)
    assert judge.score(judge_of(server, requests=requests), rows(9))["score"] == 4
    assert server.most == requests


def test_unreadable_replies_are_counted_kept_if_they_say_something_and_not_part_of_the_mean(serve):
    server = serve(lambda text: {"1": "no idea", "2": None}.get(grade(text), grade(text)))
    for _ in range(2):  # the second time all is known
        found = judge.score(judge_of(server), rows(5))
        assert found["score"] == pytest.approx((0 + 3 + 4) / 3)
        assert (found["graded"], found["unreadable"], found["unanswered"]) == (3, 2, 1)
        lines = "\n".join(lines_of_score("run", found))
        missing = "1 replies hold no grade, 1 questions have no reply"
        assert f"{missing}; counted as 0 the mean would be 1.40" in lines
    assert server.asked.total() == 6  # what had no answer is asked again
    found = judge.score(judge_of(server), [row(1)])
    assert found["score"] is None and "no grade could be read" in lines_of_score("run", found)[0]


def test_noise_is_the_root_of_the_mean_variance_within_answers(serve):
    grades = {"0": [10, 20, 60], "1": [50, 50, 50], "2": [0, 90, 30]}
    left = {number: list(of_answer) for number, of_answer in grades.items()}
    server = serve(lambda text: str(left[grade(text)].pop()))
    judge.score(judge_of(server), rows(3))
    some = [*rows(3), row(9, model_response="")]  # not asked: it says nothing of the judge's noise
    found = judge.score(judge_of(server), some, repeats=3)
    assert set(server.asked.values()) == {3} and len(server.asked) == 3  # the first of three was known
    got = [sorted(entry["grades"]) for entry in found["grades"]]
    assert got == [*map(sorted, grades.values()), [0, 0, 0]]
    assert found["noise"] == pytest.approx(np.sqrt((700 + 0 + 2100) / 3))  # deviations by hand
    assert found["score"] == pytest.approx((30 + 50 + 40 + 0) / 4)


def test_means_are_given_per_category_where_rows_have_one(serve):
    some = [row(i, category="qa" if i % 2 else "math") for i in range(6)] + [row(50)]
    found = judge.score(judge_of(serve()), some)["by_category"]
    means = {name: (part["score"], part["rows"]) for name, part in found.items()}
    assert means == {"math": (2, 3), "qa": (3, 3)}
    low, high = found["math"]["score_interval"]
    assert low < 2 < high and judge.score(judge_of(serve()), rows(3))["by_category"] == {}


@pytest.mark.parametrize("what", ["model", "url", "model_response", "instruction", "input", "output"])
def test_what_was_asked_once_is_free_and_what_differs_is_not(serve, what):
    server, changes = serve(), {} if what in ("model", "url") else {what: "another answer 1"}
    for _ in range(2):
        assert judge.score(judge_of(server), [row(1)])["score"] == 1
    assert server.asked.total() == 1
    other = serve() if what == "url" else server
    judge.score(judge_of(other, model="another" if what == "model" else "m"), [row(1, **changes)])
    assert len(server.bodies) + (other is not server) * len(other.bodies) == 2


CUT = b"HTTP/1.1 %s\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nbusy"
PASSING = {
    "429": lambda h: h.send(429, "slow down", Retry_After="0.5"),
    "429 with a date": lambda h: h.send(429, "slow down", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 and words": lambda h: h.send(429, "Rate limit reached. Please retry in 0.2s."),
    "500": lambda h: h.send(500, "{}"),
    "503": lambda h: h.send(503, "loading the model"),
    "reset": Handler.reset,
    "closed": lambda h: h.raw(b""),
    "half a body": lambda h: h.send(200, '{"choices": [{"mess', size=500),
    "chunk cut": lambda h: h.raw(CUT % b"200 OK"),
    "503, chunk cut": lambda h: h.raw(CUT % b"503 Busy"),
    "no HTTP": lambda h: h.raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "no JSON": lambda h: h.send(200, "<html>busy</html>"),
    "no choices": lambda h: h.send(200, '{"error": "busy"}'),
    "choices empty": lambda h: h.send(200, '{"choices": []}'),
    "message is no object": lambda h: h.send(200, '{"choices": [{"message": "85"}]}'),
    "deep": lambda h: h.send(200, "[" * 100_000),
    "nothing": lambda h: h.send(200, ""),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_is_tried_again_until_each_answer_is_judged_once(serve, fault, capfd, tmp_path):
    server = serve(fault=lambda number, handler: handler.nth < 3 and PASSING[fault](handler))
    assert judge.score(judge_of(server), rows(5))["score"] == 2
    assert set(server.asked.values()) == {3} and set(server.replied.values()) == {1}
    assert len(recorded(tmp_path)) == len(server.replied) == 5
    assert capfd.readouterr().err.strip().count("\n") == 0  # told once
    if fault == "429":  # the first question was asked alone: its three requests came first
        assert min(np.diff(server.times[:3])) >= 0.5


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_stays_ends_it_in_one_line_and_what_is_missing_is_asked_later(serve, fault, tmp_path):
    server = serve(fault=lambda number, handler: grade(handler.text) == "2" and PASSING[fault](handler))
    said = gives_up(rows(6), judge_of(server, model="llama3", attempts=2, requests=1))
    assert all(part in said for part in (server.url, "judge llama3", "2 times"))
    kept = int(re.search(r"(\d) of 6 questions are answered and kept", said)[1])
    # a few come in while the others are called off
    assert 2 <= kept <= len(recorded(tmp_path)) == len(server.replied) <= 5
    server.fault = lambda number, handler: False
    assert judge.score(judge_of(server, model="llama3"), rows(6))["score"] == 2.5
    assert set(server.replied.values()) == {1} and sorted(server.asked.values()) == [1] * 5 + [3]


@pytest.mark.parametrize("status, reason", [(400, "wrong"), (401, "wrong"), (404, f"no {KEY}")])
def test_a_refusal_ends_it_at_once_without_the_key(serve, status, reason, tmp_path, capfd):
    said = f"bad key {f'{KEY} ' * 30}"  # wherever it is cut, it is cut in a key
    server = serve(fault=lambda number, handler: handler.send(status, said, reason))
    error = gives_up(rows(6), judge_of(server, KEY))
    assert len(server.bodies) == 1 and f"HTTP {status}" in error and "bad key" in error
    told = error + "".join(capfd.readouterr()) + repr(recorded(tmp_path))
    assert not [part for part in (KEY[:4], KEY[4:8], KEY[8:]) if part in told]


def test_a_key_with_a_line_break_works_and_is_told_nowhere(serve, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("JUDGE_API_KEY", f"{KEY}\r\n")  # read from a file with Windows' line ends
    server, run = serve(), ["--run", write([row(1)]), "--judge_attempts", 1]
    code = in_process(*run, "--judge_url", server.url)
    assert KEY not in "".join(capfd.readouterr())
    assert code == 0 and server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_a_reply_that_holds_the_key_counts_and_is_not_kept(serve, tmp_path):
    server = serve(lambda text: f"<think>with {KEY}</think>7")
    for _ in range(2):
        assert judge.score(judge_of(server, KEY), rows(1))["score"] == 7
    assert server.asked.total() == 2 and recorded(tmp_path) == []


@pytest.mark.parametrize("key", ["1", "0", "x", "A", "e", "response", "***", "=", None])
def test_no_key_changes_a_grade_or_a_verdict(serve, key):
    """A local server wants some key: with 1 the grade 100 became 0, and stayed in the cache."""
    server = serve(lambda text: "100" if "Grade" in text else "The better response is A")
    assert judge.score(judge_of(server, key), rows(2))["score"] == 100
    found = judge.duel(judge_of(server, key), rows(2), [row(0, model_response="other"), row(1)])
    assert found["unreadable"] == 0 and found["first_place"] == 1


def says(code, text, from_number=0):
    """A fault: the judge's HTTP error for questions whose answer has this number and all above it."""
    return lambda _, handler: int(grade(handler.text)) >= from_number and handler.send(code, text)


ACCOUNT = {
    402: "Insufficient credits. Add more to your account.", 401: "invalid key", 403: "your key has expired",
    400: "Your credit balance is too low to access the API.",
}  # fmt: skip


@pytest.mark.parametrize("code", ACCOUNT)
def test_an_account_that_is_empty_amid_the_run_ends_it_and_the_rest_is_asked_when_it_is_not(
    serve, code, capfd, tmp_path
):
    server = serve(fault=says(code, ACCOUNT[code], 2))
    run = ["--run", write(rows(12)), "--judge_url", server.url, "--judge_requests", 1]
    assert in_process(*run) == 2
    err = capfd.readouterr().err
    assert (
        err.count("\n") == 1 and f"HTTP {code} " in err and "2 of 12 questions are answered and kept" in err
    )
    assert len(recorded(tmp_path)) == 2 and not (tmp_path / "judged.json").exists()
    server.fault = lambda number, handler: False
    assert in_process(*run) == 0 and set(server.replied.values()) == {1} and len(server.replied) == 12


NO_ANSWER = {
    "too long": lambda h: h.send(400, "This model's maximum context length is 8192 tokens"),
    "too large": lambda h: h.send(413, "payload"),
    "filtered": lambda h: h.send(403, "input flagged by moderation"),
    **{
        name: lambda h, choice=choice: h.send(200, json.dumps({"choices": [choice]}))
        for name, choice in {
            "empty": {"message": {"content": ""}},
            "blank": {"message": {"content": " \n"}},
            "a refusal": {"message": {"content": None, "refusal": "I will not."}},
            "thoughts elsewhere": {"message": {"reasoning_content": "85"}},
            "thoughts alone": {"message": {"content": [{"type": "thinking", "thinking": "85"}]}},
            "thoughts without an end": {"message": {"content": "<think>85"}},
            "cut": {"message": {"content": "8"}, "finish_reason": "length"},
            "filter": {"message": {"content": "85"}, "finish_reason": "content_filter"},
        }.items()
    },
}


@pytest.mark.parametrize("fault", NO_ANSWER)
def test_what_is_no_answer_is_said_not_kept_and_asked_again(serve, fault, tmp_path, capfd):
    def no_answer(number, handler):
        return grade(handler.text) == "1" and NO_ANSWER[fault](handler)

    server = serve(fault=no_answer)
    for asked in (1, 2):  # the second time it is the first question
        found = judge.score(judge_of(server), rows(4))
        assert (found["score"], found["graded"], found["unanswered"]) == (pytest.approx(5 / 3), 3, 1)
        err = capfd.readouterr().err
        assert "no answer to 1 of 4 questions" in err and "asks again" in err and err.count("\n") == 1
        assert len(recorded(tmp_path)) == 3 and server.asked.total() == 3 + asked
    server.fault = lambda number, handler: False
    assert judge.score(judge_of(server), rows(4))["score"] == 1.5


FIRST = {
    "too long": NO_ANSWER["too long"],
    "too large": NO_ANSWER["too large"],
    "filtered": NO_ANSWER["filtered"],
    "filtered otherwise": lambda h: h.send(400, '{"error": {"code": "content_filter"}}'),
    "many tokens": lambda h: h.send(422, "inputs must have fewer than the maximum of 4096 tokens"),
}


@pytest.mark.parametrize("fault", FIRST)
def test_a_first_question_that_the_judge_cannot_take_ends_nothing(serve, fault):
    server = serve(fault=lambda number, handler: grade(handler.text) == "0" and FIRST[fault](handler))
    found = judge.score(judge_of(server), rows(4))
    assert (found["score"], found["unanswered"]) == (2, 1) and len(server.bodies) == 4


def test_a_judge_that_answers_less_than_half_grades_nothing(serve):
    server = serve(fault=lambda number, handler: number > 3 and handler.send(400, "unheard of"))
    said = gives_up(rows(8), judge_of(server))
    assert "no answer to 5 of 8 questions, e.g. HTTP 400" in said and "3 of 8 questions are answered" in said


def test_the_temperature_can_be_left_out_and_a_refusal_names_how(serve, capfd):
    def strict(number, handler):
        return "temperature" in handler.server.bodies[-1] and handler.send(400, "temperature: only 1 works")

    run = ["--run", write(rows(3)), "--judge_url", serve(fault=strict).url]
    assert in_process(*run) == 2 and "--judge_temperature none" in capfd.readouterr().err
    assert in_process(*run, "--judge_temperature", "none") == 0
    server = serve()
    assert in_process(*run[:3], server.url, "--judge_temperature", 0.5) == 0
    assert {body["temperature"] for body in server.bodies} == {0.5}


def test_a_wait_that_is_told_is_kept_said_once_and_has_an_end(serve, capfd):
    def busy(number, handler):
        return handler.nth < 3 and handler.send(429, f"Quota exceeded, please retry in 0.{number + 30}s")

    server = serve(fault=busy)
    assert judge.score(judge_of(server), rows(4))["score"] == 1.5
    err = capfd.readouterr().err
    assert err.count("the judge is asked again") == 1 and "it asks to wait 0.3" in err
    assert min(np.diff(server.times[:3])) >= 0.3  # the first is asked alone
    server = serve(fault=lambda number, handler: handler.send(429, '{"retryDelay": "3600s"}'))
    said = gives_up(rows(2), judge_of(server))
    assert "asks to wait 3600 s, more than the 600 that are waited" in said and len(server.bodies) == 1


OK, ERROR = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 503 Busy\r\nContent-Length: 600\r\n\r\n"
SLOW = {  # a reply takes half a minute, byte by byte
    "silent": Handler.hang,
    "dripping": lambda h: h.raw(OK + b"Content-Length: 600\r\n\r\n" + b" " * 600, 0.05),
    "a dripping error": lambda h: h.raw(ERROR + b"x" * 600, 0.05),
    "a dripping status": lambda h: h.raw(OK * 40, 0.05),
    "dripping headers": lambda h: h.raw(OK + b"X: y\r\n" * 90, 0.05),
    "100 for ever": lambda h: h.raw(b"".join([b"HTTP/1.1 100 Continue\r\n\r\n"] * 30), 0.05),
}


@pytest.mark.parametrize(
    "fault", ["silent", *(pytest.param(name, marks=pytest.mark.slow) for name in [*SLOW][1:])]
)
def test_a_server_that_hangs_costs_the_time_out_and_no_more(serve, fault):
    server = serve(fault=lambda number, handler: SLOW[fault](handler))
    began = time.monotonic()
    said = gives_up(rows(2), judge_of(server, attempts=2, seconds=0.3))
    assert 0.6 <= time.monotonic() - began < 20 and len(server.bodies) == 2
    assert "no answer in time" in said or fault == "a dripping error"


def test_a_server_that_dies_is_an_error_and_another_in_its_place_is_asked_for_the_missing(serve):
    def die(number, handler):
        if number == 8:
            handler.server.stop()
        return number >= 8 and handler.reset()

    server = serve(fault=die)
    said = gives_up(rows(20), judge_of(server, attempts=3))
    done = set(server.replied)
    kept = int(re.search(r"refused, 3 times.* (\d+) of 20", said)[1])
    assert 3 <= kept <= len(done) <= 7
    again = serve(port=server.server_port)
    assert judge.score(judge_of(again), rows(20))["score"] == 9.5
    assert len(again.asked) == 20 - len(done) and not done & set(again.asked)
    assert set(again.asked.values()) == {1}


def test_half_a_line_of_a_killed_process_is_asked_again_and_begins_no_other_line(serve, tmp_path):
    server = serve()
    judge.score(judge_of(server), rows(3))
    (path,) = tmp_path.glob("runs/replies/judge_*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 30])
    judge.score(judge_of(server), rows(4))
    assert sorted(server.asked.values()) == [1, 1, 1, 2]
    assert path.read_bytes().startswith(whole[:-30] + b"\n{")
    judge.score(judge_of(server), rows(4))
    assert server.asked.total() == 5


def test_killed_half_way_the_same_command_goes_on(serve, tmp_path):
    n, at_once = 24, 3

    def kill(number, handler):
        if number == 10:
            started.kill()

    server = serve(fault=kill, delay=0.02)
    write(rows(n))
    started = process(server, "--judge_requests", at_once)
    assert started.wait(60) == -signal.SIGKILL
    kept = {entry["question"] for entry in recorded(tmp_path)}
    assert 5 <= len(kept) < len(server.asked) < n
    started = process(server, "--judge_requests", at_once)
    out, _ = started.communicate(timeout=60)
    assert started.returncode == 0 and f"{n} of {n} answers" in out
    assert Counter(entry["question"] for entry in recorded(tmp_path)) == dict.fromkeys(server.asked, 1)
    # asked twice: what was in flight when it died, at most as many as are asked at once
    twice = {text for text, count in server.asked.items() if count > 1}
    assert len(server.asked) == n and max(server.asked.values()) == 2
    assert not twice & kept and len(twice) <= at_once


@pytest.mark.parametrize("hangs", [False, True])
def test_ctrl_c_ends_it_says_what_is_kept_and_the_same_command_goes_on(serve, tmp_path, hangs):
    def interrupt(number, handler):
        if number == 10:
            started.send_signal(signal.SIGINT)
        return hangs and number >= 10 and handler.hang()

    server = serve(fault=interrupt, delay=0.05)
    write(rows(24))
    started = process(server)
    with contextlib.ExitStack() as stack:
        stack.callback(started.kill)
        _, err = started.communicate(timeout=40)  # not the minute that a request may take
    kept = int(re.search(r"SIGINT: (\d+) of 24 questions are answered and kept", err)[1])
    assert started.returncode == -signal.SIGINT and err.count("\n") == 1
    assert 6 <= kept <= len(recorded(tmp_path)) <= kept + 4  # those in flight come a little later
    before = {entry["question"] for entry in recorded(tmp_path)}
    server.fault = lambda number, handler: False
    assert in_process("--run", "responses.json", "--judge_url", server.url) == 0
    assert len(server.replied) == 24 and {server.asked[text] for text in before} == {1}


def test_nobody_there_is_one_line_and_quick(serve):
    server = serve()
    server.stop()
    write(rows(3))
    began = time.monotonic()
    started = process(server)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 2 and out == "" and err.count("\n") == 1
    assert server.url in err and "ollama serve" in err and "0 of 3" in err
    assert time.monotonic() - began < 30  # six attempts: 31 seconds and the start


def test_a_key_comes_from_the_environment_or_not_at_all(serve, monkeypatch, capfd):
    server = serve()
    run = ["--run", write([row(1)]), "--judge_url", server.url]
    assert in_process(*run) == 0 and "Authorization" not in server.headers[-1]
    monkeypatch.setenv("MY_KEY", KEY)
    assert in_process(*run, "--judge_model", "b", "--judge_key", "MY_KEY") == 0
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    assert in_process(*run, "--judge_model", "c", "--judge_key", "none") == 0
    assert "Authorization" not in server.headers[-1] and len(server.headers) == 3
    monkeypatch.delenv("JUDGE_API_KEY")
    capfd.readouterr()
    assert in_process(*run[:2], "--judge_url", "https://judge.invalid/v1") == 2
    err = capfd.readouterr().err
    assert "JUDGE_API_KEY" in err and err.count("\n") == 1


def test_grades_of_a_judge_at_another_temperature_or_address_replace_none_and_are_never_paired(serve):
    server, other, run = serve(), serve(lambda text: "50"), "runs/run_lora"
    for name, seed in (("a", 1), ("b", 2)):
        write(rows(3), Path(make_run(name, seed=seed)) / "responses.json")

    def judged(name, url, *flags):
        assert in_process("--run", f"{run}/{name}", "--judge_url", url, "--judge_model", "m", *flags) == 0
        return json.loads(Path(run, name, "judged.json").read_text())

    judged("a", server.url)
    found = judged("a", other.url)
    assert [found[name]["score"] for name in ("m", f"m at {other.url}, temperature 0.0")] == [1, 50]
    warm = judged("a", server.url, "--judge_temperature", 0.5)
    assert len(warm) == 3 and len(judged("a", server.url)) == 3  # replaces its own
    judged("b", server.url, "--judge_temperature", 1)
    both = [facts.read(f"{run}/{name}") for name in ("a", "b")]
    (note,) = judge_notes(both)
    assert judged_rows(both) == [] and note.startswith(f"NOTE grades by m at {server.url[:17]}")
    assert note.count(", temperature ") == 4 and note.endswith("are not compared: grade all by one of them")
    judged("b", other.url)
    both = [facts.read(f"{run}/{name}") for name in ("a", "b")]
    (paired,) = judged_rows(both)
    assert (
        paired.name == f"grade by m at {other.url}, temperature 0.0"
        and paired.sums.tolist() == [[50] * 3] * 2
    )
    assert judge_notes(both) == []


def test_where_grades_cannot_be_written_nothing_is_asked(serve, monkeypatch, capfd):
    server, run = serve(), ["--run", write(rows(3)), "--judge_url"]

    def refused(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "touch", refused)  # as root every folder can be written
        assert in_process(*run, server.url) == 2
    err = capfd.readouterr().err
    assert "cannot be written (Permission denied): copy the answers" in err and err.count("\n") == 1
    assert not server.bodies


def test_the_hash_of_graded_answers_is_of_what_was_read_not_of_what_came_meanwhile(serve):
    before = write(rows(3))
    wanted = core.sha256_file(Path(before))
    server = serve(fault=lambda number, handler: Path(before).write_text("[]") == 0)
    assert in_process("--run", before, "--judge_url", server.url, "--judge_model", "m") == 0
    assert json.loads(Path("judged.json").read_text())["m"]["responses_sha256"] == wanted


def test_replies_that_cannot_be_read_are_one_line(serve):
    server = serve()
    judge_of(server).path.mkdir(parents=True)
    with pytest.raises(core.UserError, match=r"^judge's replies in runs/replies/\S+ cannot be read"):
        judge_of(server)


def test_summaries_of_several_judges_stand_beside_the_answers(serve, tmp_path, capfd):
    server, folder = serve(), tmp_path / "run"
    folder.mkdir()
    write(rows(3), folder / "responses.json")
    write(rows(4), "some.json")
    run = ["--judge_url", server.url, "--run"]
    assert in_process(*run, folder, folder, "some.json", "--judge_model", "first") == 0
    told = re.findall(r"; (\d+) questions were asked", capfd.readouterr().out)
    assert told == ["3", "0", "1"]
    server.answer = lambda text: "50"
    assert in_process(*run, folder, "--judge_model", "second") == 0
    found = json.loads((folder / "judged.json").read_text())
    assert {name: one["score"] for name, one in found.items()} == {"first": 1, "second": 50}
    assert json.loads((tmp_path / "judged_some.json").read_text())["first"]["rows"] == 4
    (folder / "judged.json").write_text('{"first": ')
    assert in_process(*run, folder, "--judge_model", "second") in (0, 2)  # either, but no traceback


ODD = {  # what stands in the file -> what is said of it
    "missing": (None, "--mode generate"),
    "not answered": ([{"instruction": "a", "output": "b"}], "lacks column(s) model_response"),
    "a number": ([row(1), row(2, model_response=3)], "row 2"),
    "an answer is missing": ([row(1), {"instruction": "a"}], "row 2"),
    "a row is no object": ([row(1), "text"], "row 2"),
    "odd Unicode": ([row(1), row(2, instruction="\ud800")], "row 2"),
    "empty": ([], "no rows"),
    "damaged": ('[{"instruction": "a", "model_resp', "cannot be read as json"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_file_that_cannot_be_judged_is_one_line_and_nothing_is_asked(serve, case, capfd, tmp_path):
    content, said = ODD[case]
    if content is not None:
        (tmp_path / "responses.json").write_text(content if isinstance(content, str) else json.dumps(content))
    server = serve()
    assert in_process("--run", tmp_path, "--judge_url", server.url) == 2
    err = capfd.readouterr().err
    assert said in err and "responses.json" in err and err.count("\n") == 1 and not server.bodies


def test_replies_that_cannot_be_kept_are_one_line_before_anything_is_asked(serve, tmp_path):
    (tmp_path / "runs").write_text("no folder")
    server = serve()
    assert "cannot be kept in runs/replies (Not a directory)" in gives_up(rows(2), judge_of(server))
    assert not server.bodies
