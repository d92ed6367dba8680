"""The processes of a run: how they meet, what they hear of each other, and what Slurm says of them."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunekit import ranks, running
from tunekit.errors import ConfigError, DataError, DeviceError, TunekitError
from tunekit.launch import Place
from tunekit.nodes import choose
from tunekit.ranks import Company, Elsewhere, End, Member


class Store:
    """What torch's has, in one process."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.news = threading.Condition()

    def set(self, key: str, value: str) -> None:
        with self.news:
            self.held[key] = value.encode()
            self.news.notify_all()

    def wait(self, keys: list[str], seconds: timedelta = timedelta(seconds=10)) -> None:
        with self.news:
            there = self.news.wait_for(lambda: set(keys) <= self.held.keys(), seconds.total_seconds())
        if not there:
            raise RuntimeError(f"wait timeout, keys: {keys}")

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self.held[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]


def together(work: Any, companies: list[Company]) -> list[Any]:
    """What `work(company)` gives or raises for each, all at once."""
    found: list[Any] = [None] * len(companies)

    def one(company: Company) -> None:
        try:
            found[company.rank] = work(company)
        except TunekitError as error:
            found[company.rank] = error

    threads = [threading.Thread(target=one, args=(company,)) for company in companies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Company]]:
    """Four processes on two machines."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv(ranks.DRIVEN, raising=False)
    store = Store()
    companies = [Company(rank, 4, store, "tunekit/0") for rank in range(4)]
    together(Company._open, companies)
    for company in companies:
        company.members = [Member(rank, "ab"[rank // 2], f"node-{'ab'[rank // 2]}") for rank in range(4)]
    yield companies
    for company in companies:
        company._parted = True


def wait_for_end(company: Company) -> Elsewhere:
    found = company.ended(10)
    assert found is not None
    return found


def test_all_know_what_each_has_said(met: list[Company]) -> None:
    assert (
        together(lambda company: company.share([company.rank, "é"]), met)
        == [[[rank, "é"] for rank in range(4)]] * 4
    )
    assert together(lambda company: company.share(company.rank * 2), met) == [[0, 2, 4, 6]] * 4


def test_what_is_wrong_with_one_ends_all_and_is_said_once_where_it_is_seen(met: list[Company]) -> None:
    def look(company: Company) -> Any:
        wrong = DataError("no such folder", where="photos", hint="copy it") if company.rank == 2 else None
        return company.agree(wrong, {"rank": company.rank})

    found = together(look, met)
    assert isinstance(found[2], DataError)
    for rank in (0, 1, 3):
        assert isinstance(found[rank], Elsewhere)
        assert str(found[rank]) == "rank 2 on node-b: photos: no such folder\ncopy it"
        assert found[rank].exit_code == 2
    assert [company.spokesman for company in met] == [2] * 4
    assert [found[rank].speaks for rank in (0, 1, 3)] == [True, True, False]  # it is said on its own machine


def test_a_process_that_is_gone_ends_the_run_on_all(met: list[Company]) -> None:
    met[0].remember("runs/x/checkpoints/step-000020")
    met[2]._peers[0].shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    met[3]._peers[0].shutdown(socket.SHUT_RDWR)
    began = time.monotonic()
    for company in met[:2]:
        error = wait_for_end(company)
        assert error.message == "ranks 2 and 3 on node-b have gone: killed, or the machine is lost"
        assert error.hint == (
            "the last checkpoint is runs/x/checkpoints/step-000020; give the same command again to continue,"
            " in as many processes as there are now"
        )
        assert (error.exit_code, error.speaks) == (1, True)
    assert time.monotonic() - began < 5


def test_the_first_one_that_is_gone_is_missed_by_all_others(met: list[Company]) -> None:
    for connection in list(met[0]._peers.values()):
        connection.shutdown(socket.SHUT_RDWR)
    for company in met[1:]:
        error = wait_for_end(company)
        assert error.message == "rank 0 on node-a has gone: killed, or the machine is lost"
        assert error.hint and error.hint.startswith("there was no checkpoint yet")


def test_who_says_why_it_ends_is_quoted(met: list[Company]) -> None:
    met[3].tell(TunekitError("the loss became NaN"), spoken=True)
    assert [wait_for_end(company).message for company in met[:3]] == [
        "rank 3 on node-b: the loss became NaN"
    ] * 3
    assert [wait_for_end(company).speaks for company in met[:3]] == [True, True, False]


def test_one_that_hangs_is_ended_unless_it_is_saving(
    met: list[Company], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[TunekitError] = []
    monkeypatch.setattr(ranks, "GRACE", 0.3)
    monkeypatch.setattr(ranks, "at_end", ended.append)
    with met[0].saving():
        met[0]._leaving = met[1]._leaving = met[2]._leaving = met[3]._leaving = True
        met[0]._settle(End((3,)))
        met[0]._leaving = False
        time.sleep(0.8)
        assert not ended
    for _ in range(50):
        if ended:
            break
        time.sleep(0.05)
    assert [error.message for error in ended] == ["rank 3 on node-b has gone: killed, or the machine is lost"]


def test_those_that_part_are_not_missed(met: list[Company]) -> None:
    for company in met:
        company.part()
    met[1]._peers[0].close()
    time.sleep(1)
    assert all(company.ended() is None for company in met)


def test_on_one_machine_no_machine_is_named() -> None:
    company = Company(0, 2, None, "")
    company.members = [Member(rank, "a", "here") for rank in range(2)]
    assert company.elsewhere(End((1,))).message == "rank 1 has gone: killed, perhaps because memory ran out"


def test_somebody_who_collects_hears_it_from_the_first_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.DRIVEN, "1/2@here:1")
    company = Company(1, 3, None, "")
    company.members = [Member(0, "a", "one"), Member(1, "b", "two"), Member(2, "c", "three")]
    assert not company.elsewhere(End((2,))).speaks
    assert company.elsewhere(End((0,))).speaks


def test_one_that_waits_alone_says_where_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(DeviceError, match=rf"rank 1 of 2 does not find the others at 127\.0\.0\.1:{port}"):
        ranks.meet(1.0)


def test_a_place_is_what_its_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(2, 4, "fe80::1", 29500)
    monkeypatch.setenv(ranks.DRIVEN, str(place))
    assert Place.given() == place
    monkeypatch.delenv(ranks.DRIVEN)
    assert Place.given() is None


# Slurm ----------------------------------------------------------------------------------------------------

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]-ib",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_tasks_of_srun_are_ranks() -> None:
    told = dict(STEP)
    assert ranks.adopt(told)
    assert {name: told[name] for name in told.keys() - STEP.keys()} == {
        "RANK": "4",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu07-ib",
        "MASTER_PORT": str(20000 + (4711 * 7 + 1) % 12000),
    }


@pytest.mark.parametrize(
    "others",
    [
        {"RANK": "0", "WORLD_SIZE": "7"},  # torchrun or accelerate launch, one on each node
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": ""},  # the script of a job, which has a SLURM_PROCID too
    ],
)
def test_what_srun_has_not_started_as_a_rank_is_left_alone(others: dict[str, str]) -> None:
    told = {**STEP, **others}
    assert not ranks.adopt(told)
    assert told == {**STEP, **others}


@pytest.mark.parametrize(
    ("listed", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-3]", "n1"),
        ("n[003,5],x", "n003"),
        ("r1n[2-3]s", "r1n2s"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_list(listed: str, first: str) -> None:
    assert ranks._first_host(listed) == first


# What machines have to have in common ---------------------------------------------------------------------


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "versions": {"tunekit": "1", "torch": "2.13.0"},
        "config": {"train.lr": 0.1, "train.max_steps": 5},
        "pictures": [[20, "x"], [2, "y"], [0, "z"]],
        **changes,
    }


@pytest.mark.parametrize(
    ("other", "kind", "said"),
    [
        (
            facts(versions={"tunekit": "1", "torch": "2.10.0"}),
            DeviceError,
            "rank 1 on far has torch 2.10.0, and rank 0 has 2.13.0",
        ),
        (
            facts(config={"train.lr": 0.2, "train.max_steps": 6}),
            ConfigError,
            "rank 1 on far has another config than rank 0: train.lr is 0.2 there, and 0.1 here (and 1 more)",
        ),
        (
            facts(pictures=[[19, "w"], [2, "y"], [0, "z"]]),
            DataError,
            "rank 1 on far sees other pictures or captions than rank 0: 19 there, and 20 here",
        ),
        (
            facts(pictures=[[20, "x"], [2, "w"], [0, "z"]]),
            DataError,
            "rank 1 on far sees other held-out pictures or captions than rank 0: as many",
        ),
    ],
)
def test_what_differs_between_machines_is_named(
    other: dict[str, Any], kind: type[TunekitError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    company: Any = SimpleNamespace(
        members=[Member(0, "a", "near"), Member(1, "b", "far")], agree=lambda wrong, own: [facts(), other]
    )
    config = SimpleNamespace(model_dump=lambda mode: {})
    scan = SimpleNamespace(samples=[], held_out=[], prior=[])
    loaded = SimpleNamespace(where=lambda key: f"mine.yaml: {key}")
    found: Any = SimpleNamespace(check=lambda: None, scan=scan, config=config, loaded=loaded)
    with pytest.raises(kind) as caught:
        running._agree(found, company)
    assert caught.value.message == said
    assert caught.value.hint


# Which machines of a cluster take part --------------------------------------------------------------------


def node(name: str, cards: int = 0) -> Any:
    return SimpleNamespace(
        id=name * 8,
        name=name,
        host=f"host-{name}",
        rooms={"cpu": 1, **{f"cuda:{i}": 1 for i in range(cards)}},
    )


def test_machines_with_enough_cards_take_part_and_the_one_that_asked_first() -> None:
    nodes = [node("a"), node("b", 2), node("c", 1), node("d", 2)]
    assert [one.name for one in choose(nodes, 2, 2, "auto", "d" * 8)] == ["d", "b"]
    assert [one.name for one in choose(nodes, 3, 1, "cuda", "a" * 8)] == ["b", "c", "d"]
    assert [one.name for one in choose(nodes, 2, 4, "cpu", "c" * 8)] == ["c", "a"]
    assert [one.name for one in choose(nodes[:1], 1, 4, "auto", "")] == ["a"]


@pytest.mark.parametrize(
    ("count", "processes", "device", "said"),
    [
        (3, 1, "cpu", r"--nodes 3, and the cluster has 2: a \(host-a\), b \(host-b\)"),
        (
            2,
            1,
            "cuda",
            r"--nodes 2, and the cluster has 1 with 1 card each: a \(host-a, 0 cards\), b \(host-b, 1 ",
        ),
        (1, 2, "auto", r"--nodes 1, and the cluster has 0 with 2 cards each"),
    ],
)
def test_more_machines_than_there_are(count: int, processes: int, device: str, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        choose([node("a"), node("b", 1)], count, processes, device, "")


def test_what_is_sent_is_one_line_of_json(met: list[Company], tmp_path: Path) -> None:
    here, there = socket.socketpair()
    with here, there:
        met[0]._send(here, {"kind": "kept", "path": str(tmp_path)})
        assert json.loads(there.recv(4096)) == {"kind": "kept", "path": str(tmp_path)}
