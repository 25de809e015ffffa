"""A small proxy that makes a network slow to answer: `relay.py PORT MARK SECONDS`.

Each connection that netfilter redirects to PORT is passed on to the address that was meant, and
what either side says arrives SECONDS later, in order. Its own connections carry MARK, so that they
are not redirected again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from functools import partial

_ORIGINAL_DESTINATION = 80  # SO_ORIGINAL_DST of linux/netfilter_ipv4.h
_NUM_BYTES = 1 << 16


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Pass on what comes, each part `seconds` after it came."""
    loop = asyncio.get_running_loop()
    parts: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=4096)

    async def deliver() -> None:
        while True:
            due, part = await parts.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not part:
                writer.write_eof()
                return
            writer.write(part)
            await writer.drain()

    delivery = asyncio.create_task(deliver())
    with contextlib.suppress(ConnectionError, OSError):
        while part := await reader.read(_NUM_BYTES):
            await parts.put((loop.time() + seconds, part))
    await parts.put((loop.time() + seconds, b""))
    with contextlib.suppress(ConnectionError, OSError):
        await delivery


async def _serve(
    mark: int, seconds: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    client = writer.get_extra_info("socket")
    meant = client.getsockopt(socket.SOL_IP, _ORIGINAL_DESTINATION, 16)
    port, host = struct.unpack("!2xH4s8x", meant)
    onward = socket.socket()
    onward.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    onward.setblocking(False)
    try:
        address = (socket.inet_ntoa(host), port)
        await asyncio.get_running_loop().sock_connect(onward, address)
    except OSError:
        writer.close()
        return
    for end in (client, onward):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    far_reader, far_writer = await asyncio.open_connection(sock=onward)
    await asyncio.gather(_pump(reader, far_writer, seconds), _pump(far_reader, writer, seconds))
    for end in (writer, far_writer):
        end.close()


async def relay(port: int, mark: int, seconds: float) -> None:
    """Serve until the process is ended."""
    server = await asyncio.start_server(partial(_serve, mark, seconds), "0.0.0.0", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
