"""What `--ray` takes, and what a cluster has room for."""

from __future__ import annotations

import socket

import pytest

from gazeguard import cluster
from gazeguard.cluster import Ray, Workers, connected
from gazeguard.errors import MissingExtra, UsageError


@pytest.mark.parametrize(
    "address", ["", "auto", "local", "10.0.0.1:6379", "ray://head.example:10001", "[::1]:6379"]
)
def test_addresses_of_ray(address: str) -> None:
    assert Ray(address).address == address


@pytest.mark.parametrize("address", ["model", "data.json", "org/model", "ray://", "http://a:1"])
def test_a_swallowed_argument_is_told_from_an_address(address: str) -> None:
    with pytest.raises(UsageError, match="--ray as the last word"):
        Ray(address)


@pytest.mark.parametrize(
    ("asked", "there", "given"),
    [
        (Ray(), {"CPU": 4.0}, Workers(4, 1, 0.0)),
        (Ray(cpus=2), {"CPU": 5.0}, Workers(2, 2, 0.0)),
        (Ray(workers=3), {"CPU": 4.0}, Workers(3, 1, 0.0)),
        (Ray(), {"CPU": 16.0, "GPU": 2.0}, Workers(2, 1, 1.0)),
        (Ray(gpus=0.5), {"CPU": 16.0, "GPU": 2.0}, Workers(4, 1, 0.5)),
        (Ray(gpus=0), {"CPU": 3.0, "GPU": 2.0}, Workers(3, 1, 0.0)),
    ],
)
def test_workers_that_fit(asked: Ray, there: dict[str, float], given: Workers) -> None:
    assert cluster._workers(asked, there) == given
    assert given.resources == {"num_cpus": given.cpus, "num_gpus": given.gpus}


@pytest.mark.parametrize("asked", [Ray(workers=5), Ray(cpus=8), Ray(gpus=1)])
def test_a_cluster_that_is_too_small_is_one_sentence(asked: Ray) -> None:
    with pytest.raises(UsageError, match="ask for fewer or smaller"):
        cluster._workers(asked, {"CPU": 4.0})


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"cpus": 0}, {"gpus": -1}])
def test_impossible_workers(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Ray(**wrong)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"gazeguard\[ray\]"), connected(Ray()):
        pass


def test_an_address_where_nobody_listens_is_one_sentence() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with (
            pytest.raises(UsageError, match="cannot be reached"),
            connected(Ray(f"127.0.0.1:{port}")),
        ):
            pass
