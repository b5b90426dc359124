# Needs: /usr/lib/python3/dist-packages/websockets /usr/lib/python3/dist-packages/websocket

# Echoes messages; to one that is a number, also says `late` after so many seconds. A visitor who is busy
# with other things on a busy machine may be late with a pong, unless that is what the case is about.
serve() {
    local patience=60
    [[ $1 != silence ]] || patience=5
    PATIENCE=$patience exec /usr/bin/python3 - << 'END'
import asyncio, os, websockets

async def serve(socket):
    try:
        async for message in socket:
            await socket.send(message)
            if isinstance(message, str) and message.isdigit():
                await asyncio.sleep(int(message))
                await socket.send("late")
    finally:
        print("closed", socket.close_code, flush=True)

async def main():
    host, port = os.environ["LOCAL_HOST"], int(os.environ["LOCAL_PORT"])
    pings = {"ping_interval": 1, "ping_timeout": int(os.environ["PATIENCE"])}
    async with websockets.serve(serve, host, port, max_size=None, **pings):
        await asyncio.Future()

asyncio.run(main())
END
}

# Runs what is on its standard input, with a `connect()`.
_client() {
    /usr/bin/python3 -c "import os, websocket
def connect(): return websocket.create_connection('ws://' + os.environ['AT'], timeout=90)
$(cat)"
}

messages() {
    _client << 'END'
socket = connect()
for size in [0, 1, 125, 126, 65535, 65536, 1000000, 20000000]:
    message = os.urandom(size)
    socket.send_binary(message)
    assert socket.recv() == message
socket.send("text, für alle")
assert socket.recv() == "text, für alle"
END
}

# The service pings each second, and closes if no pong comes.
silence() {
    SILENCE=$(size 8 60) _client << 'END'
socket, silence = connect(), os.environ["SILENCE"]
socket.send(silence)
assert socket.recv() == silence
assert socket.recv() == "late"
END
}

close_with_a_code() {
    _client << 'END'
connect().close(status=4321)
END
    eventually grep '^closed 4321' serve*.output
}

two_hundred_at_once() {
    _client << 'END'
sockets = [connect() for _ in range(200)]
for round in range(10):
    for number, socket in enumerate(sockets):
        socket.send(f"round {round}, number {number}")
    for number, socket in enumerate(sockets):
        assert socket.recv() == f"round {round}, number {number}"
END
}
