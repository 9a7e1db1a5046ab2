"""An MCP server that misbehaves, in few lines and without the mcp package: ``python mcp_rogue.py HOW [FILE]``.

FILE gets a line for each call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import count
from typing import Any

HOW, FILE = sys.argv[1], (sys.argv[2:] or [os.devnull])[0]
HINTS: dict[str, dict[str, bool]] = {"look": {"readOnlyHint": True}, "put": {"idempotentHint": True}, "add": {}}
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"how": {"type": "string", "pattern": "(a+)+$"}}}


def send(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)


def tools(cursor: str | None) -> dict[str, Any]:
    listed = [{"name": name, "inputSchema": SCHEMA, "annotations": hints} for name, hints in HINTS.items()]
    if HOW == "lists without end":
        page = int(cursor or 0)
        return {"tools": [{"name": f"t{page}", "inputSchema": SCHEMA}], "nextCursor": str(page + 1)}
    if HOW == "lists empty pages":
        return {"tools": [], "nextCursor": "again"}
    if HOW == "changes its list" and os.path.exists(FILE):
        return {"tools": listed[:1]}
    if HOW == "refers to itself":
        listed[0]["inputSchema"] = {"type": "object", "properties": {}, "allOf": [{"$ref": "#"}]}
    if HOW == "refers a billion times":
        many = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
        listed[0]["inputSchema"] = {"type": "object", "properties": {"x": {"$ref": "#/$defs/d0"}},
                                    "$defs": {**many, "d30": {}}}  # fmt: skip
    return {"tools": listed}


def call(name: str, how: str) -> str:
    with open(FILE, "a+") as calls:
        calls.write(f"{name}\n")
        calls.seek(0)
        earlier = len(calls.readlines()) - 1
    if how == "die" or (how == "die once" and earlier == 0):
        os._exit(3)
    if how == "huge":
        sys.stdout.write('{"jsonrpc": "2.0", "id": 1, "result": "')
        for _ in range(20):
            sys.stdout.write("x" * (1 << 20))
        sys.stdout.flush()
    if how == "leave a process":
        return str(subprocess.Popen(["sleep", "600"]).pid)
    if how == "secret in garbage":
        print("no message:", os.environ["ROGUE_KEY"], flush=True)
    if how == "stop reading":
        send({"id": 1_000, "method": "ping"})
        time.sleep(60)
    return f"{name} {os.getpid()}"


def main() -> None:
    if HOW == "writes garbage without end":
        for number in count():
            print("no message", number)
    if HOW == "writes a line without end":
        while True:
            sys.stdout.write("x" * 65536)
    if HOW == "prints a banner":
        print("Welcome!\n\n{}\n[1, 2]\n\udcff", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        method, params = request["method"], request.get("params", {})
        if HOW == "is silent" or "id" not in request:
            continue
        if method == "initialize":
            result: dict[str, Any] = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                                      "serverInfo": {"name": "rogue", "version": "1"}}  # fmt: skip
        elif method == "tools/list":
            result = tools(params.get("cursor"))
        elif method == "tools/call":
            text = call(params["name"], params["arguments"].get("how", ""))
            result = {"content": [{"type": "text", "text": text}]}
        else:
            send({"id": request["id"], "error": {"code": -32601, "message": f"no method {method}"}})
            continue
        send({"id": request["id"], "result": result})


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    main()
