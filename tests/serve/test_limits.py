"""Keys, limits, rude clients and the end: right status codes, nothing left behind, the server stays up."""

import contextlib
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest

KEY = "sk-secret-1"
LONG = {"prompt": "abc", "max_tokens": 16000, "ignore_eos": True}  # takes many seconds


@pytest.fixture(scope="module")
def strict(start, tiny, tmp_path_factory):
    """A server with a key and small limits."""
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    limits = [
        "--max-batch-size",
        "2",
        "--max-queue",
        "1",
        "--max-body",
        "2000",
        "--timeout",
        "3",
        "--body-timeout",
        "1",
    ]
    return start(f"tiny={tiny}", "--api-key-file", str(key), "--steps", "2", *limits)


@pytest.fixture(scope="module")
def http(strict):
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=strict.url, headers=headers, timeout=30) as client:
        yield client


def metrics(http) -> dict[str, float]:
    text = http.get("/metrics").text
    return {k: float(v) for k, v in re.findall(r"^(t3d_\w+)\{[^}]*\} (\S+)$", text, re.M)}


def eventually(happened, seconds: float = 20):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def idle(http):
    eventually(lambda: (m := metrics(http))["t3d_kv_cache_tokens"] == 0 == m["t3d_sequences_waiting"])


def raw(server, data: bytes, seconds: float = 10) -> bytes:
    """What comes back for these bytes until the server closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_the_key(strict, http):
    for headers in (
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Basic {KEY}"},
    ):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/nope")):
            response = httpx2.request(method, strict.url + path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert b"401" in raw(strict, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n")
    assert httpx2.get(f"{strict.url}/health").json() == {"status": "ok"}
    assert httpx2.get(strict.url).status_code == 200
    assert http.get("/v1/models").status_code == 200
    with (
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="Incorrect API key"),
    ):
        client.models.list()


def test_a_body_that_is_not_http_gets_one_answer(strict):
    """Also where the request was refused, or is about to be, before its body was read."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    at_once = raw(strict, head + b"not a length\r\n")
    assert at_once.startswith(b"HTTP/1.1 400 ")
    assert at_once.count(b"HTTP/1.1") == 1
    with socket.create_connection(("127.0.0.1", int(strict.url.split(":")[2])), timeout=10) as connection:
        connection.sendall(head)
        later = connection.recv(65536)
        assert later.startswith(b"HTTP/1.1 401 ")
        with contextlib.suppress(ConnectionError):  # the server may have closed it
            connection.sendall(b"not a length\r\n")
            while part := connection.recv(65536):
                later += part
        assert later.count(b"HTTP/1.1") == 1


def test_other_host_names_are_not_answered(strict):
    """Or any web page could talk to a server on this machine, by a name that it points here."""
    assert error_of(httpx2.get(f"{strict.url}/health", headers={"host": "evil.example"}), 421)
    for good in ("localhost", "localhost:1", "127.0.0.1:80", "[::1]:80"):
        assert httpx2.get(f"{strict.url}/health", headers={"host": good}).status_code == 200


def test_defaults_of_the_server(http):
    (card,) = http.get("/v1/models").json()["data"]
    assert card["t3d"]["steps"] == 2
    body = {"prompt": "abc", "max_tokens": 40, "ignore_eos": True, "return_details": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["t3d"]["tpf"] > 1.5


def test_a_body_that_is_too_large(strict, http):
    body = {"prompt": "a" * 3000}
    assert error_of(http.post("/v1/completions", json=body), 413)["code"] == "body_too_large"
    chunks = (b"a" * 65536 for _ in range(100))  # without saying how much will come
    assert error_of(http.post("/v1/completions", content=chunks), 413)
    assert error_of(http.post("/v1/completions", content=b"0" * 20_000_000), 413)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\nContent-Length: 9000000000\r\n"
    )
    answer = raw(strict, (head % KEY + "Expect: 100-continue\r\n\r\n").encode())
    assert answer.startswith(b"HTTP/1.1 413")  # without waiting for it
    assert http.get("/health").status_code == 200


