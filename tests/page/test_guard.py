"""Who is let in, how often it may be tried, and how much may be sent.     python -m pytest tests/page/test_guard.py"""

import asyncio
import re
import socket
import sys

import pytest

import web_ner
from alpaca.common.errors import UserError
from alpaca.page.address import check_address
from alpaca.page.events import Stops
from alpaca.page.guard import ADDRESS, FORM_BYTES, VARIABLE, Guard, make_login, read_accounts
from config_utils import parse_config
from harness import free_port


class Refused(Exception):
    pass


def tries(login, *attempts):
    """What `login` says to (address, user, password) each, as gradio asks it."""

    async def one(address, user, password):
        ADDRESS.set(address)
        try:
            return await login(user, password)
        except Refused as error:
            return str(error)

    return [asyncio.run(one(*attempt)) for attempt in attempts]


def test_five_wrong_tries_a_minute_an_address():
    now = [0.0]
    login = make_login({"我": "a:密码"}, Refused, lambda: now[0])
    right, wrong, other = ("1.1.1.1", "我", "a:密码"), ("1.1.1.1", "我", "a"), ("2.2.2.2", "我", "a:密码")
    assert tries(login, right, wrong, wrong, wrong, wrong, right) == [True, False, False, False, False, True]
    now[0] = 30.0
    assert tries(login, ("1.1.1.1", "nobody", ""), right, other)[:1] == [False]
    (refused,) = tries(login, right)
    assert "错了 5 次" in refused and tries(login, other) == [True]
    now[0] = 60.5
    assert tries(login, right, wrong, wrong, wrong, wrong, right) == [True, False, False, False, False, refused]
    now[0] = 200.0
    assert tries(login, other, right) == [True, True]


def test_accounts_come_from_a_file_or_the_environment_and_are_never_shown(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_accounts(None) == {}
    monkeypatch.setenv(VARIABLE, "me:a:b")
    assert read_accounts(None) == {"me": "a:b"}
    file = tmp_path / "accounts.txt"
    file.write_text("me:secret\n\nyou:other\n", encoding="utf-8")
    assert read_accounts(str(file)) == {"me": "secret", "you": "other"}
    for content in ("hidden\n", ":hidden\n", "hidden:\n", "\n"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"accounts\.txt: (expected user:password in each line|is empty)") as error:
            read_accounts(str(file))
        assert "hidden" not in str(error.value)
    with pytest.raises(UserError, match=f"--auth: no such file; .*{VARIABLE}") as error:
        read_accounts("me:hidden")
    assert "hidden" not in str(error.value)


def test_what_is_too_large_is_read_away_and_refused():
    def answer(length, chunks=(b"",)):
        sent, left, passed = [], [{"body": part, "more_body": i + 1 < len(chunks)} for i, part in enumerate(chunks)], []

        async def app(scope, receive, send):
            passed.append(ADDRESS.get())

        async def receive():
            return left.pop(0)

        async def send(message):
            sent.append(message)

        headers = [(b"content-length", str(length).encode())] if length is not None else []
        scope = {"type": "http", "method": "POST", "headers": headers, "client": ("1.2.3.4", 5)}
        asyncio.run(Guard(app, max_upload_mb=2)(scope, receive, send))
        return passed or [sent[0]["status"], sent[1]["body"].decode(), len(left)]

    most = 2 * 2**20 + FORM_BYTES
    assert answer(most) == ["1.2.3.4"] and answer(0) == ["1.2.3.4"]
    assert answer(most + 1, (b"a", b"b", b"c")) == [413, "文件超过 2 MB，没有接受（max_upload_mb）", 0]
    assert answer(None)[0] == answer("-1")[0] - 2 == 411


def test_each_job_has_its_own_event():
    stops, found = Stops(), {}
    with stops.job("one", "text") as found["old"]:
        with stops.job("one", "text") as found["text"], stops.job("one", "file") as found["file"]:
            with stops.job("two", "text") as found["other"]:
                assert found["old"].is_set()  # nobody would see its result
                stops.stop("one", "file")
                assert [found[name].is_set() for name in ("text", "file", "other")] == [False, True, False]
                stops.stop("one")
                assert [found[name].is_set() for name in ("text", "other")] == [True, False]
        with stops.job("one", "file") as again:
            assert not again.is_set()
    assert stops.running == {}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--host=0.0.0.0"], "--host=0.0.0.0: others could use the page; give --auth=FILE as well"),
        (["--host=::"], "give --auth"),
        (["--host=elsewhere"], "--host=elsewhere: expected an IP address"),
        (["--port=0"], "--port=0: expected 1 to 65535"),
        (["--max_text=0"], "--max_text=0: expected 1 or more"),
    ],
)
def test_who_may_open_the_page(options, message, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    port = [] if "--port=0" in options else [f"--port={free_port()}"]
    with pytest.raises(UserError, match=re.escape(message)):
        web_ner.main(parse_config(web_ner.CONFIG, web_ner.__file__, [*options, *port]))


def test_an_address_that_is_allowed():
    def check(*options, accounts=None):
        check_address(parse_config(web_ner.CONFIG, web_ner.__file__, options), accounts)

    port = f"--port={free_port()}"
    check(port)
    check(port, "--host=localhost")
    check(port, "--host=0.0.0.0", accounts={"me": "a:b"})
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use; name another port"):
        check(f"--port={taken.getsockname()[1]}")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UserError, match=f"pip install {re.escape(web_ner.GRADIO)}$"):
        web_ner.main(parse_config(web_ner.CONFIG, web_ner.__file__, [f"--port={free_port()}"]))
