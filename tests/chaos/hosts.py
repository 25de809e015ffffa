"""Two hosts on one machine: network namespaces on a bridge of their own, and what can befall it.

Nothing shows in the machine's own network. The hosts share its disk, its clock and its cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .processes import Place

RELAY = Path(__file__).with_name("relay.py")
RELAY_PORT = 7070
RELAY_MARK = 7
NETWORK = "10.94.7"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Two namespaces, `one` and `two`, with an `eth0` each, and the one that the bridge is in."""

    one: str
    two: str
    switch: str

    def places(self) -> dict[str, Place]:
        """Return how to start a command on each host."""
        return {
            name: Place(
                prefix=("ip", "netns", "exec", name),
                launcher=(
                    *("--rdzv-backend=c10d", f"--rdzv-endpoint={NETWORK}.1:29400"),
                    # Which host keeps the rendezvous cannot be told by names that none resolves.
                    f"--rdzv-conf=is_host={number == 1},last_call_timeout=5,read_timeout=20",
                    *("--local-addr", f"{NETWORK}.{number}"),
                ),
            )
            for number, name in enumerate((self.one, self.two), start=1)
        }

    def cut_off_two(self, *, is_cut: bool) -> None:
        """Take the cable of host two out, or put it back."""
        run("ip", "-n", self.switch, "link", "set", "port2", "down" if is_cut else "up")

    def limit_bandwidth(self, rate: str) -> None:
        """Let each host send so much and no more; tc's token bucket."""
        for name in (self.one, self.two):
            bucket = ("tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
            run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *bucket)

    def free_bandwidth(self) -> None:
        for name in (self.one, self.two):
            run("tc", "-n", name, "qdisc", "del", "dev", "eth0", "root")

    def lose_packets(self, share: float) -> None:
        """Drop so many of the packets that come in, at random."""
        dice = ("-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        for name in (self.one, self.two):
            run("ip", "netns", "exec", name, "iptables", "-A", "INPUT", "-i", "eth0", *dice)

    def lose_none(self) -> None:
        for name in (self.one, self.two):
            run("ip", "netns", "exec", name, "iptables", "-F", "INPUT")

    @contextmanager
    def delay(self, seconds: float) -> Iterator[None]:
        """Let every TCP connection that a host opens go through a relay that holds bytes back.

        Source: netfilter's REDIRECT; the relay asks for the address that was meant. Connections
        that are open already go on as they are.
        """
        relays = []
        for name in (self.one, self.two):
            within = ("ip", "netns", "exec", name)
            arguments = [str(RELAY), str(RELAY_PORT), str(RELAY_MARK), str(seconds)]
            relays.append(subprocess.Popen([*within, sys.executable, *arguments]))
            rule = ("-p", "tcp", "-d", f"{NETWORK}.0/24", "-m", "mark", "!", "--mark")
            to = (str(RELAY_MARK), "-j", "REDIRECT", "--to-ports", str(RELAY_PORT))
            run(*within, "iptables", "-t", "nat", "-A", "OUTPUT", *rule, *to)
        try:
            yield
        finally:
            for relay in relays:
                relay.kill()
                relay.wait()


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts and remove them. Raises: OSError if that is not allowed here."""
    names = [f"trimtab-{os.getpid()}-{part}" for part in ("one", "two", "switch")]
    hosts = Hosts(one=names[0], two=names[1], switch=names[2])
    try:
        run("ip", "netns", "add", hosts.switch)
        run("ip", "-n", hosts.switch, "link", "add", "br0", "type", "bridge", "forward_delay", "0")
        run("ip", "-n", hosts.switch, "link", "set", "br0", "up")
        for number, name in enumerate((hosts.one, hosts.two), start=1):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
            pair = ("type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "-n", hosts.switch, "link", "add", f"port{number}", *pair)
            run("ip", "-n", hosts.switch, "link", "set", f"port{number}", "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def run(*command: str) -> None:
    """Run a command. Raises: OSError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
