"""Keys and addresses that are told nowhere; servers that answer on purpose what no judge would."""

import email.utils
import time
import urllib.parse
from email.message import Message

import pytest
from toys.judge import (
    grade,
    in_process,
    judge_of,
    row,
    serve,  # noqa: F401 (a fixture)
    write,
)

from lab.compare import endpoint, judge
from lab.errors import UserError

TOLD = {  # header or body -> seconds
    ("Retry-After", "7"): 7, ("Retry-After", "0.5"): 0.5, ("Retry-After-ms", "250"): 0.25,
    ("Retry-After", "-3"): 0, ("Retry-After", "nan"): 0, ("Retry-After", "soon"): 0,
    ("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"): 0, ("Retry-After", "Wed, 99 Oct 2015"): 0,
    "": 0, "slow down": 0, "50 requests a minute are allowed": 0,
    "Please retry in 50.25s.": 50.25, "Please try again in 350ms": 0.35, "try again in 6m0s": 360,
    "Please try again in 2m59.56s. Visit": 179.56, "Please wait 2 minutes, 5 seconds": 125,
    "retry after 6 seconds": 6, '{"details": [{"retryDelay": "50s"}]}': 50, '{"retry_after": 12.5}': 12.5,
    "Try again in 1 hour.": 3600, "Retry in 3 months": 0,
}  # fmt: skip


@pytest.mark.parametrize("told", TOLD)
def test_the_wait_that_a_server_tells_is_read(told):
    headers = Message()
    if isinstance(told, tuple):
        headers[told[0]] = told[1]
    assert endpoint.told_pause(headers, told if isinstance(told, str) else "") == pytest.approx(TOLD[told])


def test_a_date_and_the_longest_of_several_waits_are_read():
    headers = Message()
    headers["Retry-After"] = email.utils.formatdate(time.time() + 5000, usegmt=True)
    assert 4000 < endpoint.told_pause(headers, "retry in 50s") <= 5000
    headers.replace_header("Retry-After", "1")
    assert endpoint.told_pause(headers, "retry in 50s") == 50


@pytest.mark.parametrize(("content", "text"), [
    ("85", "85"), (85, "85"), (None, ""), (True, ""), ([], ""), ({}, ""),
    ([{"type": "text", "text": "8"}, {"type": "text", "text": "5"}], "85"), (["8", "5"], "85"),
    ([{"type": "thinking", "thinking": [{"type": "text", "text": "30"}]}, {"text": "85"}], "85"),
    ([{"type": "output_text", "text": "85"}, {"type": "image_url", "image_url": "x"}], "85"),
    ([{"type": "reasoning", "text": "30"}, {"text": {"value": "85"}}], "85"), ({"text": "85"}, "85"),
])  # fmt: skip
def test_content_of_any_shape_is_its_text(content, text):
    assert judge.text_of(content) == text


def test_content_in_parts_is_graded(serve):
    server = serve(lambda text: [{"type": "thinking", "thinking": "30"}, {"type": "text", "text": "85"}])
    assert judge.score(judge_of(server), [row(1)])["score"] == 85


LARGE = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000000\r\n\r\n{",
    "a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000\r\n{",
    "an error": b"HTTP/1.1 503 Busy\r\nContent-Length: 1000000000000000\r\n\r\n{",
    "escapes": b"HTTP/1.1 500 \x1b[31mred\x1b[0m\r\nContent-Length: 9\r\n\r\n\x1b]0;x\x07\x1b[2J",
}


@pytest.mark.parametrize("case", LARGE)
def test_a_reply_larger_than_memory_or_with_escapes_is_one_clean_line(serve, case):
    server = serve(fault=lambda number, handler: handler.raw(LARGE[case]))
    with pytest.raises(UserError) as error:
        judge.score(judge_of(server, attempts=2), [row(1)])
    assert "2 times" in str(error.value) and str(error.value).isprintable()


SECRET = "sk-Zq7Vb2Xw9"
URLS = [
    *(f"http://user:{SECRET}@localhost/v1", f"https://{SECRET}@x.org/v1", f"http://a:{SECRET}@[::1/v1"),
    *(f"http://x:{SECRET}@x:port/v1", f"user:{SECRET}@x.org/v1", f"ftp://x.org/?key={SECRET}"),
    *(
        "http://x.org/v1#part",
        "http://x.org/v1\n",
        "http://x.org/\tv1",
        "http://x .org/v1",
        "http://é.org/v1",
    ),
    *(
        "x.org/v1",
        "",
        "http://",
        "http://x:0/v1",
        "http://x:99999/v1",
        "file:///etc/passwd",
        "http:\\\\x.org",
    ),
]


