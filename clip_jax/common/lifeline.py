"""The lifeline of the hosts of a run: when one ends before its time, the others end too.

Each host keeps a TCP connection to the first. A host that fails says why before it ends. Where a
process is killed, its kernel closes the connection; where a machine vanishes, keep-alive packets
are not answered. Neither waits for Python, which may be busy on either side. Without it, the others
would wait for a collective, or JAX would end them by a signal and a stack of C++.

A frozen process keeps its connections. JAX misses its heartbeat, but does not tell whose: the first
host then asks all others for a report. The watchdog of a run collects its reports in the same way.

Messages are lines of JSON: {"ask": true}, and to it {"report": ...}; {"stalled": true} from a host
whose run hangs, and to it {"wait": true}; {"code": ..., "text": ...} are the news of an end.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NoReturn

from clip_jax.errors import ExitCode, NotJoined

_GONE_AFTER = 30  # seconds without an answer of a host's kernel
_NEWS_WITHIN = 3.0  # seconds in which news of another host's end come
_ANSWER_WITHIN = 4.0  # seconds in which a host that runs answers the first
_LINGER = 5.0  # seconds that the first host, which serves JAX's clients, waits for them to end
_LEAVE_WITHIN = 30.0  # seconds that a process has to end, even if a disk or a pipe hangs
_CONNECT_WITHIN = 60.0  # seconds
_KEY = "clip_jax/lifeline"
_DONE = b"done\n"


class Lifeline:
    """The connections of this host: those of all others on the first, on the others one to it."""

    def __init__(self, process: int, processes: int, first: str, store: Any):
        """Connects the hosts; all of them call it.

        Args:
          process: number of this host.
          processes: number of hosts.
          first: name or address of the first host.
          store: JAX's distributed client, by which the first host tells its port.
        """
        self._process = process
        self._links: dict[int, socket.socket] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._ending = threading.Lock()
        self._said: int | None = None  # exit code of this host's own end, once said
        self._finished = False  # all hosts are done
        self._sending = threading.Lock()
        self._reports: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._told_to_wait = threading.Event()
        if process == 0:
            self._accept(processes, store)
        else:
            port, token, wanted = store.blocking_key_value_get(
                _KEY, int(1000 * _CONNECT_WITHIN)
            ).split()
            link = socket.create_connection((first, int(port)), timeout=_CONNECT_WITHIN)
            link.sendall(f"{token} {process} {processes}\n".encode())
            if processes != int(wanted):
                raise NotJoined(_other_count(process, processes, int(wanted)))
            self._watch(0, link, link.makefile("rb"))

    def _accept(self, processes: int, store: Any) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(
            ("", 0), family=family, backlog=processes, dualstack_ipv6=dual
        ) as server:
            token = secrets.token_hex()  # strangers may connect too
            store.key_value_set(_KEY, f"{server.getsockname()[1]} {token} {processes}")
            deadline = time.monotonic() + _CONNECT_WITHIN
            while len(self._links) < processes - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                link, _ = server.accept()
                link.settimeout(_CONNECT_WITHIN)
                lines = link.makefile("rb")
                said, number, count = lines.readline().split() or (b"", 0, 0)
                if not secrets.compare_digest(said, token.encode()):
                    continue
                if int(count) != processes:
                    text = _other_count(int(number), int(count), processes)
                    self.end({"code": int(ExitCode.USER_ERROR), "text": text})
                self._watch(int(number), link, lines)

    def _watch(self, host: int, link: socket.socket, lines: IO[bytes]) -> None:
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # Linux
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _GONE_AFTER // 3)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _GONE_AFTER // 6)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
            # While sent data are not acknowledged, no keep-alive packets are sent.
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _GONE_AFTER)
        self._links[host] = link
        thread = threading.Thread(
            target=self._listen, args=(host, lines), name="lifeline", daemon=True
        )
        self._threads[host] = thread
        thread.start()

    def _listen(self, host: int, lines: IO[bytes]) -> None:
        while True:
            line = b""
            with contextlib.suppress(OSError):
                line = lines.readline()
            if line == _DONE:
                return
            message = json.loads(line) if line.endswith(b"\n") else _gone(host)
            if "ask" in message:  # in a thread of its own, since it may hang with the run
                threading.Thread(target=self._answer, name="report", daemon=True).start()
            elif "report" in message:
                with self._changed:
                    self._reports[host] = message["report"]
                    self._changed.notify_all()
            elif "stalled" in message:
                for hook in _on_stalled:
                    hook()
                if not _on_stalled:  # at work before or behind the steps, which has no limit
                    self.reassure()
            elif "wait" in message:
                self._told_to_wait.set()
            else:
                self.end(message)

    def _answer(self) -> None:
        self._send(0, {"report": _describe[-1]()})

    def _send(self, host: int, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._sending:
            self._links[host].sendall(json.dumps(message).encode() + b"\n")

    def collect(self) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Asks all other hosts for a report; the first host does.

        Returns:
          The reports by host, this one's too; and the hosts that do not answer.
        """
        with self._changed:
            self._reports = {0: _describe[-1]()}
        for host in self._links:
            self._send(host, {"ask": True})
        with self._changed:
            everyone = len(self._links) + 1
            self._changed.wait_for(lambda: len(self._reports) == everyone, _ANSWER_WITHIN)
            reports = dict(sorted(self._reports.items()))
        return reports, sorted(self._links.keys() - reports.keys())

    def complain(self) -> bool:
        """Tells the first host that the run hangs; returns whether it answers that this is right.

        If it finds that the run hangs, it ends all hosts.
        """
        self._told_to_wait.clear()
        self._send(0, {"stalled": True})
        return self._told_to_wait.wait(3 * _ANSWER_WITHIN)

    def reassure(self) -> None:
        """Tells all other hosts that the run does not hang; the first host does."""
        for host in self._links:
            self._send(host, {"wait": True})

    def lost(self) -> None:
        """Ends this process because JAX's heartbeat is missed, by which host it does not tell."""
        if self._process:
            time.sleep(2 * _ANSWER_WITHIN)  # in which the first host finds out
            self.end(_gone(0))
            return
        silent = self.collect()[1]
        who = f"Host {', '.join(map(str, silent))} does not answer" if silent else "Contact is lost"
        again = "start the same command again on every host to resume."
        text = f"{who}, as if its process or machine were frozen: {again}"
        self.end({"code": int(ExitCode.RESUME), "text": text if silent else f"{who}: {again}"})

    def end(self, news: dict[str, Any]) -> None:
        """Ends this process because of another host; only the first news do."""
        if not self._ending.acquire(blocking=False):
            return
        if self._said is None or news["code"] != self._said:
            print(f"\n{news['text']}", file=sys.stderr, flush=True)
        self._tell(news)
        _leave(news["code"], news["text"])

    def fail(self, text: str, code: int) -> None:
        """Tells the other hosts that this one ends, unless one of them is why, and ends it.

        Does nothing once all hosts are done.
        """
        self._said = code
        if self._finished:
            return
        time.sleep(_NEWS_WITHIN)
        if not self._ending.acquire(blocking=False):
            time.sleep(2 * _LINGER)  # another thread ends this process
        text = f"Host {self._process} has ended, so this one ends too. It says: {text}"
        self._tell({"code": code, "text": text})
        sys.stdout.flush()
        os._exit(code)  # an ordinary exit would wait for hosts that wait for this one

    def _tell(self, news: dict[str, Any]) -> None:
        for host in self._links:
            self._send(host, news)
        deadline = time.monotonic() + _LINGER
        for thread in self._threads.values() if self._process == 0 else ():
            if thread is not threading.current_thread():
                thread.join(max(deadline - time.monotonic(), 0.0))

    def finish(self) -> None:
        """Waits until every host is done."""
        if self._process:
            self._links[0].sendall(_DONE)
        for thread in self._threads.values():
            thread.join()
        if not self._process:
            for link in self._links.values():
                with contextlib.suppress(OSError):
                    link.sendall(_DONE)
        self._ending.acquire(blocking=False)  # what comes now is no news
        self._finished = True