def test_clients_that_are_too_slow(strict, http):
    start = time.monotonic()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 20\r\n"
    assert raw(strict, (head + "\r\n{").encode()).startswith(b"HTTP/1.1 408")  # half a body
    assert raw(strict, head.encode()) == b""  # half a head
    assert raw(strict, b"") == b""
    assert time.monotonic() - start < 20
    assert b"HTTP/1.1 400" in raw(strict, b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03\r\n\r\n")  # TLS to a server without
    assert http.get("/health").status_code == 200


def test_an_answer_that_takes_too_long(http):
    error = http.post("/v1/completions", json=LONG)
    assert error_of(error, 504)["code"] == "timeout"
    assert error.headers["x-should-retry"] == "false"
    with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    assert len(lines) > 10
    idle(http)


def test_a_full_queue(http):
    """Two are decoded, one waits; the next is told when to come back, and then is served."""
    for _ in range(5):  # on a busy machine the three may have run out of time before the fourth has come
        with ThreadPoolExecutor(3) as pool:
            busy = [pool.submit(http.post, "/v1/completions", json=LONG) for _ in range(3)]
            eventually(lambda b=busy: metrics(http)["t3d_sequences_waiting"] == 1 or any(x.done() for x in b))
            response = http.post("/v1/completions", json={"prompt": "abc"})
            never = http.post("/v1/completions", json={"prompt": "abc", "n": 4})
            assert [b.result().status_code for b in busy] == [504] * 3
        if response.status_code != 200:
            break
    assert error_of(response, 429)["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert error_of(never, 400)["param"] == "n"
    assert http.post("/v1/completions", json={"prompt": "abc"}).status_code == 200


@pytest.fixture(scope="module")
def patient(start, tiny):
    """A server that gives up no request, however busy the machine is."""
    return start(f"tiny={tiny}", "--steps", "2", "--max-batch-size", "2", "--max-queue", "1")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waiting", [False, True])
def test_a_client_that_goes_away_frees_its_place(patient, stream, waiting):
    body = json.dumps(LONG | {"stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    others = []
    with httpx2.Client(base_url=patient.url, timeout=30) as http:
        before = metrics(http)["t3d_sequences_cancelled_total"]
        for number in range(1 + 2 * waiting):
            others.append(socket.create_connection(("127.0.0.1", int(patient.url.split(":")[2]))))
            others[-1].sendall(head.encode() + body)
            eventually(lambda n=number: (m := metrics(http))["t3d_sequences_running"] + m["t3d_sequences_waiting"] > n)
        assert metrics(http)["t3d_sequences_waiting"] == waiting
        for connection in reversed(others):
            connection.close()
        idle(http)
        assert metrics(http)["t3d_sequences_cancelled_total"] == before + len(others)


def test_paths_and_methods_that_are_not_there(http):
    assert "'/nope'" in error_of(http.get("/nope"), 404)["message"]
    assert error_of(http.get("/v1/completions"), 405)
    assert error_of(http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"}), 400)
    assert http.get("/docs").status_code == 404  # would load scripts from elsewhere
    assert http.get("/openapi.json").json()["paths"].keys() >= {"/v1/completions", "/v1/chat/completions", "/v1/models"}


def test_metrics_are_prometheus_text(http):
    from prometheus_client.parser import text_string_to_metric_families

    before = metrics(http)
    done = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 30}).json()
    after = metrics(http)
    assert after["t3d_tokens_total"] - before["t3d_tokens_total"] == done["usage"]["completion_tokens"]
    assert after["t3d_sequences_finished_total"] - before["t3d_sequences_finished_total"] == 1
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(response.text)}
    assert names >= {"t3d_http_requests", "t3d_forwards", "t3d_answer_seconds", "process_resident_memory_bytes"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_lets_answers_end(start, tiny, number):
    server = start(str(tiny), "--grace", "30")
    lines = []

    def read():
        body = {"prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines.extend(line for line in response.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: lines)
    done = server.stop(number)
    reader.join(60)
    assert lines[-1] == "data: [DONE]"
    assert (done.code, done.stdout) == (0, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(server.url)


def test_stopping_does_not_wait_for_ever(start, tiny):
    server = start(str(tiny), "--grace", "1")
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(httpx2.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
        eventually(lambda: 't3d_sequences_running{model="tiny"} 1.0' in httpx2.get(f"{server.url}/metrics").text)
        began = time.monotonic()
        assert server.stop().code == 0
        assert time.monotonic() - began < 15
        assert error_of(reader.result(), 503)["message"] == "the server is stopping"
