"""A dockerd that says what it is told to, on a socket of its own: what of its API a view asks for."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any


class Dockerd:
    """``answers`` by path; others are 404. ``tell`` sends an event to who listens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {
            "/volumes": {"Volumes": []},
            "/containers/json?all=1": [],
            "/images/json": [],
        }
        self.asked: list[str] = []
        self.listening: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Dockerd:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._listener.close()
        with self._lock:
            for connection in self.listening:
                connection.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            if not (data := connection.recv(4096)):
                connection.close()
                return
            request += data
        path = request.split(b" ")[1].decode()
        if path.startswith("/events?"):
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
            with self._lock:
                self.listening.append(connection)
            return
        self.asked.append(path)
        answer = self.answers.get(path)
        head, body = b"HTTP/1.0 404 Not Found\r\n\r\n", b"{}"
        if answer is not None:
            head = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with connection:
            connection.sendall(head + body)

    def tell(self) -> None:
        with self._lock:
            for connection in self.listening:
                connection.sendall(b'{"status":"start"}\n')

    # --- what there is -------------------------------------------------------------------------------

    def volume(self, name: str, path: str) -> None:
        self.answers["/volumes"]["Volumes"].append({"Name": name, "Mountpoint": path})

    def container(self, number: int, name: str, state: str, merged: str, *layers: str) -> str:
        id = f"{number:064x}"
        self.answers["/containers/json?all=1"].append({"Id": id, "Names": [f"/{name}"], "State": state})
        data = {"MergedDir": merged, "UpperDir": layers[0], "LowerDir": ":".join(layers[1:])}
        self.answers[f"/containers/{id}/json"] = {"GraphDriver": {"Name": "overlay2", "Data": data}}
        return id

    def image(self, number: int, *tags: str, layers: tuple[str, ...]) -> None:
        id = f"sha256:{number:064x}"
        self.answers["/images/json"].append({"Id": id, "RepoTags": list(tags)})
        data = {"UpperDir": layers[0], "LowerDir": ":".join(layers[1:])}
        self.answers[f"/images/sha256%3A{number:064x}/json"] = {
            "GraphDriver": {"Name": "overlay2", "Data": data}
        }
