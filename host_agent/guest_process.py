"""A program of the guest that the host agent itself runs, to its end."""

from __future__ import annotations

from collections.abc import Callable

import trio

from host_agent.forwarders import Dial
from protocol import execio
from protocol.api import Exec
from protocol.errors import LinkError

CHUNK = 64 * 1024

#: What a program writes, as it comes; and whether on its standard error.
OnOutput = Callable[[bytes, bool], None]


def unheard(output: bytes, is_error: bool) -> None:
    """For a program of which only the end is of interest."""


async def run(dial: Dial, target: Exec, on_output: OnOutput = unheard, stdin: bytes = b"") -> int:
    """Run ``target`` with ``stdin`` as its whole input; its exit status, as a shell would report it.

    Raises what ``dial`` raises, ``LinkError`` or ``trio.BrokenResourceError`` if it is cut off, and ``DecodeError`` for
    nonsense. Who is cancelled takes the program along.
    """
    async with await dial(target) as stream:
        for start in range(0, len(stdin), execio.MAX_DATA):
            await stream.send_all(execio.encode(execio.Stdin(stdin[start : start + execio.MAX_DATA])))
        await stream.send_all(execio.encode(execio.StdinEof()))
        decoder = execio.Decoder()
        while data := await stream.receive_some(CHUNK):
            for packet in decoder.receive_data(bytes(data)):
                match packet:
                    case execio.Stdout(content):
                        on_output(content, False)
                    case execio.Stderr(content):
                        on_output(content, True)
                    case execio.Exit(code):
                        with trio.CancelScope(shield=True):
                            await stream.send_eof()
                        return code
    raise LinkError("the guest has not said how the program ended")
