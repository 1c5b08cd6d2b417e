from __future__ import annotations

import pytest
import trio
import trio.testing

from host_agent import guest_process
from protocol import execio
from protocol.api import Exec, Target
from protocol.errors import LinkError

TARGET = Exec(["cat"], user="root")


async def test_a_program_is_given_its_input_and_heard_to_its_end(nursery: trio.Nursery) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    heard: list[tuple[bytes, bool]] = []
    dialled: list[Target] = []

    async def dial(target: Target) -> trio.StapledStream:  # type: ignore[type-arg]
        await trio.lowlevel.checkpoint()
        dialled.append(target)
        return ours

    async def serve() -> None:
        decoder, got = execio.Decoder(), b""
        while True:
            for packet in decoder.receive_data(bytes(await theirs.receive_some())):
                if isinstance(packet, execio.StdinEof):
                    out = execio.encode(execio.Stdout(got[:3])) + execio.encode(execio.Stderr(b"e"))
                    await theirs.send_all(out + execio.encode(execio.Exit(len(got) % 256)))
                    return
                assert isinstance(packet, execio.Stdin)
                got += packet.data

    nursery.start_soon(serve)
    stdin = b"x" * (2 * execio.MAX_DATA + 7)
    status = await guest_process.run(dial, TARGET, lambda *said: heard.append(said), stdin)
    assert (status, heard, dialled) == (7, [(b"xxx", False), (b"e", True)], [TARGET])


async def test_one_that_is_cut_off_has_not_ended() -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def dial(target: Target) -> trio.StapledStream:  # type: ignore[type-arg]
        await theirs.send_all(execio.encode(execio.Stdout(b"begun")))
        await theirs.send_eof()
        return ours

    with pytest.raises(LinkError, match="has not said"):
        await guest_process.run(dial, TARGET)