_lifeline: Lifeline | None = None
_hooks: list[Callable[[int, str], None]] = []
_on_stalled: list[Callable[[], None]] = []
_describe: list[Callable[[], dict[str, Any]]] = [dict]  # the last one counts
_kept: list[Any] = []  # what C++ calls must not be collected


def start(process: int, processes: int, first: str, store: Any) -> None:
    """Connects the hosts; arguments as in `Lifeline`."""
    global _lifeline
    _lifeline = Lifeline(process, processes, first, store)


@contextlib.contextmanager
def on_end(hook: Callable[[int, str], None]) -> Iterator[None]:
    """Calls a function with exit code and text if another host ends this process in the body."""
    _hooks.append(hook)
    try:
        yield
    finally:
        _hooks.remove(hook)


@contextlib.contextmanager
def reporting(
    describe: Callable[[], dict[str, Any]], on_stalled: Callable[[], None]
) -> Iterator[None]:
    """Makes this host's reports while its body runs.

    Args:
      describe: returns what this host is doing, for JSON.
      on_stalled: called on the first host when another one finds that the run hangs.
    """
    _describe.append(describe)
    _on_stalled.append(on_stalled)
    try:
        yield
    finally:
        _describe.remove(describe)
        _on_stalled.remove(on_stalled)


