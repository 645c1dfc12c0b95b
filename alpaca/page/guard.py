"""What a request meets before gradio does: who may log in, how often it may be tried, and how large a file may be."""

import hmac
import os
import time
from contextvars import ContextVar

from alpaca.common.errors import UserError
from alpaca.common.text_files import read_lines

VARIABLE = "WEB_NER_AUTH"
TRIES, SECONDS = 5, 60  # an address may be wrong so often in so many seconds
FORM_BYTES = 10_000  # of an upload beyond its file, at most
ADDRESS = ContextVar("ADDRESS", default=None)  # of the request that is being answered


def read_accounts(path):
    """{user: password} of --auth's file, a `user:password` a line, or else of the environment variable; {}: neither is there."""
    if path is None:
        where, lines = VARIABLE, filter(None, [os.environ.get(VARIABLE)])
    else:
        if not os.path.isfile(path):  # not named: it may be a password
            raise UserError(f"--auth: no such file; give one that holds user:password, or set {VARIABLE}")
        where, lines = f"--auth={path}", (line for _, line in read_lines(path) if line.strip())
    accounts = {}
    for line in lines:
        user, _, password = line.strip().partition(":")
        if not (user and password):
            raise UserError(f"{where}: expected user:password in each line")
        accounts[user] = password
    if path and not accounts:
        raise UserError(f"{where}: is empty; write user:password into it")
    return accounts


def make_login(accounts, refusal, clock=time.monotonic):
    """The function that gradio asks about a user and a password. refusal: makes the exception for too many tries.

    Asynchronous, so that it runs where the request's address is known, and one call at a time.
    """
    failures = {}  # address -> when

    async def login(user, password):
        now, address = clock(), ADDRESS.get()
        for other, times in list(failures.items()):
            failures[other] = [then for then in times if now - then < SECONDS]
            if not failures[other]:
                del failures[other]
        if len(failures.get(address, ())) >= TRIES:
            raise refusal(f"这个地址一分钟内错了 {TRIES} 次，请过一分钟再试")
        known = accounts.get(user, "")
        if known and hmac.compare_digest(known.encode(), password.encode()):
            return True
        failures.setdefault(address, []).append(now)
        return False

    return login


class Guard:
    """ASGI middleware: notes the address of a request, and refuses uploads above max_upload_mb in Chinese."""

    def __init__(self, app, max_upload_mb):
        self.app, self.max_upload_mb = app, max_upload_mb

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        ADDRESS.set((scope.get("client") or (None,))[0])
        length = dict(scope["headers"]).get(b"content-length", b"")
        most = self.max_upload_mb * 2**20 + FORM_BYTES
        if scope["method"] == "POST" and not (length.isdigit() and int(length) <= most):
            status, said = 413, f"文件超过 {self.max_upload_mb} MB，没有接受（max_upload_mb）"
            if not length:
                status, said = 411, "请求要有 Content-Length"
            while (await receive()).get("more_body"):  # a browser reads the answer only when all is sent
                pass
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": said.encode()})
            return
        await self.app(scope, receive, send)
