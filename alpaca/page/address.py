"""The address of the page: who can open it, and whether it is free."""

import ipaddress
import os
import socket

from alpaca.common.errors import UserError


def check_address(args, accounts):
    """UserError where others could open the page without a password, and where the address is not free."""
    if not 0 < args.port < 65536:
        raise UserError(f"--port={args.port}: expected 1 to 65535")
    try:
        is_own = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        raise UserError(f"--host={args.host}: expected an IP address, e.g. 0.0.0.0 for all of this machine's") from None
    if not is_own and not accounts:
        raise UserError(f"--host={args.host}: others could use the page; give --auth=FILE as well")
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        socket.create_server((args.host, args.port), family=family).close()
    except OSError as error:
        remedy = "name another port, e.g. --port=7861"
        raise UserError(f"--host={args.host} --port={args.port}: {os.strerror(error.errno)}; {remedy}") from None
