"""The destination's engine as a process of its own, to be killed by the tests.

Arguments: pid, address and length of the memory to fill. Prints its port; reads the credentials and
the number of streams as a JSON line.
"""

from __future__ import annotations

import json
import socket
import sys

from vmferry import _core as core


def main() -> None:
    pid, address, length = (int(argument) for argument in sys.argv[1:4])
    order = json.loads(sys.stdin.readline())
    pem = {name: order[name].encode() for name in ("certificate", "key", "peer")}
    credentials = core.Credentials(pem["certificate"], pem["key"], [pem["peer"]])
    bulk, urgent = [], []
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(server.getsockname()[1], flush=True)
        for _ in range(order["streams"]):
            accepted, _ = server.accept()
            _, is_urgent, stream = core.Stream.accept(accepted.detach(), credentials)
            (urgent if is_urgent else bulk).append(stream)
    memory = core.Memory(pid, [core.Block("ram", address, length)])
    receiver = core.Receiver(memory, bulk, urgent[0])
    print("receiving", flush=True)
    receiver.wait()


if __name__ == "__main__":
    main()