@pytest.mark.parametrize("url", URLS)
def test_an_address_that_is_none_or_holds_a_password_is_refused_and_not_told(url):
    with pytest.raises(UserError) as error:
        endpoint.checked_host(url)
    assert "--judge_url" in str(error.value)
    assert SECRET not in str(error.value) and str(error.value).isprintable()


def test_a_query_stays_behind_the_path_and_is_told_nowhere(serve, capfd, tmp_path):
    server, paths = serve(), []
    server.fault = lambda number, handler: paths.append(handler.path)
    for path in (f"/v1?api-version=1&key={SECRET}", f"/v1/chat/completions?key={SECRET}"):
        url = server.url.removesuffix("/v1") + path
        assert in_process("--run", write([row(1)]), "--judge_url", url) == 0
    assert paths == [f"/v1/chat/completions?api-version=1&key={SECRET}", f"/v1/chat/completions?key={SECRET}"]
    server.stop()
    assert in_process("--run", write([row(2)]), "--judge_url", url) == 2
    told = "".join(capfd.readouterr()) + "".join(
        path.read_text() for path in (*tmp_path.glob("judged*"), *tmp_path.glob("runs/replies/*"))
    )
    assert server.url in told and SECRET not in told


@pytest.mark.parametrize("key", [f"{SECRET}\norg-1", f"{SECRET}\x1b[0m", f"Bearer {SECRET}",
                                 f"{SECRET}é", f"{SECRET}€", f"{SECRET}\x7f"])  # fmt: skip
def test_a_key_that_no_header_holds_is_refused_and_not_told(serve, key, monkeypatch, capfd):
    server = serve()
    monkeypatch.setenv("JUDGE_API_KEY", key)
    assert in_process("--run", write([row(1)]), "--judge_url", server.url) == 2
    err = capfd.readouterr().err
    assert "JUDGE_API_KEY" in err and SECRET not in err and err.count("\n") == 1 and not server.bodies


def test_a_key_in_place_of_its_variables_name_is_not_told(serve, capfd):
    assert in_process("--run", write([row(1)]), "--judge_url", serve().url, "--judge_key", SECRET) == 2
    err = capfd.readouterr().err
    assert "--judge_key names no environment variable" in err and SECRET not in err


def test_a_key_over_plain_http_to_another_machine_is_said_and_the_key_is_no_part_of_a_judge(
    monkeypatch, capfd
):
    class Constants:
        judge_url, judge_model, judge_key = "http://192.0.2.1/v1", "m", "JUDGE_API_KEY"
        judge_seconds = judge_attempts = judge_requests = judge_temperature = 1

    monkeypatch.setenv("JUDGE_API_KEY", SECRET)
    assert SECRET not in repr(judge.make_judge(Constants)) + str(judge.make_judge(Constants))
    err = capfd.readouterr().err
    assert "WARNING the key goes to 192.0.2.1 unencrypted" in err and SECRET not in err


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_given_a_question_for_this_machine(serve, host, monkeypatch):
    """It would get the key in clear, and knows no localhost of ours."""
    server, proxy = serve(), serve(fault=lambda number, handler: handler.send(502, "proxy"))
    monkeypatch.delenv("no_proxy")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
    asked = judge.Judge(server.url.replace("127.0.0.1", host), "m", SECRET)
    assert judge.score(asked, [row(1)])["score"] == 1 and len(server.bodies) == 1 and not proxy.bodies
    elsewhere = judge.Judge("http://judge.invalid/v1", "m", attempts=1)
    with pytest.raises(UserError, match="HTTP 502"):
        judge.score(elsewhere, [row(1)])
    assert len(proxy.bodies) == 1


@pytest.mark.parametrize("value", [SECRET, "sk%2FZq7Vb2Xw9%3D"])
def test_a_key_of_the_query_that_a_server_echoes_is_not_told_nor_kept(serve, value, tmp_path):
    plain = urllib.parse.unquote(value)

    def echo(number, handler):
        return grade(handler.text) == "2" and handler.send(404, f"no {handler.path}, key {plain}")

    server = serve(lambda text: f"{plain}: 5", fault=echo)
    asked = judge.Judge(f"{server.url}?api-version=1&key={value}", "m")
    judge.score(asked, [row(1)])
    assert plain not in "".join(path.read_text() for path in tmp_path.glob("runs/replies/*"))
    with pytest.raises(UserError, match="HTTP 404") as error:
        judge.score(asked, [row(2)])
    assert value not in str(error.value) and plain not in str(error.value)


def test_a_short_key_is_left_in_messages(serve):
    """`x` is what servers without keys are given: hidden, it would take every x out of every line."""
    server = serve(fault=lambda number, handler: handler.send(404, "no such index: xyz"))
    with pytest.raises(UserError, match="no such index: xyz"):
        judge.score(judge_of(server, "x"), [row(1)])