def connected() -> Lifeline | None:
    """Returns the connections to the other hosts; None: there are none."""
    return _lifeline


def end(text: str, code: int) -> None:
    """Ends this process and the other hosts at once, without waiting for its threads."""
    if _lifeline is not None:
        _lifeline.end({"code": int(code), "text": text})
        time.sleep(2 * _LINGER)  # another thread ends this process
    print(f"\n{text}", file=sys.stderr, flush=True)
    _leave(code, text)


def _leave(code: int, text: str) -> NoReturn:
    timer = threading.Timer(_LEAVE_WITHIN, os._exit, (code,))
    timer.daemon = True
    timer.start()
    for hook in _hooks:
        hook(code, text)
    for child in multiprocessing.active_children():  # a frozen one would not notice
        child.kill()
    sys.stdout.flush()
    os._exit(code)


def joined() -> bool:
    """Returns whether this process is one of several hosts."""
    return _lifeline is not None


def await_news() -> None:
    """Waits as long as news of another host's end may take, which end this process."""
    if _lifeline is not None:
        time.sleep(_NEWS_WITHIN)


def fail(text: str, code: Any) -> None:
    """Tells the other hosts why this one ends, and ends it; does nothing without others."""
    if _lifeline is not None:
        _lifeline.fail(text, code if isinstance(code, int) else int(bool(code)))


def finish() -> None:
    """Waits until every host is done."""
    if _lifeline is not None:
        _lifeline.finish()


def on_lost_service() -> Callable[..., None]:
    """Returns a callback for JAX's client, called when it has lost the first host.

    JAX's own callback aborts the process with a stack. jaxlib 0.10 cannot convert the argument of
    one in Python: the C++ exception that comes of it ends in the terminate handler set here.
    """

    def lost(*_: Any) -> None:
        if _lifeline is None:
            os._exit(ExitCode.RESUME)
        _lifeline.lost()
        time.sleep(2 * _LINGER)  # another thread ends this process, or it is at its end anyway
        os._exit(_lifeline._said or ExitCode.DONE)

    with contextlib.suppress(OSError, AttributeError):  # a C++ library of another name
        handler = ctypes.CFUNCTYPE(None)(lost)
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(handler)
        _kept.append(handler)
    return lost


def _other_count(process: int, processes: int, first: int) -> str:
    return (
        f"Host {process} was started with --processes={processes}, host 0 with "
        f"--processes={first}: give every host the same number, that of all hosts."
    )


def _gone(host: int) -> dict[str, Any]:
    text = f"Host {host} is gone: start the same command again on every host to resume."
    return {"code": int(ExitCode.RESUME), "text": text}
