"""The interface of gloo: the one that reaches the master, also on hosts whose name resolves to 127.0.1.1."""

from types import SimpleNamespace

import psutil
import pytest

from tmass_dist import distributed, network


def test_the_loopback_interface_has_all_loopback_addresses() -> None:
    own, peer = network.addresses_towards("127.0.0.1", 29500)
    assert network.is_loopback(own) and peer == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == network.interface_of("127.0.1.1") == "lo"
    assert network.interface_of("192.0.2.7") is None  # an address of documentation: no host has it


def test_an_unknown_name_is_an_os_error() -> None:
    with pytest.raises(OSError):
        network.addresses_towards("no-such-host.invalid", 29500)


class Store(dict):
    """A key-value store whose values are bytes, as those of torch."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        # Rank 0 is on the master's host, whose own name resolves to loopback; rank 1 reaches it through eth1.
        ([("127.0.0.1", "127.0.1.1"), ("10.0.0.6", "10.0.0.5")], ["eth1", "eth0"]),
        ([("10.0.0.5", "10.0.0.5"), ("10.0.0.6", "10.0.0.5")], ["eth1", "eth0"]),
        ([("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")], ["lo", "lo"]),
    ],
    ids=["name is loopback", "name is an address", "one host"],
)
def test_all_ranks_choose_the_interface_by_which_they_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, routes: list[tuple[str, str]], expected: list[str]
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that monkeypatch removes it in the end
    interfaces = [{"lo": "127.0.0.1", "eth1": "10.0.0.5"}, {"lo": "127.0.0.1", "eth0": "10.0.0.6"}]
    store = Store({"address/1": routes[1][1].encode()})  # rank 0 would wait for it
    for rank, (route, addresses) in enumerate(zip(routes, interfaces)):
        entries = {name: [SimpleNamespace(address=address)] for name, address in addresses.items()}
        monkeypatch.setattr(psutil, "net_if_addrs", lambda entries=entries: entries)
        monkeypatch.setattr(distributed, "addresses_towards", lambda host, port, route=route: route)
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        distributed._choose_interface(store, rank, 2)
        assert distributed.os.environ["GLOO_SOCKET_IFNAME"] == expected[rank]


def test_a_chosen_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    distributed._choose_interface(Store(), 0, 2)
    assert distributed.os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
