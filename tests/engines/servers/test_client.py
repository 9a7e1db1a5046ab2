"""The client against servers that are slow, busy, broken, killed and restarted."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opd_env.engines.servers import client as http_client
from opd_env.engines.servers.client import HttpClient, RequestFailed, RequestRefused, ServersDown
from tests.engines.fake_vllm import FakeVLLM

BODY = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}


def quick(*urls: str, **changes: Any) -> HttpClient:
    return HttpClient(urls, **{"pause_s": 0.01, "timeout_s": 5.0, "patience_s": 5.0, **changes})


def tokens(answer: Any) -> list[int]:
    (choice,) = answer["choices"]
    return [int(token) for token in choice["token_ids"]]


@pytest.mark.parametrize(
    "fault", ["500", "502", "503", "429", "429:0.01", "408", "garbage", "not json", "truncated", "reset"]
)
def test_faults_that_pass_are_tried_again_until_the_answer_is_whole(fault: str) -> None:
    with FakeVLLM() as server:
        client = quick(server.url)
        wanted = client.post("/v1/completions", BODY, tokens)
        server.faults = [fault] * 3
        assert client.post("/v1/completions", BODY, tokens) == wanted
        assert len(server.requests) == 5


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_slow_answers_are_given_up_in_time(fault: str) -> None:
    with FakeVLLM() as server:
        client = quick(server.url, timeout_s=0.6)
        server.faults = [fault]
        started = time.monotonic()
        assert len(client.post("/v1/completions", BODY, tokens)) == 2
        assert len(server.requests) >= 2, "it waited for the slow answer"
        assert 0.5 < time.monotonic() - started < 30, "an answer drips for a minute"


def test_a_request_that_always_fails_ends_after_its_tries_and_names_the_server() -> None:
    with FakeVLLM() as server:
        server.always = "500"
        with pytest.raises(RequestFailed, match=rf"{server.url}/v1/completions failed 3 times; the last: HTTP 500"):
            quick(server.url, tries=3).post("/v1/completions", BODY, tokens)
        assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["400", "401", "404"])
def test_a_wrong_request_is_refused_at_once(fault: str) -> None:
    with FakeVLLM() as server:
        server.always = fault
        with pytest.raises(RequestRefused, match=f"HTTP {fault}"):
            quick(server.url).post("/v1/completions", BODY, tokens)
        assert len(server.requests) == 1


def test_busy_servers_do_not_use_up_tries_but_patience() -> None:
    with FakeVLLM() as server:
        server.faults = ["429:0.01"] * 20
        assert len(quick(server.url, tries=2).post("/v1/completions", BODY, tokens)) == 2


def test_retry_after_is_waited_for() -> None:
    with FakeVLLM() as server:
        server.faults = ["429:0.4"]
        started = time.monotonic()
        quick(server.url).post("/v1/completions", BODY, tokens)
        assert time.monotonic() - started >= 0.4


def test_without_any_server_the_client_gives_up_after_its_patience_and_says_what_to_do() -> None:
    with FakeVLLM() as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(ServersDown, match=rf"{url}.*[Rr]efused.*start it"):
        quick(url, patience_s=0.5).post("/v1/completions", BODY, tokens)
    assert 0.4 < time.monotonic() - started < 60


@pytest.mark.parametrize("busy", ["503", "429:0.01"])
def test_a_healthy_server_that_only_ever_says_busy_ends_as_one_that_is_away(busy: str) -> None:
    with FakeVLLM() as server:
        server.always = busy
        started = time.monotonic()
        with pytest.raises(ServersDown, match=f"{server.url}: HTTP {busy[:3]}"):
            quick(server.url, patience_s=0.5).post("/v1/completions", BODY, tokens)
        assert 0.4 < time.monotonic() - started < 60


def test_pauses_grow_until_a_server_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    faults, before = list[int](), http_client.pause_before
    monkeypatch.setattr(
        http_client, "pause_before", lambda tries, *more: (faults.append(tries), before(tries, *more))[1]
    )
    with FakeVLLM() as server:
        server.faults = ["500"] * 5
        started = time.monotonic()
        client = quick(server.url, tries=6, pause_s=0.04)
        client.post("/v1/completions", BODY, tokens)
        assert time.monotonic() - started > 0.5 * 0.04 * (1 + 2 + 4 + 8 + 16)
        server.faults = ["500"]
        client.post("/v1/completions", BODY, tokens)
    assert faults == [1, 2, 3, 4, 5, 1]  # after an answer, its next fault is a first one


def test_a_server_gets_no_work_before_what_it_needs_on_its_return_is_done_and_gets_it_once_at_a_time() -> None:
    with FakeVLLM() as server:
        client, returns = quick(server.url, patience_s=10), list[str]()

        def give_weights(url: str) -> None:
            returns.append(url)
            time.sleep(0.2)
            if len(returns) < 3:
                raise OSError("disk full")

        client.on_return = give_weights
        client.suspect(server.url, "it lacks the weights")
        client.post("/v1/completions", BODY, tokens)
        assert len(returns) == 3
        assert len(server.requests) == 1


def idle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_IDLE_S", 0.05)


def test_a_server_that_was_idle_is_looked_at_once_before_it_gets_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeVLLM() as server:
        client, seen = quick(server.url), list[int]()

        def look(url: str) -> None:
            monkeypatch.setattr(http_client, "_IDLE_S", 1e9)  # nothing is idle again before this says so
            time.sleep(0.1)
            seen.append(len(server.requests))

        client.on_return = look
        for requests in (8, 16):
            monkeypatch.setattr(http_client, "_IDLE_S", 0.0)
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: client.post("/v1/completions", BODY, tokens), range(8)))
            assert len(server.requests) == requests
        client.post("/v1/completions", BODY, tokens)
        assert seen == [0, 8]  # not before the last, which follows at once


def test_an_idle_server_that_is_not_what_it_was_gets_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    idle_at_once(monkeypatch)
    with FakeVLLM() as first, FakeVLLM() as second:
        client = quick(first.url, second.url, patience_s=0.5)

        def look(url: str) -> None:
            if url in changed:
                raise ValueError("it serves another model")

        client.on_return, changed = look, [first.url]
        for key in range(8):
            client.post("/v1/completions", BODY, tokens, key=key)
        assert (len(first.requests), len(second.requests)) == (0, 8)
        changed.append(second.url)
        time.sleep(0.1)
        with pytest.raises(ServersDown, match=f"{second.url}: it serves another model"):
            client.post("/v1/completions", BODY, tokens)
        assert len(second.requests) == 8


@pytest.mark.parametrize(("fault", "looks"), [("503:0.01", 2), ("500", 2), ("429:0.01", 1), ("429", 1)])
def test_a_server_is_looked_at_after_each_fault_but_that_of_being_busy(fault: str, looks: int) -> None:
    with FakeVLLM() as server:
        client, seen = quick(server.url), list[str]()
        client.on_return = seen.append
        client.post("/v1/completions", BODY, tokens)
        server.faults = [fault]
        client.post("/v1/completions", BODY, tokens)
        assert len(seen) == looks


@pytest.mark.parametrize("error", [OverflowError("x" * 10_000_000), RecursionError(), KeyError("choices")])
def test_whatever_reading_an_answer_meets_fails_the_request_in_few_words(error: Exception) -> None:
    def read(answer: Any) -> None:
        raise error

    with FakeVLLM() as server, pytest.raises(RequestFailed, match=type(error).__name__) as caught:
        quick(server.url, tries=2).post("/v1/completions", BODY, read)
    assert len(str(caught.value)) < 2000


def test_an_answer_from_before_a_servers_fault_does_not_make_it_healthy() -> None:
    with FakeVLLM() as server:
        server.delay_s = 0.3
        client, order = quick(server.url), list[str]()
        thread = threading.Thread(target=lambda: order.append(str(client.post("/v1/completions", BODY, tokens))))
        thread.start()
        time.sleep(0.1)
        client.on_return = lambda url: (time.sleep(0.5), order.append("returned"))[1]
        client.suspect(server.url, "restarted")
        thread.join()
        client.post("/v1/completions", BODY, tokens)
        assert order[1:] == ["returned"]


def test_another_server_takes_over_and_the_first_gets_work_again_when_it_is_back() -> None:
    with FakeVLLM() as first, FakeVLLM() as second:
        client = quick(first.url, second.url)
        first.kill()
        for key in range(8):
            client.post("/v1/completions", BODY, tokens, key=key)
        assert second.answered == 8
        first.start()
        returned: list[str] = []
        client.on_return = returned.append
        for _ in range(100):
            client.post("/v1/completions", BODY, tokens, key=7)
            if first.answered:
                break
            time.sleep(0.02)
        assert first.answered
        assert returned == [first.url]


def test_a_key_stays_with_its_server_and_keys_are_spread() -> None:
    with FakeVLLM() as first, FakeVLLM() as second:
        client = quick(first.url, second.url)
        for _ in range(2):
            for key in range(16):
                client.post("/v1/completions", {**BODY, "prompt": [key, 1]}, tokens, key=key)
        seen = [{request["prompt"][0] for request in server.requests} for server in (first, second)]
        assert not seen[0] & seen[1]
        assert min(map(len, seen)) >= 3


def test_a_server_killed_in_the_middle_of_answers_and_restarted_answers_each_request_once() -> None:
    with FakeVLLM() as server:
        client = quick(server.url, concurrency=8, tries=10)
        server.delay_s = 0.05
        found: dict[int, int] = {}
        failures: list[Exception] = []
        done = threading.Semaphore(0)

        def job(index: int) -> None:
            try:
                client.post("/v1/completions", {**BODY, "prompt": [index, 1]}, tokens)
                found[index] = found.get(index, 0) + 1
            except Exception as error:
                failures.append(error)
            done.release()

        for index in range(24):
            client.run(lambda index=index: job(index))
        time.sleep(0.08)
        server.kill()
        time.sleep(0.1)
        server.start()
        for _ in range(24):
            assert done.acquire(timeout=60)
        assert not failures
        assert found == dict.fromkeys(range(24), 1)


def test_no_more_requests_are_under_way_than_allowed() -> None:
    with FakeVLLM() as server:
        server.delay_s = 0.1
        client = quick(server.url, concurrency=3)
        lock, done = threading.Lock(), threading.Semaphore(0)
        running: list[int] = []
        most: list[int] = []

        def job(index: int) -> None:
            with lock:
                running.append(index)
                most.append(len(running))
            client.post("/v1/completions", BODY, tokens)
            with lock:
                running.remove(index)
            done.release()

        for index in range(12):
            client.run(lambda index=index: job(index))
        for _ in range(12):
            assert done.acquire(timeout=60)
        assert max(most) == 3


def test_close_ends_a_request_that_is_under_way() -> None:
    with FakeVLLM() as server:
        server.delay_s = 100.0
        client = quick(server.url, timeout_s=200)
        outcome: list[Exception] = []

        def job() -> None:
            try:
                client.post("/v1/completions", BODY, tokens)
            except RequestFailed as error:
                outcome.append(error)

        thread = threading.Thread(target=job)
        thread.start()
        while not server.requests:
            time.sleep(0.01)
        client.close()
        thread.join(60)
        assert not thread.is_alive()
        assert len(outcome) == 1


@pytest.mark.parametrize(
    ("urls", "changes", "message"),
    [
        ([], {}, "no server"),
        (["localhost:8000"], {}, "no URL"),
        (["http://h:1/chat"], {}, "no URL"),
        (["http://h:port"], {}, "no URL"),
        (["http://h:1", "http://h:1/v1/"], {}, "twice"),
        (["http://h:1"], {"concurrency": 0}, "concurrency=0"),
        (["http://h:1"], {"timeout_s": float("inf")}, "finite"),
    ],
)
def test_wrong_settings_are_refused(urls: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HttpClient(urls, **changes)
